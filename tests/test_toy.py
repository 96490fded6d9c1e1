"""ppo_toy.py: the closed forms of Appendix C, the generalised toy, and the smallest PPO."""

import math
import re
import signal
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import Process, call, checkpoints, read_scalars, same_scalars, same_weights

import ppo_toy as script

THETA, PHI = (0.51526, -0.44138), 0.11631
FIGURE_5 = f"--theta {THETA[0]} {THETA[1]} --phi {PHI}"
SHORT = "train --total-timesteps 4096 --update-epochs 1 --capacity-interval 0"


def closed_form(alpha, learning_rate=1.5, clip_coef=0.1, num_steps=20):
    """Appendix C: ratios of x and y before each step and after the last, which were clipped."""
    theta1, theta2 = THETA
    features = (PHI, alpha * PHI)

    def prob(s):
        return 1 / (1 + math.exp((theta2 - theta1) * features[s]))

    old, ratios, clipped = (prob(0), prob(1)), [], []
    for step in range(num_steps):
        s = step % 2
        ratios.append((prob(0) / old[0], prob(1) / old[1]))
        clipped.append(ratios[-1][s] > 1 + clip_coef)
        if not clipped[-1]:
            delta = learning_rate / old[s] * features[s] * prob(s) * (1 - prob(s))
            theta1, theta2 = theta1 + delta, theta2 - delta
    return [*ratios, (prob(0) / old[0], prob(1) / old[1])], clipped


@pytest.mark.parametrize("alpha", [3.0, 1.0, 0.5, -1.0, -2.0])
def test_every_step_is_the_closed_form(alpha):
    ratios, clipped = script.two_states(script.ToyArgs(), alpha, PHI, THETA)
    expected, expected_clipped = closed_form(alpha)
    torch.testing.assert_close(ratios, torch.tensor(expected, dtype=torch.float64))
    assert clipped == expected_clipped


@pytest.mark.parametrize(
    "alpha, x, y", [(3.0, 1.103, 1.253), (-2.0, 0.941, 1.141), (-1.0, 0.989, 1.012)]
)
def test_the_final_ratios_of_figure_5(alpha, x, y):
    ratios, _ = script.two_states(script.ToyArgs(), alpha, PHI, THETA)
    assert ratios[-1].tolist() == pytest.approx([x, y], abs=5e-4)
    old_prob = torch.tensor([t * PHI for t in THETA]).softmax(0)[0].item()
    assert old_prob == pytest.approx(0.52779, abs=1e-5)


def trajectory(args, rank, seed=0):
    """Features, order, advantages, ratios (T + 1, n) and clipped steps of the generalised toy."""
    inputs, trunk, head, actions, advantages, order = script.random_states(args, rank, seed)
    ratios, clipped = script.simulate(inputs, trunk, head, actions, advantages, order, args)
    return inputs @ trunk, order, advantages, ratios, clipped


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_the_features_have_the_rank_and_a_mean_squared_norm_of_1(rank):
    features, *_ = trajectory(script.ToyArgs(states=16, epochs=1), rank)
    assert torch.linalg.matrix_rank(features) == rank
    assert features.square().sum(1).mean().item() == pytest.approx(1)
    if rank == 16:
        torch.testing.assert_close(features @ features.T, torch.eye(16, dtype=torch.float64))


def test_with_orthogonal_features_a_ratio_moves_only_by_its_own_steps():
    _, order, advantages, ratios, clipped = trajectory(script.ToyArgs(states=16, epochs=20), 16)
    for step, s in enumerate(order):
        moved = (ratios[step + 1] - ratios[step]).abs() > 1e-12
        assert not moved[torch.arange(16) != s].any()
        # it passes its limit by its own last step at most: before that step it was within
        beyond = (ratios[step][s] > 1.1) if advantages[s] > 0 else (ratios[step][s] < 0.9)
        assert clipped[step] == bool(beyond)
        assert not (beyond and moved[s])
    assert any(clipped)


def test_with_collinear_features_the_others_push_a_clipped_ratio_on():
    _, order, advantages, ratios, _ = trajectory(script.ToyArgs(states=16, epochs=20), 1)
    pushed = 0
    for now, then in zip(ratios, ratios[1:]):
        beyond = torch.where(advantages > 0, now > 1.1, now < 0.9)
        further = torch.where(advantages > 0, then > now, then < now)
        pushed += (beyond & further).sum().item()
    assert pushed > 10


def test_the_ratios_leave_the_limits_further_as_the_rank_falls():
    above = {}
    for rank in (1, 4, 16):
        runs = [trajectory(script.ToyArgs(states=16), rank, seed)[3] for seed in range(8)]
        stats = [script.ratio_stats(ratios[-1].log(), 0.1) for ratios in runs]
        above[rank] = np.nanmean([s["ratio_mean_above"] for s in stats])
    assert above[1] > above[4] > above[16] > 1.1


def test_learned_features_and_pfo():
    args = script.ToyArgs(states=16, epochs=5)
    given = script.random_states(args, 4, 0)
    fixed, _ = script.simulate(*given, args)
    learned, _ = script.simulate(*given, args, learn_trunk=True)
    held, _ = script.simulate(*given, args, learn_trunk=True, pfo_coef=10.0)
    assert not torch.equal(fixed, learned)
    assert (held[-1] - fixed[-1]).abs().sum() < (learned[-1] - fixed[-1]).abs().sum()


def main(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["ppo_toy.py", *flags.split()])
    script.main()


def test_the_two_state_command(tmp_path, monkeypatch, capsys):
    main(monkeypatch, f"--alpha 3 -1 {FIGURE_5} --runs-dir {tmp_path} --run-name toy")
    printed = capsys.readouterr().out
    assert "final ratios: x 1.103, y 1.253" in printed
    assert "final ratios: x 0.989, y 1.012" in printed
    assert printed.count("y clipped") == 9  # alpha 3, from step 3 on
    assert "    2  x             1.0417    1.1078    x +0.0090  y +0.0226 (y moved" in printed
    assert "    3  y clipped     1.0417    1.1078    nothing (at its limit" in printed
    assert printed.splitlines()[-1].endswith(f"tensorboard --logdir {tmp_path}")
    scalars = read_scalars(tmp_path / "toy")
    assert [step for step, _ in scalars["toy/alpha=3/ratio_x"]] == list(range(21))
    assert scalars["toy/alpha=3/ratio_y"][-1][1] == pytest.approx(1.253, abs=5e-4)


def test_the_generalised_command(tmp_path, monkeypatch, capsys):
    torch.set_num_threads(2)
    flags = "--states 8 --dim 8 --features-rank 1 4 --num-seeds 3 --learn-features"
    main(monkeypatch, f"{flags} --runs-dir {tmp_path} --run-name toy")
    assert torch.get_num_threads() == 1
    scalars = read_scalars(tmp_path / "toy")
    assert {tag.split("/")[1] for tag in scalars} == {"learned features", "learned, PFO 1"}
    assert all([step for step, _ in points] == [1, 4, 8] for points in scalars.values())
    rows = re.findall(r"^learned.* (\d) +(\S+) \+- +(\S+)", capsys.readouterr().out, re.MULTILINE)
    assert [int(rank) for rank, *_ in rows] == [1, 4, 8] * 2  # 8: the control
    args = script.ToyArgs(states=8, dim=8)
    runs = [
        script.simulate(*script.random_states(args, 4, seed), args, learn_trunk=True)[0]
        for seed in (1, 2, 3)
    ]
    stats = [script.ratio_stats(run[-1].log(), 0.1)["ratio_mean_above"] for run in runs]
    expected = np.nanmean(stats), np.nanstd(stats, ddof=1) / np.isfinite(stats).sum() ** 0.5
    assert [float(x) for x in rows[1][1:]] == pytest.approx(expected, abs=6e-5)


BAD = {
    "--states 100000": "--states is 100000",
    f"--seed {'9' * 401}": "--seed",
    "--alpha nan": "--alpha",
    "--alpha": "--alpha",
    "--phi inf": "--phi",
    "--theta 1": "--theta",
    "--learning-rate -1": "--learning-rate",
    "--clip-coef 0": "--clip-coef",
    "--features-rank 3": "--states",
    "--states 16 --features-rank 17": "--features-rank",
    "--states 8": "--dim",
    "--run-name a/b": "--run-name",
    "--run-name ..": "--run-name",
    f"--runs-dir new/{'a' * 300}": "--runs-dir",
    "trian": "trian",
    f"train --total-timesteps {'9' * 401}": "--total-timesteps",
    "train --total-timesteps 1000": "--total-timesteps is 1000",
    "train --learning-rate nan": "--learning-rate",
    "train --clip-coef 1e308": "--clip-coef",
    "train --width 2147483647": "--width",
    "train --minibatch-size 1": "--minibatch-size is 1",
    "train --capacity-steps 5": "--capacity-steps is 5",
    "train --env-id Pendulum-v1": "--env-id Pendulum-v1 observes",
    "train --env-id Nope-v0": "--env-id Nope-v0 cannot be made: NameNotFound",
    f"train --run-name {'ü' * 101}": "--run-name",
    f"train --runs-dir new/{'a' * 300}": "--runs-dir",
    "train --resume": "--resume",
}


@pytest.mark.parametrize("flags", BAD, ids=lambda flags: flags[:40])
def test_bad_input_is_one_message_and_leaves_nothing(flags, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, flags)
    message = capfd.readouterr().err
    assert stop.value.code == 2
    assert BAD[flags] in message and "Traceback" not in message
    assert list(tmp_path.iterdir()) == []


def test_help_names_train(monkeypatch, capfd):
    for flags, words in (("--help", ["ppo_toy.py train"]), ("train --help", ["--pfo-coef"])):
        with pytest.raises(SystemExit) as stop:
            main(monkeypatch, flags)
        printed = capfd.readouterr().out
        assert not stop.value.code and all(word in printed for word in words)


class Later(gym.Env):
    """Two steps: a sign, then a blank; the reward for repeating the sign comes with the blank."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (1,))
    action_space = gym.spaces.Discrete(2)
    first, nan_after, fail_after, steps = True, math.inf, math.inf, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.first, self.sign = True, int(self.np_random.integers(2))
        return np.array([2.0 * self.sign - 1]), {}

    def step(self, action):
        assert type(action) is int
        type(self).steps += 1
        if self.steps > self.fail_after:
            raise RuntimeError("the joint came off")
        if self.first:
            self.first, self.right = False, action == self.sign
            return (
                np.array([0.0 if self.steps < self.nan_after else math.nan]),
                0.0,
                False,
                False,
                {},
            )
        return np.array([0.5]), float(self.right), True, False, {}


gym.register("Later-v0", Later)


@pytest.fixture
def later(monkeypatch):
    monkeypatch.setattr(Later, "steps", 0)
    return Later


def test_ppo_solves_a_probe(later, run, capsys):
    flags = "--env-id Later-v0 --total-timesteps 2560 --capacity-interval 0 --update-epochs 4"
    folder = run("ppo_toy", flags + " --learning-rate 1e-2 --log-interval 0.001")
    returns = [value for _, value in read_scalars(folder)["charts/episodic_return"]]
    assert returns[0] < 0.75 and min(returns[-3:]) > 0.95
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{folder} from step 0 on"
    assert lines[1].split() == "step return actor rank dead norm ratio below capacity".split()
    rows = [line.split() for line in lines[2:-1]]
    assert len(rows) == 40 and {len(row) for row in rows} == {7}
    assert rows[-1][0] == "2,560" and float(rows[-1][1]) == pytest.approx(returns[-1], abs=1e-3)
    assert lines[-1] == f"{folder} is finished; its curves: tensorboard --logdir {folder.parent}"


def test_training_improves_on_cartpole(run):
    flags = "--total-timesteps 20480 --num-envs 8 --num-steps 128 --minibatch-size 128"
    folder = run("ppo_toy", flags + " --update-epochs 10 --capacity-interval 0")
    returns = [value for _, value in read_scalars(folder)["charts/episodic_return"]]
    assert returns[0] < 40 and max(returns[-3:]) > 100


def test_environments_say_how_an_episode_ended(later):
    envs = script.Envs(script.Args(env_id="Later-v0"), 2, 0)
    first = envs.reset()
    obs, rewards, terminations, truncations, final_obs = envs.step(np.array([0, 1]))
    assert obs.tolist() == [[0], [0]] and rewards == (0, 0) and final_obs == []
    obs, rewards, terminations, truncations, final_obs = envs.step(np.array([0, 1]))
    right = (float(first[0, 0] == -1), float(first[1, 0] == 1))
    assert rewards == right and terminations == (True, True) and truncations == (False, False)
    assert [x.tolist() for x in final_obs] == [[0.5], [0.5]]
    assert (np.abs(obs) == 1).all()  # the next episodes have begun
    assert envs.finished == [(right[0], 2), (right[1], 2)]


def test_gumbel_noise_samples_the_policy():
    args = script.Args(env_id="Acrobot-v1")  # three actions: with two, Gumbel's sign is not seen
    agent = script.Agent(script.Envs(args, 1, 0), args)
    obs = torch.randn(1, 6)
    with torch.no_grad():
        agent.actor_head.bias.copy_(torch.tensor([-1.0, 0.0, 2.0]))
        probs = agent(obs).policy[0].exp()
    noise = agent.noise(20_000, 1, generator=torch.Generator().manual_seed(0))[:, 0]
    actions = agent.numpy_actor()(obs.expand(20_000, -1).numpy(), noise)
    counted = np.bincount(actions, minlength=3) / 20_000
    np.testing.assert_allclose(counted, probs.numpy(), atol=0.012)


def test_checkpoints_hold_what_capacity_py_reads(run):
    folder = run("ppo_toy", "--pfo-coef 1")
    kept = checkpoints(folder)
    assert list(kept) == [0, 128, 256, 384, 512]
    assert sorted(path.name for path in folder.iterdir())[:2] == ["args.json", "checkpoints"]
    states = [torch.load(path, weights_only=True) for path in kept.values()]
    assert [state["global_step"] for state in states] == list(kept)
    args = script.Args(**states[-1]["args"])
    assert states[-1]["script"] == "ppo_toy" and args.pfo_coef == 1
    assert states[-1]["obs_stats"] == {} and states[-1]["optimizer"]["state"]
    agent = script.Agent(script.Envs(args, 1, 0, states[-1]["obs_stats"]), args)
    agent.load_state_dict(states[-1]["agent"])
    assert not torch.equal(states[0]["agent"]["actor_head.bias"], agent.actor_head.bias)


def test_a_run_gives_the_same_numbers_with_and_without_its_checkpoints(run):
    kept, not_kept = run("ppo_toy", name="a"), run("ppo_toy", "--snapshot-interval 0", name="b")
    assert same_scalars(kept, not_kept) and checkpoints(not_kept) == {}
    assert same_weights(kept, run("ppo_toy", "--log-interval 0", name="c"))


def test_names_that_collide(run, tmp_path, monkeypatch, capsys):
    folder = run("ppo_toy")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for flags in ("train", ""):
        with pytest.raises(SystemExit) as stop:
            main(monkeypatch, f"{flags} --runs-dir {tmp_path} --run-name run")
        assert stop.value.code == 2 and f"{folder} exists" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr(script.time, "time", lambda: 1)  # two runs of one second
    main(monkeypatch, f"--runs-dir {tmp_path}")
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, f"--runs-dir {tmp_path}")
    assert stop.value.code == 2 and "toy__ppo_toy__1__1 exists" in capsys.readouterr().err


def test_a_diverged_run_says_so(later, run, monkeypatch, capsys):
    monkeypatch.setattr(Later, "nan_after", 200)
    with pytest.raises(SystemExit) as stop:
        run("ppo_toy", "--env-id Later-v0 --capacity-interval 0")
    assert stop.value.code == 1
    message = capsys.readouterr().err
    assert re.search(r"observations and parameters are not finite at step \d+; .*keeps", message)


def full_disk():
    sys.stdout = open("/dev/full", "w")


def ascii_terminal():
    sys.stdout.reconfigure(encoding="ascii")
    sys.stderr.reconfigure(encoding="ascii")


def crash():
    gym.register("Later-v0", Later)
    Later.fail_after = 3000


def test_a_print_never_ends_a_run(tmp_path):
    assert call("ppo_toy", f"--runs-dir {tmp_path} --run-name a", prepare=full_disk).returncode == 0
    ended = call("ppo_toy", f"{SHORT} --runs-dir {tmp_path} --run-name ü", prepare=ascii_terminal)
    assert ended.returncode == 0 and "is finished" in ended.stdout, ended.stderr
    assert len(checkpoints(tmp_path / "ü")) == 5


def test_ctrl_c_says_what_was_kept(tmp_path):
    flags = f"{SHORT} --total-timesteps 1000000 --snapshot-interval 0.001 --runs-dir {tmp_path}"
    process, folder = Process("ppo_toy", f"{flags} --run-name a"), tmp_path / "a"
    process.wait_until(lambda: len(checkpoints(folder)) > 3)
    assert len(read_scalars(folder)["charts/SPS"]) >= 3  # curves can be watched during the run
    process.send(signal.SIGINT)
    process.wait()
    assert process.returncode == 130 and "Traceback" not in process.stderr
    kept = f"{folder} keeps the curves so far and {len(checkpoints(folder))} checkpoints"
    assert f"ppo_toy.py: error: interrupted; {kept}\n" in process.stderr
    steps = [step for step, _ in read_scalars(folder)["charts/SPS"]]
    assert max(steps) >= max(checkpoints(folder))


def test_a_task_that_crashes(tmp_path):
    flags = f"{SHORT} --env-id Later-v0 --snapshot-interval 0.5 --runs-dir {tmp_path} --run-name a"
    ended = call("ppo_toy", flags, prepare=crash)
    assert ended.returncode == 1 and "in step" in ended.stderr
    kept = f"{tmp_path / 'a'} keeps the curves so far and 2 checkpoints"
    assert f"error: RuntimeError('the joint came off'); {kept}\n" in ended.stderr

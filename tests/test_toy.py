"""ppo_toy.py: the closed forms of Appendix C, and the textbook PPO."""

import math
import signal
import sys

import pytest
import torch
import torch.nn as nn
from conftest import Process, checkpoints, one_line, read_scalars

import ppo_mujoco
import ppo_toy as script

THETA, PHI = (0.51526, -0.44138), 0.11631


def closed_form(alpha, learning_rate=1.5, clip_coef=0.1, num_steps=20):
    """Appendix C: ratios of x and y before each step and after the last, and which were clipped."""
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


def main(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["ppo_toy.py", *flags.split()])
    script.main()


def test_the_command_without_flags_is_figure_5(tmp_path, monkeypatch, capsys):
    main(monkeypatch, f"--runs-dir {tmp_path}")
    printed = capsys.readouterr().out
    for ratios in ("x 1.103, y 1.253", "x 0.941, y 1.141", "x 0.989, y 1.012"):
        assert f"final ratios: {ratios}\n" in printed
    rows = printed.partition("alpha = -2")[0].splitlines()[2:22]
    assert [row.split()[:2] for row in rows] == [[str(i), "xy"[i % 2]] for i in range(20)]
    ratios, clipped = closed_form(3.0)
    for row, before, after, was_clipped in zip(rows, ratios, ratios[1:], clipped):
        changes = [a - b for a, b in zip(after, before)]
        assert [float(x) for x in row.split()[2:6]] == pytest.approx([*after, *changes], abs=6e-5)
        assert row.endswith("clipped") == was_clipped
    assert max(map(len, printed.splitlines()[:-1])) < 80
    assert printed.splitlines()[-1].endswith(f"tensorboard --logdir {tmp_path}")
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("toy__ppo_toy__")
    scalars = read_scalars(folder)
    assert [step for step, _ in scalars["toy/alpha=3/ratio_x"]] == list(range(21))
    assert scalars["toy/alpha=3/ratio_y"][-1][1] == pytest.approx(1.253, abs=5e-4)


BAD = ["alpha nan", "alpha", "alpha 1e4", "phi inf", "theta 1", "learning-rate -1", "clip-coef 0"]
BAD += ["epochs 0", "run-name a/b", "runs-dir new/" + "a" * 300, "seed 1", "states 8"]


@pytest.mark.parametrize("flags", BAD, ids=lambda flags: flags[:30])
def test_a_wrong_flag_of_the_two_states_is_one_message(flags, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(monkeypatch, f"--{flags}")
    message = capfd.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in message
    assert f"--{flags.split()[0]}" in message and list(tmp_path.iterdir()) == []


def test_help_names_train(monkeypatch, capfd):
    for flags, words in (("--help", "ppo_toy.py train"), ("train --help", "--pfo-coef")):
        with pytest.raises(SystemExit) as stop:
            main(monkeypatch, flags)
        assert not stop.value.code and words in capfd.readouterr().out


def test_training_improves_on_cartpole(run):
    flags = "--total-timesteps 20480 --num-envs 8 --num-steps 128 --minibatch-size 128"
    flags += " --update-epochs 10 --capacity-interval 0 --snapshot-interval 0"
    folder = run("ppo_toy", flags)
    returns = [value for _, value in read_scalars(folder)["charts/episodic_return"]]
    assert returns[0] < 40 and max(returns[-3:]) > 100
    assert checkpoints(folder) == {}


def test_environments_say_how_an_episode_ended():
    """The reward of the task is its action, and an episode has 20 steps."""
    envs = script.Envs(script.Args(env_id="probe_envs:DriftDiscrete-v0"), 2, 0)
    envs.reset()
    for step in range(1, 21):
        obs, last_obs, rewards, terminations, truncations = envs.step(torch.tensor([0, 1]))
        assert rewards == (0, 1) and truncations == (False, False)
        assert terminations == (step == 20, step == 20)
        assert (obs == last_obs).all() == (step < 20)  # then the next episodes have begun
    assert envs.finished == [(0, 20), (20, 20)]


def make_agent(**flags):
    args = script.Args(env_id="Acrobot-v1", **flags)
    torch.manual_seed(0)
    return script.Agent(script.Envs(args, 1, 0), args), args


def test_actions_are_sampled_from_the_policy():
    agent, _ = make_agent()
    obs = torch.randn(1, 6)
    with torch.no_grad():
        agent.actor_head.bias.copy_(torch.tensor([-1.0, 0.0, 2.0]))
        probs = agent(obs).policy[0].exp()
    counted = agent.sample(obs.expand(20_000, -1)).bincount(minlength=3) / 20_000
    torch.testing.assert_close(counted, probs, atol=0.012, rtol=0)


def test_pfo_acts_on_the_inputs_of_all_activations_and_the_output():
    agent, _ = make_agent(pfo_layers="all")
    first, activation, last = agent.actor_trunk
    trunk = nn.Sequential(first, nn.GELU(), nn.Linear(64, 64), activation, last)
    agent.actor_trunk = trunk
    obs = torch.randn(5, 6)
    expected = torch.cat([trunk[:1](obs), trunk[:3](obs), trunk(obs)], 1)
    assert torch.equal(agent(obs).pfo_preactivations, expected)


@pytest.mark.parametrize("kind", [{}, {"share_trunk": True}, {"pfo_layers": "all", "width": 16}])
def test_loss_and_gradients_are_those_of_the_large_scripts(kind):
    """The textbook form and ppo_mujoco.py's on the same agent and minibatch."""
    flags = dict(pfo_coef=2.0, ent_coef=0.05, max_grad_norm=0.3, activation="relu", **kind)
    flags["minibatch_size"] = 16  # of the capacity fit
    agent, args = make_agent(**flags)
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(64, 6, generator=generator)
    actions = torch.randint(3, (64,), generator=generator)
    old = script.evaluate(agent, obs)
    logprobs = agent.log_prob(old.policy, actions) + 0.3 * torch.randn(64, generator=generator)
    minibatch = {"obs": obs, "actions": actions, "logprobs": logprobs}
    minibatch["advantages"], minibatch["returns"] = 3 * torch.randn(2, 64, generator=generator)
    minibatch["old_pfo_preactivations"] = old.pfo_preactivations + 0.1
    gradients, expected, _ = ppo_mujoco.ppo_gradient(agent, args, **minibatch)
    losses = script.compute_gradients(agent, args, **minibatch)
    ours = torch.cat([p.grad.flatten() for group in agent.groups for p in group])
    torch.testing.assert_close(ours, torch.cat(gradients), rtol=0, atol=1e-6)
    assert losses.keys() == expected.keys() | {"entropy"}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value.mean(), rtol=1e-5, atol=1e-6)
    agent.zero_grad()
    data = script.capacity_target(make_agent(**flags | {"width": 8})[0], obs, torch.arange(64))
    fits = [x.capacity_loss(agent, args, *data) for x in (script, ppo_mujoco)]
    assert fits[0] == pytest.approx(fits[1], rel=1e-4)


def test_ctrl_c_says_what_was_kept(tmp_path):
    flags = "train --total-timesteps 1000000 --update-epochs 1 --capacity-interval 0"
    flags += f" --snapshot-interval 0.001 --runs-dir {tmp_path} --run-name a"
    process, folder = Process("ppo_toy", flags), tmp_path / "a"
    process.wait_until(lambda: len(checkpoints(folder)) > 3)
    assert len(read_scalars(folder)["charts/SPS"]) >= 3  # curves can be watched during the run
    process.send(signal.SIGINT)
    line = one_line(process.wait(), 130)
    assert "interrupted" in line and f"{folder} keeps the curves and checkpoints so far" in line
    steps = [step for step, _ in read_scalars(folder)["charts/SPS"]]
    assert max(steps) >= max(checkpoints(folder))

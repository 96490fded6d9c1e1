"""ppo_toy.py: the closed forms of Appendix C, the generalised toy, and a short training."""

import math
import sys

import pytest
import torch
from conftest import read_scalars

import ppo_toy as script

THETA, PHI = (0.51526, -0.44138), 0.11631


def closed_form(alpha, learning_rate=1.5, clip_coef=0.1, num_steps=20):
    """Appendix C: ratios of x and y before each step and after the last, and which samples were clipped."""
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
    args = script.ToyArgs()
    args.check()
    ratios, clipped = script.two_states(args, alpha, PHI, THETA)
    expected, expected_clipped = closed_form(alpha)
    torch.testing.assert_close(ratios, torch.tensor(expected, dtype=torch.float64))
    assert clipped == expected_clipped


@pytest.mark.parametrize("alpha, x, y", [(3.0, 1.103, 1.253), (-2.0, 0.941, 1.141), (-1.0, 0.989, 1.012)])
def test_the_final_ratios_of_figure_5(alpha, x, y):
    args = script.ToyArgs()
    args.check()
    ratios, _ = script.two_states(args, alpha, PHI, THETA)
    assert ratios[-1].tolist() == pytest.approx([x, y], abs=5e-4)
    old_prob = torch.tensor([t * PHI for t in THETA]).softmax(0)[0].item()
    assert old_prob == pytest.approx(0.52779, abs=1e-5)


def trajectory(args, rank, seed=0):
    """Features, order and advantages of the generalised toy, its ratios (T + 1, n) and which steps were clipped."""
    args.check()
    inputs, trunk, head, actions, advantages, order = script.random_states(args, rank, seed)
    ratios, clipped = script.simulate(inputs, trunk, head, actions, advantages, order, args)
    return dict(features=inputs @ trunk, order=order, advantages=advantages, ratios=ratios, clipped=clipped)


@pytest.mark.parametrize("rank", [1, 3, 16])
def test_the_features_have_the_rank_and_a_mean_squared_norm_of_1(rank):
    args = script.ToyArgs(states=16)
    features = trajectory(args, rank)["features"]
    assert torch.linalg.matrix_rank(features) == rank
    assert features.square().sum(1).mean().item() == pytest.approx(1)
    if rank == 16:
        torch.testing.assert_close(features @ features.T, torch.eye(16, dtype=torch.float64))


def test_with_orthogonal_features_a_ratio_moves_only_by_its_own_steps():
    args = script.ToyArgs(states=16, epochs=20)
    run = trajectory(args, 16)
    ratios, advantages = run["ratios"], run["advantages"]
    for step, s in enumerate(run["order"]):
        moved = (ratios[step + 1] - ratios[step]).abs() > 1e-12
        assert not moved[torch.arange(16) != s].any()
        # it passes its limit by its own last step at most: before that step it was within
        beyond = (ratios[step][s] > 1.1) if advantages[s] > 0 else (ratios[step][s] < 0.9)
        assert run["clipped"][step] == bool(beyond)
        assert not (beyond and moved[s])


def test_with_collinear_features_the_others_push_a_clipped_ratio_on():
    args = script.ToyArgs(states=16, epochs=20)
    run = trajectory(args, 1)
    ratios, advantages, pushed = run["ratios"], run["advantages"], 0
    for step in range(len(run["order"])):
        beyond = torch.where(advantages > 0, ratios[step] > 1.1, ratios[step] < 0.9)
        further = torch.where(advantages > 0, ratios[step + 1] > ratios[step], ratios[step + 1] < ratios[step])
        pushed += (beyond & further).sum().item()
    assert pushed > 10


def test_the_ratios_leave_the_limits_further_as_the_rank_falls():
    args = script.ToyArgs(states=16)
    above = {}
    for rank in (1, 4, 16):
        runs = [trajectory(args, rank, seed)["ratios"] for seed in range(15)]
        stats = [script.ratio_stats(ratios[-1].log(), 0.1) for ratios in runs]
        values = torch.tensor([s["ratio_mean_above"] for s in stats])
        above[rank] = values[~values.isnan()].mean().item()
    assert above[1] > above[4] > above[16] > 1.1


def test_learned_features_and_pfo():
    args = script.ToyArgs(states=16, epochs=5)
    args.check()
    given = script.random_states(args, 4, 0)
    fixed, _ = script.simulate(*given, args)
    learned, _ = script.simulate(*given, args, learn_features=True)
    held, _ = script.simulate(*given, args, learn_features=True, pfo_coef=10.0)
    assert not torch.equal(fixed, learned) and not torch.equal(learned, held)


def test_the_default_command(tmp_path, monkeypatch, capsys):
    flags = f"--alpha 3 -1 --theta {THETA[0]} {THETA[1]} --phi {PHI} --runs-dir {tmp_path} --run-name toy"
    monkeypatch.setattr(sys, "argv", ["ppo_toy.py", *flags.split()])
    script.main()
    printed = capsys.readouterr().out
    assert "final ratios: x 1.103, y 1.253" in printed and "final ratios: x 0.989, y 1.012" in printed
    assert printed.count("y clipped") == 9  # alpha 3, from step 3 on
    scalars = read_scalars(tmp_path / "toy")
    assert [step for step, _ in scalars["toy/alpha=3/ratio_x"]] == list(range(21))
    assert scalars["toy/alpha=3/ratio_y"][-1][1] == pytest.approx(1.253, abs=5e-4)
    assert (tmp_path / "toy" / "figure5.png").read_bytes()[:4] == b"\x89PNG"


def test_the_generalised_command(tmp_path, monkeypatch, capsys):
    flags = f"--states 8 --dim 8 --features-rank 1 4 --num-seeds 3 --learn-features --runs-dir {tmp_path} --run-name toy"
    monkeypatch.setattr(sys, "argv", ["ppo_toy.py", *flags.split()])
    script.main()
    scalars = read_scalars(tmp_path / "toy")
    assert {tag.split("/")[1] for tag in scalars} == {"learned features", "learned, PFO 1"}
    assert all([step for step, _ in points] == [1, 4, 8] for points in scalars.values())  # 8: the control
    assert (tmp_path / "toy" / "ratios_by_rank.png").exists()


def test_training_improves_on_cartpole(run):
    flags = (
        "--total-timesteps 24576 --num-envs 8 --num-steps 128 --minibatch-size 128 --update-epochs 10 --capacity-interval 0"
    )
    returns = [value for _, value in read_scalars(run("ppo_toy", flags))["charts/episodic_return"]]
    assert returns[0] < 40 and max(returns[-3:]) > 120


def test_gumbel_noise_samples_the_policy():
    envs = script.Envs(script.Args(), 1, 0)
    agent = script.Agent(envs, script.Args())
    obs = torch.randn(1, 4)
    with torch.no_grad():
        policy = agent(obs)[0]
    noise = agent.noise(20_000, 1, generator=torch.Generator().manual_seed(0))[:, 0]
    actions = agent.numpy_actor()(obs.expand(20_000, -1).numpy(), noise)
    assert (actions == 1).mean() == pytest.approx(policy[0, 1].exp().item(), abs=0.012)


def test_restored_environments_go_on_bit_for_bit():
    import numpy as np

    envs, other = script.Envs(script.Args(), 4, 0), script.Envs(script.Args(seed=2), 4, 0)
    envs.reset()
    actions = np.random.default_rng(0).integers(0, 2, (120, 4))
    for step in range(100):
        envs.step(actions[step])
    np.testing.assert_array_equal(other.load_state_dict(envs.state_dict()), envs.obs)
    for step in range(100, 120):
        for ours, theirs in zip(envs.step(actions[step]), other.step(actions[step])):
            np.testing.assert_array_equal(ours, theirs)

"""The pure functions of the diagnostics against closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import ppo_mujoco as script

RANKS = ("effective_rank", "pca_rank", "srank", "feature_rank", "torch_rank")


def test_ranks_of_given_singular_values():
    # Squares: 10000, 100, 1, 0.0025; 10000 / 10101.0025 = 0.9900007, just beyond 1 - delta.
    # Plain: 100, 10, 1, 0.05: 100/111.05 = 0.9005, 110/111.05 = 0.9905.
    sigma = [100.0, 10.0, 1.0, 0.05]
    double = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    u, _ = torch.linalg.qr(torch.randn(400, 4, **double))
    v, _ = torch.linalg.qr(torch.randn(6, 4, **double))
    ranks = script.feature_ranks(u * torch.tensor(sigma) @ v.T)
    p = np.array(sigma) / sum(sigma)
    assert ranks["effective_rank"] == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    assert ranks["pca_rank"] == 1
    assert ranks["srank"] == 2
    assert ranks["feature_rank"] == 3  # sigma / sqrt(400) > 0.01 for 100, 10, 1
    assert ranks["torch_rank"] == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_rank_is_matrix_rank(dtype):
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(100, 30, generator=generator, dtype=dtype)
    low = full[:, :5] @ torch.randn(5, 30, generator=generator, dtype=dtype)
    for features, rank in ((full, 30), (low, 5)):
        assert torch.linalg.matrix_rank(features).item() == rank
        assert script.feature_ranks(features)["torch_rank"] == rank


@pytest.mark.parametrize("features", [torch.zeros(7, 3), torch.zeros(0, 3), torch.zeros(3, 0)])
def test_a_zero_matrix_has_rank_0(features):
    assert script.feature_ranks(features) == dict.fromkeys(RANKS, 0.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_ranks_of_non_finite_features_are_nan(bad):
    features = torch.randn(20, 4)
    features[3, 2] = bad
    ranks = script.feature_ranks(features)
    assert tuple(ranks) == RANKS
    assert all(math.isnan(rank) for rank in ranks.values())


def test_ranks_of_huge_and_tiny_features_do_not_overflow():
    for scale in (1e30, 1e-30):
        ranks = script.feature_ranks(torch.eye(4) * scale)
        assert ranks["pca_rank"] == ranks["srank"] == ranks["torch_rank"] == 4
        assert ranks["effective_rank"] == pytest.approx(4)
    assert script.feature_ranks(torch.eye(4) * 1e-30)["feature_rank"] == 0


@pytest.mark.parametrize("n", [100, 200, 500, 1000])
def test_exact_ties_count_exactly(n):
    """n equal singular values: numpy#28063."""
    right = {100: 100, 200: 199, 500: 496, 1000: 991}[n]
    for features in (torch.eye(n), 3 * torch.eye(n).double(), torch.eye(n).repeat(2, 1)):
        ranks = script.feature_ranks(features)
        assert (ranks["pca_rank"], ranks["srank"]) == (right, right)
        assert ranks["torch_rank"] == ranks["feature_rank"] == n
        assert ranks["effective_rank"] == pytest.approx(n)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**16))
@example(1, 1, 468)  # a single feature of size below 0.01
def test_ranks_lie_between_1_and_the_smaller_side(num_rows, num_columns, seed):
    features = torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(seed))
    for name, rank in script.feature_ranks(features).items():
        least = 1
        if name == "feature_rank":  # absolute: all may lie below its threshold
            least = int(torch.linalg.matrix_norm(features, 2) / num_rows**0.5 > 0.01)
        assert least - 1e-9 <= rank <= min(num_rows, num_columns) + 1e-9, name


def test_dead_neurons():
    features = torch.rand(50, 4) + 0.5
    features[:, 1] = 0
    features[:, 2] = 0.7
    assert script.dead_neurons(features, "relu") == 1  # the zero column
    assert script.dead_neurons(features, "tanh") == 2  # the zero and the constant one
    features[7, 1] = 1e-6
    assert script.dead_neurons(features, "relu") == 0
    with pytest.raises(ValueError, match="tanh"):
        script.dead_neurons(features, "gelu")
    # Two samples +-x: the unbiased std is sqrt(2) x, the biased one x
    column = torch.tensor([[1.0], [-1.0]])
    assert script.dead_neurons(column * 0.0009, "tanh") == 0
    assert script.dead_neurons(column * 0.0007, "tanh") == 1
    for activation in ("relu", "tanh"):
        assert script.dead_neurons(torch.full((5, 3), math.nan), activation) == 0


def test_ratio_stats_by_hand():
    ratios = torch.tensor([0.5, 0.7, 0.95, 1.0, 1.05, 1.5, 2.0, 3.0])
    stats = script.ratio_stats(ratios.log(), 0.1)
    assert stats == pytest.approx(
        {
            "ratio_mean_above": 6.5 / 3,
            "ratio_mean_below": 0.6,
            "ratio_excess": 6.5 / 3 / 0.6,
            "ratio_max": 3.0,
            "ratio_min": 0.5,
            "frac_above": 3 / 8,
            "frac_below": 2 / 8,
        },
        rel=1e-6,
    )


def test_ratio_stats_without_samples_beyond_the_limits():
    stats = script.ratio_stats(torch.zeros(5), 0.2)
    means = ("ratio_mean_above", "ratio_mean_below", "ratio_excess")
    assert all(math.isnan(stats.pop(name)) for name in means)
    assert stats == {"ratio_max": 1, "ratio_min": 1, "frac_above": 0, "frac_below": 0}
    one_side = script.ratio_stats(torch.tensor([0.0, 1.0]), 0.2)
    assert one_side["ratio_mean_above"] == pytest.approx(math.e)
    assert math.isnan(one_side["ratio_mean_below"]) and math.isnan(one_side["ratio_excess"])
    empty = script.ratio_stats(torch.tensor([]), 0.2)
    assert empty.keys() == one_side.keys() and all(map(math.isnan, empty.values()))


def test_ratio_stats_of_overflowing_ratios_are_finite():
    stats = script.ratio_stats(torch.tensor([1e30, -1e30, math.inf, -math.inf, 0.0]), 0.2)
    assert stats["ratio_max"] == stats["ratio_mean_above"] == 1e12
    assert stats["ratio_min"] == stats["ratio_mean_below"] == 1e-12
    assert stats["ratio_excess"] == pytest.approx(1e24)  # the quotient of the clamped averages


def test_ratio_stats_clamps_averages_and_not_samples():
    """Appendix B.3."""
    stats = script.ratio_stats(torch.tensor([1e14, 1e10]).log(), 0.2)
    assert stats["ratio_mean_above"] == stats["ratio_max"] == 1e12
    stats = script.ratio_stats(torch.tensor([5e12, *[1.5] * 9]).log(), 0.2)
    assert stats["ratio_mean_above"] == pytest.approx((5e12 + 13.5) / 10, rel=1e-4)  # not 1e11
    low = script.ratio_stats(torch.tensor([1e-14, 0.5]).log(), 0.2)
    assert low["ratio_mean_below"] == pytest.approx(0.25) and low["ratio_min"] == 1e-12
    largest = script.ratio_stats(torch.tensor([20.0]), 0.2)["ratio_max"]
    assert largest == pytest.approx(math.exp(20), rel=1e-12)  # float32 would lose digits


def test_gae_by_hand():
    # The episode terminates at the second step: A_1 = r_1 - V_1, A_0 = delta_0 + gamma lambda A_1
    rewards, values = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.5], [0.25]])
    next_values, ends = torch.tensor([[0.25], [9.0]]), torch.tensor([[False], [True]])
    advantages, returns = script.compute_gae(rewards, values, next_values, ends, ends, 0.9, 0.8)
    last = 2.0 - 0.25
    first = 1.0 + 0.9 * 0.25 - 0.5 + 0.72 * last
    assert advantages.flatten().tolist() == pytest.approx([first, last])
    assert returns.flatten().tolist() == pytest.approx([first + 0.5, 2.0])


def test_gae_of_a_truncated_episode_bootstraps_but_does_not_leak():
    rewards, values = torch.zeros(3, 1), torch.zeros(3, 1)
    next_values = torch.tensor([[0.0], [10.0], [0.0]])
    terminations, dones = torch.zeros(3, 1), torch.tensor([[0.0], [1.0], [0.0]])
    rewards[2] = 100.0  # of the next episode
    advantages, _ = script.compute_gae(rewards, values, next_values, terminations, dones, 0.9, 1.0)
    assert advantages.flatten().tolist() == pytest.approx([8.1, 9.0, 100.0])


def test_gae_with_a_constant_critic_and_reward():
    # delta = r + (gamma - 1) c: A_t = delta (1 - (gamma lambda)^n) / (1 - gamma lambda), n to go
    gamma, lam, num_steps, r, c = 0.95, 0.9, 20, 2.0, 5.0
    values, zeros = torch.full((num_steps, 3), c), torch.zeros(num_steps, 3)
    inputs = torch.full_like(values, r), values, values, zeros, zeros
    advantages, returns = script.compute_gae(*inputs, gamma, lam)
    delta, decay = r + (gamma - 1) * c, gamma * lam
    expected = [delta * (1 - decay**n) / (1 - decay) for n in range(num_steps, 0, -1)]
    assert advantages[:, 1].tolist() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(returns, advantages + c)


def test_pfo_loss_is_the_mean_square_and_its_gradient():
    old, new = torch.randn(5, 7), torch.randn(5, 7, requires_grad=True)
    loss = script.pfo_loss(new, old)
    assert loss.item() == pytest.approx(((new - old) ** 2).sum().item() / 35, rel=1e-6)
    loss.backward()
    torch.testing.assert_close(new.grad, 2 * (new.detach() - old) / 35)
    assert script.pfo_loss(old, old).item() == 0
    # equation 2: the sum over dimensions
    assert script.pfo_loss(new, old, "sum").item() == pytest.approx(7 * loss.item(), rel=1e-6)
    assert script.pfo_loss(new, old, "mean").item() == loss.item()


@pytest.mark.parametrize("num_iterations", [1, 7, 40, 146, 2441, 97656])
@pytest.mark.parametrize("interval", [0.001, 0.002, 0.025, 0.5, 1.0])
def test_due_is_evenly_spread_and_includes_the_last(interval, num_iterations):
    iterations = range(num_iterations + 1)
    iterations = [i for i in iterations if script.due(interval, i, num_iterations)]
    assert iterations[0] == 0 and iterations[-1] == num_iterations
    assert len(iterations) == min(num_iterations, round(1 / interval)) + 1
    assert not any(script.due(0.0, i, num_iterations) for i in iterations)

"""Policies, losses and interventions."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import ppo_mujoco as script

OBS_DIM, ACTION_DIM, BATCH = 7, 3, 32
ENVS = SimpleNamespace(obs_dim=OBS_DIM, action_dim=ACTION_DIM)


def make_agent(**flags):
    torch.manual_seed(0)
    return script.Agent(ENVS, script.Args(**flags))


def make_minibatch(agent, seed=0):
    """A minibatch as `ppo_loss` takes it, with ratios away from 1."""
    generator = torch.Generator().manual_seed(seed)
    obs = torch.randn(BATCH, OBS_DIM, generator=generator)
    actions = torch.randn(BATCH, ACTION_DIM, generator=generator)
    with torch.no_grad():
        policies, _, outputs, _ = agent(obs)
        logprobs = agent.log_prob(policies, actions) + 0.3 * torch.randn(BATCH, generator=generator)
    advantages, returns = torch.randn(2, BATCH, generator=generator)
    old = outputs[-1] + 0.1
    return dict(obs=obs, actions=actions, logprobs=logprobs, advantages=advantages, returns=returns, old_preactivations=old)


@pytest.mark.parametrize("policy_std", ["state", "free"])
def test_tanh_normal_log_prob_is_that_of_torch_distributions(policy_std):
    agent = make_agent(policy_std=policy_std).double()
    policy = agent(torch.randn(BATCH, OBS_DIM).double())[0]
    u = torch.randn(BATCH, ACTION_DIM).double()
    transform = torch.distributions.TanhTransform(cache_size=1)
    distribution = torch.distributions.TransformedDistribution(torch.distributions.Normal(*agent.normal(policy)), [transform])
    expected = distribution.log_prob(transform(u)).sum(-1)
    torch.testing.assert_close(agent.log_prob(policy, u), expected)


def test_log_prob_stays_exact_where_tanh_saturates():
    agent = make_agent().double()
    policy = agent(torch.randn(1, OBS_DIM).double())[0]
    for u in (15.0, -15.0, 50.0):
        actions = torch.full((1, ACTION_DIM), u, dtype=torch.float64)
        loc, scale = agent.normal(policy)
        normal = torch.distributions.Normal(loc, scale).log_prob(actions)
        slope = math.log(4) - 2 * abs(u)  # log(1 - tanh^2) for large |u|
        torch.testing.assert_close(agent.log_prob(policy, actions), (normal - slope).sum(-1))


def test_gaussian_log_prob_entropy_and_kl_are_those_of_torch_distributions():
    agent = make_agent(policy="gaussian").double()
    policy, other = (agent(torch.randn(BATCH, OBS_DIM).double())[0] for _ in range(2))
    distribution, other_distribution = (torch.distributions.Normal(*agent.normal(x)) for x in (policy, other))
    u = torch.randn(BATCH, ACTION_DIM).double()
    torch.testing.assert_close(agent.log_prob(policy, u), distribution.log_prob(u).sum(-1))
    torch.testing.assert_close(agent.entropy(policy, u), distribution.entropy().sum(-1))
    torch.testing.assert_close(
        agent.kl(policy, other), torch.distributions.kl_divergence(distribution, other_distribution).sum(-1)
    )


def test_tanh_normal_entropy_is_the_mean_of_minus_log_prob():
    agent = make_agent().double()
    policy = agent(torch.randn(1, OBS_DIM).double())[0].expand(200_000, -1)
    loc, scale = agent.normal(policy)
    u = loc + scale * torch.randn_like(loc)
    expected = -agent.log_prob(policy, u).mean()
    torch.testing.assert_close(agent.entropy(policy, u).mean(), expected, atol=0.02, rtol=0)
    torch.testing.assert_close(agent.entropy(policy).mean(), expected, atol=0.02, rtol=0)


def test_the_scale_is_1_at_output_0_and_never_below_001():
    agent = make_agent()
    loc, scale = agent.normal(torch.tensor([[2.0, -3.0, 0.0, 0.0, -100.0, 5.0]]))
    assert loc.tolist() == [[2.0, -3.0, 0.0]]
    assert scale[0, 0].item() == pytest.approx(1.0)
    assert scale[0, 1].item() == pytest.approx(0.01)


def test_policy_variance_is_over_states():
    agent = make_agent()
    policy = agent(torch.randn(BATCH, OBS_DIM))[0]
    expected = torch.cat(agent.normal(policy), -1).var(0).mean()
    torch.testing.assert_close(agent.variance(policy), expected)
    assert agent.variance(policy[:1].expand(BATCH, -1)).item() == 0


@pytest.mark.parametrize("flags", [{}, {"activation": "relu"}, {"policy_std": "free"}, {"action_logprob": "sampled"}])
def test_the_numpy_actor_samples_the_torch_policy(flags):
    agent = make_agent(**flags)
    obs, noise = torch.randn(5, OBS_DIM), torch.randn(5, ACTION_DIM) * 3
    with torch.no_grad():
        loc, scale = agent.normal(agent(obs)[0])
    expected = (loc + scale * noise).clamp(-agent.max_action, agent.max_action)
    torch.testing.assert_close(torch.from_numpy(agent.numpy_actor()(obs.numpy(), noise.numpy())), expected)


def test_clamped_actions_are_scored_within_1e_6_of_the_bounds():
    noise = torch.full((2, ACTION_DIM), 1e4).numpy()
    clamped = make_agent(action_logprob="clamped").numpy_actor()(torch.zeros(2, OBS_DIM).numpy(), noise)
    assert math.tanh(clamped[0, 0]) == pytest.approx(1 - 1e-6, abs=1e-9)
    sampled = make_agent(action_logprob="sampled").numpy_actor()(torch.zeros(2, OBS_DIM).numpy(), noise)
    assert (sampled > 1000).all()


def plain_ppo_loss(agent, obs, actions, logprobs, advantages, returns, **_):
    """PPO-Clip and nothing else."""
    policy, values, *_ = agent(obs)
    ratio = (agent.log_prob(policy, actions) - logprobs).exp()
    policy_loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    return policy_loss + 0.5 * (values - returns).square().mean()


def test_all_interventions_off_is_plain_ppo_bit_for_bit():
    args = script.Args()
    agent, plain = make_agent(), make_agent()
    (optimizer, vector), (plain_optimizer, plain_vector) = (script.make_optimizer(x, args) for x in (agent, plain))
    for step in range(20):
        minibatch = make_minibatch(agent, seed=step)
        vector.grad, *_ = script.ppo_gradient(agent, args, **minibatch)
        optimizer.step()
        plain_vector.grad, _ = script.clipped_gradient(plain, plain_ppo_loss(plain, **minibatch), 0.5)
        plain_optimizer.step()
        assert torch.equal(vector, plain_vector)


@pytest.mark.parametrize("share_trunk", [False, True])
def test_the_update_is_the_textbook_one(share_trunk):
    """backward, clip_grad_norm_ per network and Adam over separate tensors give the same weights up to rounding."""
    args = script.Args(share_trunk=share_trunk)
    agent, plain = make_agent(share_trunk=share_trunk), make_agent(share_trunk=share_trunk)
    optimizer, vector = script.make_optimizer(agent, args)
    plain_optimizer = torch.optim.Adam(plain.parameters(), lr=3e-4, eps=1e-8)
    actor, critic = (
        [p for name, p in plain.named_parameters() if name.startswith(network)] for network in ("actor", "critic")
    )
    for step in range(20):
        minibatch = make_minibatch(agent, seed=step)
        vector.grad, logged, *_ = script.ppo_gradient(agent, args, **minibatch)
        optimizer.step()
        plain_optimizer.zero_grad()
        plain_ppo_loss(plain, **minibatch).backward()
        if share_trunk:
            norms = [nn.utils.clip_grad_norm_(plain.parameters(), 0.5)] * 2
        else:
            norms = [nn.utils.clip_grad_norm_(actor, 0.5), nn.utils.clip_grad_norm_(critic, 0.5)]
        plain_optimizer.step()
        torch.testing.assert_close(logged[3:], torch.stack(norms))
        for p, q in zip(agent.parameters(), plain.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def loss_gradient(agent, loss):
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, list(agent.parameters()), allow_unused=True) if g is not None]
    )


@pytest.mark.parametrize("layers", ["last", "all"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_pfo_adds_its_coefficient_times_the_squared_drift(layers, reduction):
    agent = make_agent().double()
    minibatch = {name: x.double() for name, x in make_minibatch(make_agent()).items()}
    outputs = agent(minibatch["obs"])[2]
    held = outputs[-1] if layers == "last" else torch.cat(outputs, 1)
    old = held.detach() + torch.randn_like(held)
    minibatch["old_preactivations"] = old
    off = script.Args(pfo_layers=layers, pfo_reduction=reduction)
    on = script.Args(pfo_layers=layers, pfo_reduction=reduction, pfo_coef=3.0)
    without, logged_without, *_ = script.ppo_loss(agent, off, **minibatch)
    with_pfo, logged, *_ = script.ppo_loss(agent, on, **minibatch)
    drift = (held - old).square().sum(1).mean()
    if reduction == "mean":
        drift = drift / held.shape[1]
    torch.testing.assert_close(with_pfo - without, 3 * drift)
    torch.testing.assert_close(logged[2], drift.detach())
    torch.testing.assert_close(logged_without[2], drift.detach())  # logged when it is off, too
    trunk = list(agent.actor_trunk.parameters())
    for actual, expected in zip(torch.autograd.grad(with_pfo - without, trunk), torch.autograd.grad(3 * drift, trunk)):
        torch.testing.assert_close(actual, expected)


def test_a_coefficient_of_0_adds_no_infinite_term():
    agent = make_agent()
    minibatch = make_minibatch(agent)
    minibatch["old_preactivations"] = torch.full_like(minibatch["old_preactivations"], math.inf)
    gradient, *_ = script.ppo_gradient(agent, script.Args(), **minibatch)
    assert gradient.isfinite().all()


def test_entropy_bonus():
    agent, minibatch = make_agent(policy="gaussian"), make_minibatch(make_agent())
    without, *_ = script.ppo_loss(agent, script.Args(policy="gaussian"), **minibatch)
    with_bonus, *_ = script.ppo_loss(agent, script.Args(policy="gaussian", ent_coef=0.5), **minibatch)
    entropy = agent.entropy(agent(minibatch["obs"])[0]).mean()
    torch.testing.assert_close(without - with_bonus, 0.5 * entropy)


def test_clipping_stops_the_gradient_beyond_the_limits():
    agent = make_agent()
    minibatch = make_minibatch(agent)
    with torch.no_grad():
        logprobs = agent.log_prob(agent(minibatch["obs"])[0], minibatch["actions"])
    for shift, advantage, flows in ((-1, 1, False), (-1, -1, True), (1, 1, True), (1, -1, False)):
        # shift -1: the new policy is e times as likely as the old one; with a positive advantage it is clipped
        minibatch |= {"logprobs": logprobs + shift, "advantages": torch.full((BATCH,), float(advantage))}
        loss, *_ = script.ppo_loss(agent, script.Args(vf_coef=0.0), **minibatch)
        assert (loss_gradient(agent, loss).abs().max() > 0) == flows


def test_overflowing_ratios_give_a_finite_gradient():
    agent = make_agent()
    for shift in (1e4, -1e4):
        minibatch = make_minibatch(agent)
        minibatch["logprobs"] = minibatch["logprobs"] + shift
        gradient, losses, *_ = script.ppo_gradient(agent, script.Args(), **minibatch)
        assert gradient.isfinite().all() and losses.isfinite().all()


def test_a_shared_trunk_is_one_trunk_with_both_losses_and_one_clip():
    agent = make_agent(share_trunk=True)
    assert agent.critic_trunk is agent.actor_trunk and len(agent.groups) == 1
    assert sum(p.numel() for p in agent.groups[0]) == sum(p.numel() for p in agent.parameters())
    policy, values, actor_outputs, critic_outputs = agent(torch.randn(BATCH, OBS_DIM))
    assert actor_outputs[-1] is critic_outputs[-1]
    for loss in (policy.sum(), values.sum()):
        assert torch.autograd.grad(loss, agent.actor_trunk[0].weight, retain_graph=True)[0].abs().max() > 0
    separate = make_agent()
    policy, values, *_ = separate(torch.randn(BATCH, OBS_DIM))
    assert torch.autograd.grad(values.sum(), separate.actor_trunk[0].weight, allow_unused=True)[0] is None


def test_resetting_adam_makes_the_next_step_a_first_step():
    args = script.Args()
    agent = make_agent()
    optimizer, vector = script.make_optimizer(agent, args)
    for _ in range(5):
        vector.grad = torch.randn_like(vector)
        optimizer.step()
    optimizer.state.clear()
    before, vector.grad = vector.detach().clone(), torch.randn_like(vector)
    optimizer.step()
    # Adam's first step is lr * sign(gradient)
    torch.testing.assert_close(vector.detach() - before, -3e-4 * vector.grad.sign(), rtol=1e-3, atol=1e-7)


def test_the_agent_computes_with_views_of_the_optimizers_vector():
    agent, args = make_agent(), script.Args()
    copied = copy.deepcopy(agent)
    _, vector = script.make_optimizer(agent, args)
    obs = torch.randn(BATCH, OBS_DIM)
    assert torch.equal(agent(obs)[0], copied(obs)[0])  # the values stay
    with torch.no_grad():
        vector.zero_()
    assert agent(obs)[0].abs().max() == 0
    agent.load_state_dict(copied.state_dict())
    assert vector.abs().max() > 0


def test_minibatches_are_a_permutation_with_normalised_advantages():
    num_samples, size = 103, 20
    x = torch.arange(num_samples).float()
    batch = {"obs": x[:, None].expand(-1, 4), "advantages": x**2}
    seen = []
    minibatches = list(script.shuffled_minibatches(batch, size))
    assert len(minibatches) == 5  # 3 samples are dropped
    for minibatch in minibatches:
        rows = minibatch["obs"][:, 0]
        seen += rows.tolist()
        expected = (rows**2 - (rows**2).mean()) / (rows**2).std(correction=0)
        torch.testing.assert_close(minibatch["advantages"], expected)
    assert len(set(seen)) == 100 and seen != sorted(seen)
    constant = {"obs": x[:, None], "advantages": torch.full((num_samples,), 7.0)}
    assert all(minibatch["advantages"].abs().max() == 0 for minibatch in script.shuffled_minibatches(constant, size))


def test_evaluate_in_chunks_is_the_forward():
    agent = make_agent()
    obs = torch.randn(2500, OBS_DIM)
    policy, values, outputs, critic_outputs = agent(obs)
    for layers, held in (("last", outputs[-1]), ("all", torch.cat(outputs, 1))):
        for actual, expected in zip(
            script.evaluate(agent, obs, layers), (policy, values, held, outputs[-1], critic_outputs[-1])
        ):
            torch.testing.assert_close(actual, expected)
    assert torch.cat(outputs, 1).shape[1] == 128


def test_target_fitting_reduces_the_loss_and_touches_nothing():
    args = script.Args(capacity_epochs=4)
    agent, target = make_agent(), script.Agent(ENVS, args)
    states = torch.randn(1000, OBS_DIM)
    data = script.capacity_target(target, states, torch.arange(1000))
    weights, state = copy.deepcopy(agent.state_dict()), torch.get_rng_state()
    fitted = script.capacity_loss(agent, args, *data)
    unfitted = script.capacity_loss(agent, script.Args(capacity_epochs=4, learning_rate=1e-12), *data)
    assert all(torch.equal(weights[name], p) for name, p in agent.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    policies, values, *_ = agent(states)
    assert unfitted["actor"] == pytest.approx(agent.kl(data[2], policies).mean().item(), rel=1e-4)
    assert unfitted["critic"] == pytest.approx((values - data[3]).square().mean().item(), rel=1e-4)
    assert fitted["actor"] < unfitted["actor"] / 5 and fitted["critic"] < unfitted["critic"] / 5
    assert fitted == script.capacity_loss(agent, args, *data)
    # an agent that is the target has nothing to fit
    assert script.capacity_loss(target, script.Args(learning_rate=1e-12), *data)["actor"] == pytest.approx(0, abs=1e-6)

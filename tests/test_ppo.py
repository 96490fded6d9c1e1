"""Policies, losses and interventions."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

import ppo_mujoco as script

OBS_DIM, ACTION_DIM, BATCH = 7, 3, 32
BOUNDS = np.ones(ACTION_DIM, np.float32)
ENVS = SimpleNamespace(obs_dim=OBS_DIM, action_dim=ACTION_DIM, low=-BOUNDS, high=BOUNDS)


def make_agent(**flags):
    torch.manual_seed(0)
    return script.Agent(ENVS, script.Args(**flags))


def make_minibatch(agent, seed=0):
    """A minibatch as `ppo_gradient` takes it, with ratios away from 1."""
    generator = torch.Generator().manual_seed(seed)
    obs = torch.randn(BATCH, OBS_DIM, generator=generator)
    actions = torch.randn(BATCH, ACTION_DIM, generator=generator)
    with torch.no_grad():
        outputs = agent(obs)
        logprobs = agent.log_prob(outputs.policy, actions)
        logprobs += 0.3 * torch.randn(BATCH, generator=generator)
    advantages, returns = torch.randn(2, BATCH, generator=generator)
    minibatch = dict(obs=obs, actions=actions, logprobs=logprobs, advantages=advantages)
    return minibatch | dict(returns=returns, old_held=outputs.held + 0.1)


def gradient(agent, minibatch, **flags):
    """The unclipped gradient, (P,), and the scalars."""
    args = script.Args(**{"max_grad_norm": 1e6, **flags})
    return script.ppo_gradient(agent, args, **minibatch)[:2]


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("policy_std", ["state", "free"])
def test_tanh_normal_log_prob_is_that_of_torch_distributions(policy_std):
    agent = make_agent(policy_std=policy_std).double()
    policy = agent(torch.randn(BATCH, OBS_DIM).double())[0]
    u = torch.randn(BATCH, ACTION_DIM).double()
    transform = torch.distributions.TanhTransform(cache_size=1)
    distribution = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(*agent.normal(policy)), [transform]
    )
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
    distribution, other_distribution = (
        torch.distributions.Normal(*agent.normal(x)) for x in (policy, other)
    )
    u = torch.randn(BATCH, ACTION_DIM).double()
    torch.testing.assert_close(agent.log_prob(policy, u), distribution.log_prob(u).sum(-1))
    torch.testing.assert_close(agent.entropy(policy), distribution.entropy().sum(-1))
    torch.testing.assert_close(
        agent.kl(policy, other),
        torch.distributions.kl_divergence(distribution, other_distribution).sum(-1),
    )


def test_tanh_normal_entropy_is_the_mean_of_minus_log_prob():
    agent = make_agent().double()
    policy = agent(torch.randn(1, OBS_DIM).double()).policy.expand(200_000, -1)
    loc, scale = agent.normal(policy)
    u = loc + scale * torch.randn_like(loc)
    expected = -agent.log_prob(policy, u).mean()
    torch.testing.assert_close(agent.entropy(policy).mean(), expected, atol=0.02, rtol=0)


def test_the_scale_is_1_at_output_0_and_never_below_001():
    agent = make_agent()
    loc, scale = agent.normal(torch.tensor([[2.0, -3.0, 0.0, 0.0, -100.0, 5.0]]))
    assert loc.tolist() == [[2.0, -3.0, 0.0]]
    assert scale[0, 0].item() == pytest.approx(1.0)
    assert scale[0, 1].item() == pytest.approx(0.01)


def test_policy_variance_is_over_states():
    agent = make_agent()
    policy, u = agent(torch.randn(BATCH, OBS_DIM)).policy, torch.zeros(BATCH, ACTION_DIM)
    expected = torch.cat(agent.normal(policy), -1).var(0).mean()
    torch.testing.assert_close(agent.policy_stats(policy, u)["variance"], expected)
    same = policy[:1].expand(BATCH, -1)
    assert agent.policy_stats(same, u)["variance"].item() == 0


@pytest.mark.parametrize(
    "flags",
    [{}, {"activation": "relu"}, {"policy_std": "free"}, {"policy": "gaussian"}, {"width": 7}],
)
def test_the_numpy_actor_samples_the_torch_policy(flags):
    agent = make_agent(action_logprob="sampled", **flags)
    obs, noise = torch.randn(5, OBS_DIM), torch.randn(5, ACTION_DIM) * 3
    with torch.no_grad():
        loc, scale = agent.normal(agent(obs).policy)
    actions = torch.from_numpy(agent.numpy_actor()(obs.numpy(), noise.numpy()))
    torch.testing.assert_close(actions, loc + scale * noise)


@pytest.mark.parametrize("kind", ["LayerNorm", "GELU", "no bias", "Dropout"])
def test_the_numpy_actor_follows_the_layers(kind):
    """What it does not know goes through torch."""
    agent = make_agent(action_logprob="sampled")
    linear = nn.Linear(64, 64, bias=False)
    layers = {"LayerNorm": nn.LayerNorm(64), "GELU": nn.GELU(), "no bias": linear}
    layer = layers.get(kind) or nn.Dropout(0.0)
    agent.actor_trunk = nn.Sequential(*agent.actor_trunk, layer, nn.Softplus())
    obs, noise = torch.randn(5, OBS_DIM), torch.randn(5, ACTION_DIM)
    with torch.no_grad():
        loc, scale = agent.normal(agent(obs).policy)
    actions = torch.from_numpy(agent.numpy_actor()(obs.numpy(), noise.numpy()))
    torch.testing.assert_close(actions, loc + scale * noise)


def test_preactivations_are_what_stands_before_each_activation_and_the_end():
    agent = make_agent()
    trunk = nn.Sequential(
        *(nn.Linear(OBS_DIM, 64), nn.LayerNorm(64), agent.activation),
        *(nn.Linear(64, 64), agent.activation, nn.Linear(64, 64), nn.LayerNorm(64)),
    )
    x = torch.randn(BATCH, OBS_DIM)
    outputs = agent.preactivations(trunk, x)
    expected = [trunk[:2](x), trunk[:4](x), trunk(x)]
    assert len(outputs) == 3
    for ours, theirs in zip(outputs, expected):
        assert torch.equal(ours, theirs)


def test_a_parameter_in_no_group_is_an_error():
    """Each is clipped and stepped in exactly one."""

    class Careless(script.Agent):
        def named_parameters(self, *args, **kwargs):
            yield from super().named_parameters(*args, **kwargs)
            yield "encoder.weight", nn.Parameter(torch.zeros(3))

    with pytest.raises(AssertionError, match="actor_"):
        Careless(ENVS, script.Args())
    for flags in ({}, {"share_trunk": True}, {"policy_std": "free"}):
        agent = make_agent(**flags)
        grouped = [id(p) for group in agent.groups for p in group]
        assert sorted(grouped) == sorted(id(p) for p in agent.parameters())


def plain_ppo_loss(agent, obs, actions, logprobs, advantages, returns, **_):
    """PPO-Clip and nothing else."""
    policy, values, *_ = agent(obs)
    ratio = (agent.log_prob(policy, actions) - logprobs).exp()
    policy_loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    return policy_loss + 0.5 * (values - returns).square().mean()


def test_all_interventions_off_is_plain_ppo_bit_for_bit():
    args = script.Args()
    agent, plain = make_agent(), make_agent()
    (optimizer, vector), (plain_optimizer, plain_vector) = (
        script.make_optimizer(x, args) for x in (agent, plain)
    )
    for step in range(20):
        minibatch = make_minibatch(agent, seed=step)
        vector.grad, *_ = script.ppo_gradient(agent, args, **minibatch)
        optimizer.step()
        plain_vector.grad, _ = script.clipped_gradient(
            plain, plain_ppo_loss(plain, **minibatch), 0.5
        )
        plain_optimizer.step()
        assert torch.equal(vector, plain_vector)


@pytest.mark.parametrize("share_trunk", [False, True])
def test_the_update_is_the_textbook_one(share_trunk):
    """backward, clip_grad_norm_ per network and Adam over separate tensors give the same weights up
    to rounding."""
    args = script.Args(share_trunk=share_trunk)
    agent, plain = make_agent(share_trunk=share_trunk), make_agent(share_trunk=share_trunk)
    optimizer, vector = script.make_optimizer(agent, args)
    plain_optimizer = torch.optim.Adam(plain.parameters(), lr=3e-4, eps=1e-8)
    named = list(plain.named_parameters())
    actor, critic = ([p for x, p in named if x.startswith(name)] for name in ("actor", "critic"))
    for step in range(20):
        minibatch = make_minibatch(agent, seed=step)
        vector.grad, logged, _ = script.ppo_gradient(agent, args, **minibatch)
        optimizer.step()
        plain_optimizer.zero_grad()
        plain_ppo_loss(plain, **minibatch).backward()
        if share_trunk:
            norms = [nn.utils.clip_grad_norm_(plain.parameters(), 0.5)] * 2
        else:
            norms = [nn.utils.clip_grad_norm_(part, 0.5) for part in (actor, critic)]
        plain_optimizer.step()
        torch.testing.assert_close(logged["actor_grad_norm"], norms[0])
        torch.testing.assert_close(logged["critic_grad_norm"], norms[1])
        for p, q in zip(agent.parameters(), plain.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layers", ["last", "all"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_pfo_adds_its_coefficient_times_the_squared_drift(layers, reduction):
    flags = {"pfo_layers": layers, "pfo_reduction": reduction}
    agent = make_agent(**flags).double()
    minibatch = {name: x.double() for name, x in make_minibatch(make_agent(**flags)).items()}
    held = agent(minibatch["obs"]).held
    assert held.shape[1] == (64 if layers == "last" else 128)
    minibatch["old_held"] = held.detach() + torch.randn_like(held)
    without, logged_without = gradient(agent, minibatch, **flags)
    with_pfo, logged = gradient(agent, minibatch, pfo_coef=3.0, **flags)
    drift = (held - minibatch["old_held"]).square().sum(1).mean()
    if reduction == "mean":
        drift = drift / held.shape[1]
    torch.testing.assert_close(logged["pfo_loss"], drift.detach())
    torch.testing.assert_close(logged_without["pfo_loss"], drift.detach())  # also when it is off
    trunk = list(agent.actor_trunk.parameters())
    expected = torch.zeros_like(without)
    expected[: sum(p.numel() for p in trunk)] = flat(torch.autograd.grad(3 * drift, trunk))
    torch.testing.assert_close(with_pfo - without, expected, atol=1e-9, rtol=1e-6)


def test_a_coefficient_of_0_adds_no_infinite_term():
    agent = make_agent()
    minibatch = make_minibatch(agent)
    minibatch["old_held"] = torch.full_like(minibatch["old_held"], math.inf)
    direction, logged = gradient(agent, minibatch)
    assert direction.isfinite().all() and logged["pfo_loss"] == math.inf


@pytest.mark.parametrize("policy", ["gaussian", "tanh_normal"])
def test_entropy_bonus(policy):
    agent = make_agent(policy=policy).double()
    minibatch = {name: x.double() for name, x in make_minibatch(make_agent()).items()}
    without, _ = gradient(agent, minibatch, policy=policy)
    with_bonus, _ = gradient(agent, minibatch, policy=policy, ent_coef=0.5)
    entropy = agent.entropy(agent(minibatch["obs"]).policy).mean()
    actor = flat(torch.autograd.grad(entropy, agent.groups[0]))
    torch.testing.assert_close((without - with_bonus)[: len(actor)], 0.5 * actor)
    assert torch.equal(without[len(actor) :], with_bonus[len(actor) :])


def test_clipping_stops_the_gradient_beyond_the_limits():
    agent = make_agent()
    minibatch = make_minibatch(agent)
    with torch.no_grad():
        logprobs = agent.log_prob(agent(minibatch["obs"]).policy, minibatch["actions"])
    for shift, advantage, flows in ((-1, 1, False), (-1, -1, True), (1, 1, True), (1, -1, False)):
        # shift -1: the new policy is e times as likely as the old one; with a positive advantage
        # it is clipped
        advantages = torch.full((BATCH,), float(advantage))
        minibatch |= {"logprobs": logprobs + shift, "advantages": advantages}
        direction, _ = gradient(agent, minibatch, vf_coef=0.0)
        assert (direction.abs().max() > 0) == flows


def test_what_is_logged_of_a_minibatch():
    agent, minibatch = make_agent(), make_minibatch(make_agent())
    _, logged = gradient(agent, minibatch)
    advantages = minibatch["advantages"]
    with torch.no_grad():
        new = agent(minibatch["obs"])
        logratio = agent.log_prob(new.policy, minibatch["actions"]) - minibatch["logprobs"]
    ratio = logratio.exp()
    objective = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    expected = {
        "policy_loss": -objective.mean(),
        "value_loss": 0.5 * (new.values - minibatch["returns"]).square().mean(),
        "approx_kl": (ratio - 1 - logratio).mean(),
        "old_approx_kl": -logratio.mean(),
        "clipfrac": ((ratio - 1).abs() > 0.2).float().mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(logged[name].mean(), value)
    assert 0 < logged["clipfrac"].mean() < 1
    assert logged.keys() == expected.keys() | {"pfo_loss", "actor_grad_norm", "critic_grad_norm"}


def test_overflowing_ratios_give_a_finite_gradient():
    agent = make_agent()
    for shift in (1e4, -1e4):
        minibatch = make_minibatch(agent)
        minibatch["logprobs"] = minibatch["logprobs"] + shift
        direction, logged, _ = script.ppo_gradient(agent, script.Args(), **minibatch)
        assert direction.isfinite().all()
        assert logged["policy_loss"].isfinite() and logged["actor_grad_norm"].isfinite()


def test_a_shared_trunk_is_one_trunk_with_both_losses_and_one_clip():
    agent = make_agent(share_trunk=True)
    assert agent.critic_trunk is agent.actor_trunk and len(agent.groups) == 1
    assert sum(p.numel() for p in agent.groups[0]) == sum(p.numel() for p in agent.parameters())
    outputs, weight = agent(torch.randn(BATCH, OBS_DIM)), agent.actor_trunk[0].weight
    assert outputs.actor_preactivations is outputs.critic_preactivations
    for loss in (outputs.policy.sum(), outputs.values.sum()):
        assert torch.autograd.grad(loss, weight, retain_graph=True)[0].abs().max() > 0
    separate = make_agent()
    values, weight = separate(torch.randn(BATCH, OBS_DIM)).values, separate.actor_trunk[0].weight
    assert torch.autograd.grad(values.sum(), weight, allow_unused=True)[0] is None


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
    torch.testing.assert_close(
        vector.detach() - before, -3e-4 * vector.grad.sign(), rtol=1e-3, atol=1e-7
    )


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
    assert all(
        minibatch["advantages"].abs().max() == 0
        for minibatch in script.shuffled_minibatches(constant, size)
    )


def test_evaluate_in_chunks_is_the_forward():
    for layers in ("last", "all"):
        agent = make_agent(pfo_layers=layers)
        obs = torch.randn(2500, OBS_DIM)
        outputs, expected = script.evaluate(agent, obs), agent(obs)
        for name in expected._fields:
            torch.testing.assert_close(getattr(outputs, name), getattr(expected, name))
        assert not outputs.policy.requires_grad


def test_target_fitting_reduces_the_loss_and_touches_nothing():
    args = script.Args(capacity_epochs=4)
    agent, target = make_agent(), script.Agent(ENVS, args)
    states = torch.randn(1000, OBS_DIM)
    data = script.capacity_target(target, states, torch.arange(1000))
    weights, state = copy.deepcopy(agent.state_dict()), torch.get_rng_state()
    fitted = script.capacity_loss(agent, args, *data)
    unfitted = script.capacity_loss(
        agent, script.Args(capacity_epochs=4, learning_rate=1e-12), *data
    )
    assert all(torch.equal(weights[name], p) for name, p in agent.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    policies, values, *_ = agent(states)
    assert unfitted["actor"] == pytest.approx(agent.kl(data[2], policies).mean().item(), rel=1e-4)
    assert unfitted["critic"] == pytest.approx((values - data[3]).square().mean().item(), rel=1e-4)
    assert fitted["actor"] < unfitted["actor"] / 5 and fitted["critic"] < unfitted["critic"] / 5
    assert fitted == script.capacity_loss(agent, args, *data)
    # an agent that is the target has nothing to fit
    assert script.capacity_loss(target, script.Args(learning_rate=1e-12), *data)[
        "actor"
    ] == pytest.approx(0, abs=1e-6)

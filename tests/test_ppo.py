"""Policies, losses and interventions."""

import copy
import math

import conftest
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import read_scalars
from scipy import integrate

import ppo_atari
import ppo_mujoco as script
import ppo_toy

OBS_DIM, ACTION_DIM, BATCH = 7, 3, 32


def make_agent(action_dim=ACTION_DIM, **flags):
    return conftest.make_agent(OBS_DIM, action_dim, **flags)


def make_minibatch(agent, seed=0):
    """The arguments of `ppo_gradient`, with ratios away from 1 and normalised advantages."""
    generator = torch.Generator().manual_seed(seed)
    obs = torch.randn(BATCH, OBS_DIM, generator=generator)
    actions = torch.randn(BATCH, ACTION_DIM, generator=generator)
    with torch.no_grad():
        outputs = agent(obs)
        logprobs = agent.log_prob(outputs.policy, actions)
        logprobs += 0.3 * torch.randn(BATCH, generator=generator)
    advantages, returns = torch.randn(2, BATCH, generator=generator)
    minibatch = dict(obs=obs, actions=actions, logprobs=logprobs, advantages=advantages)
    old_pfo_preactivations = outputs.pfo_preactivations + 0.1
    return minibatch | dict(returns=returns, old_pfo_preactivations=old_pfo_preactivations)


def gradient(agent, minibatch, **flags):
    """The unclipped gradient of all parameters, (P,), and the scalars."""
    args = script.Args(**{"max_grad_norm": 1e6, **flags})
    gradients, losses, _ = script.ppo_gradient(agent, args, **minibatch)
    return torch.cat(gradients), losses


def normalised(advantages):
    std, mean = torch.std_mean(advantages, correction=0)
    return (advantages - mean) / std


def policy_of(agent, loc, scale):
    """The policy (1, 2) that has this loc and scale."""
    raw = scale - 0.01 + math.log1p(-math.exp(0.01 - scale)) - math.log(math.expm1(0.99))
    return torch.tensor([[loc, raw]], dtype=next(agent.parameters()).dtype)


def test_tanh_normal_log_prob_is_that_of_torch_distributions():
    """Also where tanh(u) rounds to 1."""
    agent = make_agent().double()
    policy = agent(torch.randn(BATCH, OBS_DIM).double()).policy
    u = torch.randn(BATCH, ACTION_DIM).double()
    u[:3] = torch.tensor([[15.0], [-15.0], [50.0]])
    transform = torch.distributions.TanhTransform(cache_size=1)
    normal = torch.distributions.Normal(*agent.normal(policy))
    distribution = torch.distributions.TransformedDistribution(normal, [transform])
    expected = distribution.log_prob(transform(u)).sum(-1)
    torch.testing.assert_close(agent.log_prob(policy, u), expected)


def test_gaussian_log_prob_entropy_and_kl_are_those_of_torch_distributions():
    agent = make_agent(policy="gaussian").double()
    policies = [agent(torch.randn(BATCH, OBS_DIM).double()).policy for _ in range(2)]
    ours, other = (torch.distributions.Normal(*agent.normal(x)) for x in policies)
    u = torch.randn(BATCH, ACTION_DIM).double()
    torch.testing.assert_close(agent.log_prob(policies[0], u), ours.log_prob(u).sum(-1))
    torch.testing.assert_close(agent.entropy(policies[0]), ours.entropy().sum(-1))
    kl = torch.distributions.kl_divergence(ours, other).sum(-1)
    torch.testing.assert_close(agent.kl(*policies), kl)


# loc, scale, and where it was computed by others, the entropy
ENTROPIES = [(0, 1, 0.670), (3, 2, -2.850), (8, 0.5, -13.888), (20, 1, -37.195), (0, 5, -3.694)]
ENTROPIES += [(0, 10, -10.915), (0, 100, -152.17), (8, 30, -43.38), (8, 5, None), (-20, 5, None)]
ENTROPIES += [(-3, 0.2, None), (1, 0.02, None), (0, 1.49, None), (0, 1.51, None), (-3, 1e3, None)]


@pytest.mark.parametrize("loc, scale, entropy", ENTROPIES)
def test_the_entropy_of_tanh_normal_and_its_gradient_are_exact(loc, scale, entropy):
    """By numerical integration; for a wide Normal too. No random number takes part in it."""
    points = [(k - loc) / scale for k in (-20, -5, -1, 0, 1, 5, 20)]
    points = [point for point in points if abs(point) < 12]

    def mean(f):  # of f(z, u), u = loc + scale z
        weighted = lambda z: math.exp(-z * z / 2) * f(z, loc + scale * z)  # noqa: E731
        integral, _ = integrate.quad(weighted, -12, 12, points=points or None, limit=400)
        return integral / math.sqrt(2 * math.pi)

    slope = mean(lambda z, u: 2 * (math.log(2) - u - np.logaddexp(0, -2 * u)))
    exact = math.log(scale) + (math.log(2 * math.pi) + 1) / 2 + slope
    d_loc, d_scale = mean(lambda z, u: -2 * math.tanh(u)), mean(lambda z, u: -2 * z * math.tanh(u))
    assert entropy is None or exact == pytest.approx(entropy, abs=0.006)
    agent, state = make_agent(), torch.get_rng_state()
    policy = policy_of(agent, loc, scale).requires_grad_()
    ours = agent.entropy(policy)
    assert torch.equal(state, torch.get_rng_state())
    assert ours.item() == pytest.approx(exact, rel=1e-5, abs=1e-5)
    by_loc, by_raw = torch.autograd.grad(ours.sum(), policy)[0][0].tolist()
    d_raw = 1 - math.exp(-(scale - 0.01))  # softplus' slope
    assert by_loc == pytest.approx(d_loc, rel=1e-5, abs=1e-5)
    assert by_raw == pytest.approx((1 / scale + d_scale) * d_raw, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("difference", [1e-5, -1e-5, 1e-3])
def test_the_kl_of_near_normals(difference):
    agent = make_agent()
    policy, other = torch.zeros(1, 2), policy_of(agent, 0.0, 1 + difference)
    scales = [agent.normal(x.double())[1].item() for x in (policy, other)]
    d = math.log(scales[0] / scales[1])
    exact = (math.expm1(2 * d) - 2 * d) / 2
    assert exact == pytest.approx(difference**2, rel=0.01)
    assert agent.kl(policy, other).item() == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize("agent", [ppo_atari.Agent, ppo_toy.Agent])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_the_kl_of_near_categorical_policies(agent, size):
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).double()
    policy, other = logits.log_softmax(1), (logits + size * logits.flip(0)).log_softmax(1)
    exact = (policy.exp() * (policy - other)).sum(1).mean().item()
    ours = agent.kl(None, policy.float(), other.float()).mean().item()  # it reads nothing of None
    assert ours == pytest.approx(exact, rel=0.01)


# The loc, scale and sample u of a Normal; what TorchRL's TanhNormal at the commit that the authors'
# image pins (pytorch/rl 2cfd9b6c8d83, torch, float32) inverts the stored action to; its log_prob
TORCHRL = [
    (0.0, 1.0, 0.699999988079071, 0.699999988079071, -0.7093980312347412),
    (7.2, 0.0101, 7.2070698738098145, 7.21915340423584, 14.930136680603027),
    (8.0, 0.1, 8.069999694824219, 7.247732639312744, -13.80248737335205),
    (10.0, 0.1, 10.069999694824219, 7.247732639312744, -364.2559509277344),
    (6.5, 0.3, 6.559999942779541, 6.561992645263672, 12.001379013061523),
    (-7.25, 0.02, -7.260000228881836, -7.247732639312744, 16.0958309173584),
]


@pytest.mark.parametrize("loc, scale, u, scored, log_prob", TORCHRL)
def test_clamped_actions_are_scored_as_torchrl_scores_them(loc, scale, u, scored, log_prob):
    """The NumPy actor of a constant policy gives `scored`, whose log-probability is `log_prob`."""
    agent = make_agent(action_dim=1)
    policy = policy_of(agent, loc, scale)
    with torch.no_grad():
        agent.actor_head.weight.zero_()
        agent.actor_head.bias.copy_(policy[0])
    noise = np.array([[(u - loc) / scale]], np.float32)
    action = script.numpy_actor(agent)(np.zeros((1, OBS_DIM), np.float32), noise)
    # tanh near 1 has steps of 6e-8, which arctanh makes 0.03 at u = 7
    step = 2e-7 / (1 - math.tanh(scored) ** 2)
    assert action.dtype == np.float32
    assert action.item() == pytest.approx(scored, abs=step + 1e-6 * abs(scored))
    ours = agent.log_prob(policy, torch.tensor([[scored]])).item()
    assert ours == pytest.approx(log_prob, abs=5 * step + 1e-5 * abs(log_prob))
    if abs(scored) > 7.24:  # the clamp itself is one number
        assert abs(action.item()) == pytest.approx(7.247732639312744, abs=1e-6)


def test_the_share_of_saturated_actions():
    policy, actions = torch.zeros(3, 4), torch.tensor([[0.0, 8.0], [-9.0, 1.0], [7.0, -7.0]])
    clamp = 7.247732639312744
    for u, flags in (
        (actions.clamp(-clamp, clamp), {}),
        (actions, {"action_logprob": "sampled"}),  # where the clamp would act
        (actions / 7.5, {"policy": "gaussian"}),  # outside the bounds
    ):
        stats = make_agent(action_dim=2, **flags).policy_stats(policy, u)
        assert float(stats["saturated_actions"]) == pytest.approx(2 / 6)


def test_the_logged_entropy_is_that_of_the_new_policies(monkeypatch, run):
    """losses/entropy is the mean over the minibatches' new policies, also at a large step."""
    seen, real = [], script.ppo_gradient

    def recording(agent, args, **minibatch):
        seen.append(agent.entropy(agent(minibatch["obs"]).policy).mean().item())
        return real(agent, args, **minibatch)

    monkeypatch.setattr(script, "ppo_gradient", recording)
    run_dir = run("ppo_mujoco", "--learning-rate 0.01 --update-epochs 20 --capacity-interval 0")
    logged = [value for _, value in read_scalars(run_dir)["losses/entropy"]]
    expected = np.array(seen).reshape(len(logged), -1).mean(1)
    np.testing.assert_allclose(logged, expected, rtol=1e-4, atol=1e-4)


def test_the_scale_is_1_at_output_0_and_never_below_001():
    loc, scale = make_agent().normal(torch.tensor([[2.0, -3.0, 0.0, 0.0, -100.0, 5.0]]))
    assert loc.tolist() == [[2.0, -3.0, 0.0]]
    assert scale[0, :2].tolist() == pytest.approx([1.0, 0.01])


def test_policy_variance_is_over_states():
    agent = make_agent()
    policy, u = agent(torch.randn(BATCH, OBS_DIM)).policy, torch.zeros(BATCH, ACTION_DIM)
    expected = torch.cat(agent.normal(policy), -1).var(0).mean()
    torch.testing.assert_close(agent.policy_stats(policy, u)["variance"], expected)
    assert agent.policy_stats(policy[:1].expand(BATCH, -1), u)["variance"].item() == 0


def noisy_actions(agent):
    """Of the NumPy actor, and of torch's forward, some far beyond the clamp."""
    obs, noise = torch.randn(5, OBS_DIM), torch.randn(5, ACTION_DIM) * 30
    with torch.no_grad():
        loc, scale = agent.normal(agent(obs).policy)
    return script.numpy_actor(agent)(obs.numpy(), noise.numpy()), (loc + scale * noise).numpy()


@pytest.mark.parametrize("flags", [{}, {"activation": "relu"}, {"policy": "gaussian"}])
def test_the_numpy_actor_samples_the_torch_policy(flags):
    agent = make_agent(action_logprob="sampled", **flags)
    np.testing.assert_allclose(*noisy_actions(agent), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.LayerNorm(64), nn.Linear(64, 64, bias=False), nn.Dropout()])
def test_the_numpy_actor_follows_the_layers(layer):
    """It computes layers that it does not know with torch."""
    agent = make_agent(action_logprob="sampled")
    agent.actor_trunk = nn.Sequential(*agent.actor_trunk, layer, nn.Softplus())
    np.testing.assert_allclose(*noisy_actions(agent.eval()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.GELU()])
def test_preactivations_are_the_inputs_of_each_activation_and_the_output(activation):
    agent = make_agent()
    trunk = nn.Sequential(
        *(nn.Linear(OBS_DIM, 64), nn.LayerNorm(64), activation),
        *(nn.Linear(64, 64), activation, nn.Linear(64, 64), nn.LayerNorm(64)),
    )
    x = torch.randn(BATCH, OBS_DIM)
    ours = agent.preactivations(trunk, x)
    expected = [trunk[:2](x), trunk[:4](x), trunk(x)]
    assert len(ours) == 3 and all(map(torch.equal, ours, expected))


def test_each_parameter_is_in_one_group(monkeypatch):
    for agent in (make_agent(), make_agent(share_trunk=True)):
        grouped = [id(p) for group in agent.groups for p in group]
        assert sorted(grouped) == sorted(id(p) for p in agent.parameters())
    stray = [("encoder.bias", nn.Parameter(torch.zeros(3)))]
    named = script.Agent.named_parameters
    monkeypatch.setattr(script.Agent, "named_parameters", lambda agent: [*named(agent), *stray])
    with pytest.raises(AssertionError, match="actor_"):
        make_agent()


def plain_ppo_loss(agent, obs, actions, logprobs, advantages, returns, **_):
    """PPO-Clip and nothing else."""
    policy, values, *_ = agent(obs)
    advantages = normalised(advantages)
    ratio = (agent.log_prob(policy, actions) - logprobs).exp()
    policy_loss = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    return policy_loss + 0.5 * (values - returns).square().mean()


def test_all_interventions_off_is_plain_ppo_bit_for_bit():
    args, agents = script.Args(), (make_agent(), make_agent())
    ours, plain = (script.make_optimizer(agent, args) for agent in agents)
    for seed in range(20):
        minibatch = make_minibatch(agents[0], seed=seed)
        script.step(*ours, script.ppo_gradient(agents[0], args, **minibatch)[0])
        plain_loss = plain_ppo_loss(agents[1], **minibatch)
        script.step(*plain, script.clipped_gradient(agents[1], plain_loss, 0.5)[0])
        assert all(map(torch.equal, ours[1], plain[1]))


@pytest.mark.parametrize("share_trunk", [False, True])
def test_the_update_is_the_textbook_one(share_trunk):
    """backward, clip_grad_norm_ per network and Adam over separate tensors give the same weights up
    to rounding."""
    args = script.Args(share_trunk=share_trunk)
    agent, plain = make_agent(share_trunk=share_trunk), make_agent(share_trunk=share_trunk)
    optimizer, vectors = script.make_optimizer(agent, args)
    plain_optimizer = torch.optim.Adam(plain.parameters(), lr=3e-4, eps=1e-8)
    named = list(plain.named_parameters())
    parts = [[p for x, p in named if x.startswith(name)] for name in ("actor", "critic")]
    for seed in range(20):
        minibatch = make_minibatch(agent, seed=seed)
        gradients, logged, _ = script.ppo_gradient(agent, args, **minibatch)
        script.step(optimizer, vectors, gradients)
        plain_optimizer.zero_grad()
        plain_ppo_loss(plain, **minibatch).backward()
        clipped = [list(plain.parameters())] if share_trunk else parts
        norms = [nn.utils.clip_grad_norm_(part, 0.5) for part in clipped]
        plain_optimizer.step()
        torch.testing.assert_close(logged["actor_grad_norm"], norms[0])
        torch.testing.assert_close(logged["critic_grad_norm"], norms[-1])
        for p, q in zip(agent.parameters(), plain.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layers", ["last", "all"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_pfo_adds_its_coefficient_times_the_squared_drift(layers, reduction):
    flags = {"pfo_layers": layers, "pfo_reduction": reduction}
    agent = make_agent(**flags).double()
    minibatch = {name: x.double() for name, x in make_minibatch(make_agent(**flags)).items()}
    new = agent(minibatch["obs"]).pfo_preactivations
    assert new.shape[1] == (64 if layers == "last" else 128)
    minibatch["old_pfo_preactivations"] = new.detach() + torch.randn_like(new)
    without, logged_without = gradient(agent, minibatch, **flags)
    with_pfo, logged = gradient(agent, minibatch, pfo_coef=3.0, **flags)
    drift = (new - minibatch["old_pfo_preactivations"]).square().sum(1).mean()
    if reduction == "mean":
        drift = drift / new.shape[1]
    torch.testing.assert_close(logged["pfo_loss"], drift.detach())
    torch.testing.assert_close(logged_without["pfo_loss"], drift.detach())  # also when it is off
    trunk = list(agent.actor_trunk.parameters())
    expected = torch.zeros_like(without)
    drift_gradient = script.flat_vector(torch.autograd.grad(3 * drift, trunk))
    expected[: len(drift_gradient)] = drift_gradient
    torch.testing.assert_close(with_pfo - without, expected, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("policy", ["gaussian", "tanh_normal"])
def test_entropy_bonus(policy):
    agent, minibatch = make_agent(policy=policy), make_minibatch(make_agent())
    without, _ = gradient(agent, minibatch, policy=policy)
    with_bonus, _ = gradient(agent, minibatch, policy=policy, ent_coef=0.5)
    entropy = agent.entropy(agent(minibatch["obs"]).policy).mean()
    actor = script.flat_vector(torch.autograd.grad(entropy, agent.groups[0]))
    difference = (without - with_bonus)[: len(actor)]
    torch.testing.assert_close(difference, 0.5 * actor, rtol=1e-4, atol=1e-5)
    assert torch.equal(without[len(actor) :], with_bonus[len(actor) :])


def test_clipping_stops_the_gradient_beyond_the_limits():
    """Ratios are e or 1 / e. They have a gradient only if they moved against their advantage."""
    agent = make_agent()
    minibatch = make_minibatch(agent)
    with torch.no_grad():
        logprobs = agent.log_prob(agent(minibatch["obs"]).policy, minibatch["actions"])
    advantages = torch.tensor([1.0, -1.0]).repeat(BATCH // 2)
    for direction, flows in ((-1, False), (1, True)):  # the ratio is e^1 where it went along
        minibatch |= {"logprobs": logprobs + direction * advantages, "advantages": advantages}
        step, logged = gradient(agent, minibatch, vf_coef=0.0)
        assert (step.abs().max() > 0) == flows and logged["clipfrac"].mean() == 1


def test_what_is_logged_of_a_minibatch():
    agent, minibatch = make_agent(), make_minibatch(make_agent())
    _, logged = gradient(agent, minibatch)
    advantages = normalised(minibatch["advantages"])
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


def test_equal_advantages_give_no_direction():
    agent, minibatch = make_agent(), make_minibatch(make_agent())
    minibatch["advantages"] = torch.full((BATCH,), 7.0)
    assert gradient(agent, minibatch, vf_coef=0.0)[0].abs().max() == 0


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_overflowing_ratios_give_a_finite_gradient(shift):
    agent = make_agent()
    minibatch = make_minibatch(agent)
    minibatch["logprobs"] += shift
    minibatch["old_pfo_preactivations"].fill_(math.inf)  # a term of 0 times infinity would be NaN
    direction, logged = gradient(agent, minibatch)
    assert direction.isfinite().all() and logged["pfo_loss"] == math.inf
    assert logged["policy_loss"].isfinite() and logged["actor_grad_norm"].isfinite()


def test_a_shared_trunk_is_one_trunk_with_both_losses_and_one_clip():
    separate, agent = make_agent(), make_agent(share_trunk=True)
    assert separate.critic_trunk is not separate.actor_trunk
    assert agent.critic_trunk is agent.actor_trunk and len(agent.groups) == 1
    outputs, weight = agent(torch.randn(BATCH, OBS_DIM)), agent.actor_trunk[0].weight
    assert outputs.actor_preactivations is outputs.critic_preactivations
    for loss in (outputs.policy.sum(), outputs.values.sum()):
        assert torch.autograd.grad(loss, weight, retain_graph=True)[0].abs().max() > 0


def test_an_agent_that_is_cut_off_from_its_vectors_is_an_error(monkeypatch, run):
    """pytorch#2830: it would never learn again."""
    real = script.make_optimizer

    def make_optimizer(agent, args):
        optimizer, vectors = real(agent, args)
        agent.double().float()
        return optimizer, vectors

    monkeypatch.setattr(script, "make_optimizer", make_optimizer)
    with pytest.raises(AssertionError, match="make_optimizer"):
        run("ppo_mujoco", "--capacity-interval 0")


def test_minibatches_are_a_permutation():
    x = torch.arange(103).float()
    batch = {"obs": x[:, None].expand(-1, 4), "advantages": x**2}
    minibatches = list(script.minibatches(batch, 20))
    assert len(minibatches) == 5  # 3 samples are dropped
    rows = torch.cat([minibatch["obs"][:, 0] for minibatch in minibatches])
    assert torch.equal(torch.cat([x["advantages"] for x in minibatches]), rows**2)
    assert len(set(rows.tolist())) == 100 and rows.tolist() != sorted(rows.tolist())


def test_evaluate_in_chunks_is_the_forward():
    agent, obs = make_agent(), torch.randn(2500, OBS_DIM)
    outputs = script.evaluate(agent, obs)
    torch.testing.assert_close(tuple(outputs), tuple(x.detach() for x in agent(obs)))
    assert not outputs.policy.requires_grad


def test_the_capacity_fit_reduces_the_loss_and_touches_nothing():
    args, still = script.Args(), script.Args(learning_rate=1e-12)
    agent, target = make_agent(), make_agent()
    for p in target.parameters():
        p.data = torch.randn_like(p) / 8
    states = torch.randn(1000, OBS_DIM)
    data = script.capacity_target(target, states, torch.arange(1000))
    weights, state = copy.deepcopy(agent.state_dict()), torch.get_rng_state()
    fitted, unfitted = (script.capacity_loss(agent, x, *data) for x in (args, still))
    assert all(torch.equal(weights[name], p) for name, p in agent.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    policies, values, *_ = agent(states)
    assert unfitted["actor"] == pytest.approx(agent.kl(data[2], policies).mean().item(), rel=1e-4)
    assert unfitted["critic"] == pytest.approx((values - data[3]).square().mean().item(), rel=1e-4)
    assert fitted["actor"] < unfitted["actor"] / 5 and fitted["critic"] < unfitted["critic"] / 5
    assert fitted == script.capacity_loss(agent, args, *data)
    # an agent that is the target has nothing to fit
    assert script.capacity_loss(target, still, *data)["actor"] == pytest.approx(0, abs=1e-6)

"""The smallest places to see PPO's trust region break (arXiv 2405.00662).

    python ppo_toy.py                       # section 3.2.1, Figure 5: two states in one dimension
    python ppo_toy.py --states 16           # many states: the ratios against the features' rank
    python ppo_toy.py train                 # a complete PPO on CartPole-v1, with every diagnostic
    python ppo_toy.py train --pfo-coef 1    # the same with PFO, equation 2

The toy comes first, from `ToyArgs` to `toy`. Then comes the PPO of ppo_mujoco.py for discrete
actions, without observation statistics and time in the observation, and without `--resume`: a run
takes seconds to three minutes. A reader may stop at the end of `main`.
"""

import contextlib
import copy
import json
import math
import os
import re
import shutil
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# Types of flags with their least and greatest value
Fraction = Annotated[float, (0, 1)]
Decay = Annotated[float, (0, 1 - 1e-6)]
Coefficient = Annotated[float, (0, 1e6)]
Positive = Annotated[float, (1e-12, 1e6)]
Few = Annotated[int, (1, 4096)]
Count = Annotated[int, (1, 1_000_000)]
Steps = Annotated[int, (1, 10**12)]
Seed = Annotated[int, (0, 2**32 - 1)]


@dataclass
class ToyArgs:
    """The two-state toy of arXiv 2405.00662, section 3.2.1 (Figure 5); with --states its
    generalisation to many states and ranks. A complete PPO: python ppo_toy.py train --help."""

    # Both toys
    epochs: Annotated[int, (1, 1000)] = 10  # passes over the states, one state per step (Table 1)
    learning_rate: Coefficient = 0.0  # SGD's; 0: 1.5 (Table 1), with --states 0.05
    clip_coef: Positive = 0.1  # epsilon of PPO-Clip (Table 1)
    seed: Seed = 1  # of what is drawn; the repetitions of --num-seeds count up from it
    runs_dir: str = "runs"  # folder that holds the runs
    run_name: str = ""  # the run's folder within --runs-dir; empty: toy, script, seed and time

    # Two states, x and y, with features phi(x) and phi(y) = alpha phi(x)
    alpha: Annotated[tuple[float, ...], (-1000, 1000)] = (3.0, -1.0)  # phi(y) / phi(x)
    # theta_1 and theta_2 at the start, of the logits theta_i phi(s); not given: standard normal
    theta: Annotated[tuple[float, float] | None, (-1000, 1000)] = None
    phi: Annotated[float | None, (-1000, 1000)] = None  # phi(x); not given: standard normal

    # Many states
    states: Annotated[int, (0, 256)] = 0  # states of the generalised toy; 0: the two-state toy
    dim: Few = 16  # dimensions of its features
    actions: Annotated[int, (2, 256)] = 4  # actions of its policy
    # ranks that its features have in turn; not given: 1 to --dim
    features_rank: Annotated[tuple[int, ...], (1, 256)] = ()
    num_seeds: Annotated[int, (2, 10_000)] = 20  # repetitions that a row of its table averages over
    learn_features: bool = False  # learn its features too, without PFO and with it
    pfo_coef: Coefficient = 1.0  # of PFO, with --learn-features

    def __post_init__(self):
        check_ranges(self)
        self.learning_rate = self.learning_rate or (0.05 if self.states else 1.5)
        if not self.alpha:
            raise ValueError("--alpha needs at least one value")
        if (self.features_rank or self.learn_features) and not self.states:
            raise ValueError("--features-rank and --learn-features need --states, 16 for example")
        if self.states and self.states < self.dim:
            raise ValueError(f"--states {self.states} is less than --dim {self.dim}")
        if max(self.features_rank, default=1) > self.dim:
            raise ValueError(f"--features-rank {self.features_rank} is more than --dim {self.dim}")


@torch.no_grad()
def ratio_stats(logratio, clip_coef):
    """How far the probability ratios leave the clipping limits (section 3.2): a dict of floats.

    `logratio` is any shape of log pi_new(a|s) - log pi_old(a|s). `ratio_mean_above` and `_below`
    are means over the samples beyond the limits, NaN where there is none, `ratio_excess` their
    quotient, `frac_above` and `_below` the samples' shares. Means and extremes are clamped to
    [1e-12, 1e12] (appendix B.3), so that a diverged policy still gives a number."""
    ratio = logratio.double().exp()
    above, below = ratio > 1 + clip_coef, ratio < 1 - clip_coef
    stats = {"ratio_mean_above": ratio[above].mean(), "ratio_mean_below": ratio[below].mean()}
    stats |= {"ratio_max": ratio.max(), "ratio_min": ratio.min()}
    stats = {name: x.clamp(1e-12, 1e12).item() for name, x in stats.items()}
    stats["ratio_excess"] = stats["ratio_mean_above"] / stats["ratio_mean_below"]
    shares = {"frac_above": above.double().mean(), "frac_below": below.double().mean()}
    return stats | {name: x.item() for name, x in shares.items()}


def pfo_loss(preactivations, old_preactivations, reduction="mean"):
    """Proximal Feature Optimization (equation 2): mean squared change of (B, K), a scalar.
    The equation has a "sum" over K; the published coefficients belong to the "mean" over it."""
    value = (preactivations - old_preactivations).square().mean()
    return value if reduction == "mean" else value * preactivations.shape[1]


def simulate(inputs, trunk, head, actions, advantages, order, args, learn_trunk=False, pfo_coef=0):
    """PPO-Clip with SGD, one state per step, as in Appendix C.

    inputs (n, i), trunk (i, d), head (d, k): the features are inputs @ trunk, the logits features @
    head. State s has one sampled action `actions[s]` with `advantages[s]`; `order` (T,) is the
    state of each step. The head is learned, the trunk only with `learn_trunk`. Returns the ratios
    before each step and after the last (T + 1, n), and for each step whether its sample was
    clipped, so that it gave no gradient (T,)."""
    head = head.clone().requires_grad_()
    trunk = trunk.clone().requires_grad_(learn_trunk)
    optimizer = torch.optim.SGD([head, trunk] if learn_trunk else [head], args.learning_rate)
    states = torch.arange(len(inputs))
    ratios, clipped = [], []
    for step, s in enumerate(order):
        features = inputs @ trunk
        logprobs = (features @ head).log_softmax(-1)[states, actions]
        if step == 0:
            old_features, old_logprobs = features.detach(), logprobs.detach()
        ratio = (logprobs - old_logprobs).exp()
        clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        ratios.append(ratio.detach())
        clipped.append(bool(clipped_ratio[s] * advantages[s] < ratio[s] * advantages[s]))
        loss = -torch.min(ratio[s] * advantages[s], clipped_ratio[s] * advantages[s])
        if pfo_coef:
            loss = loss + pfo_coef * pfo_loss(features[s : s + 1], old_features[s : s + 1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        logprobs = (inputs @ trunk @ head).log_softmax(-1)[states, actions]
        ratios.append((logprobs - old_logprobs).exp())
    return torch.stack(ratios), clipped


def two_states(args, alpha, phi, theta):
    """Figure 5: states x and y with features phi and alpha phi, logits theta_i phi(s), action a1
    with advantage 1, x on even steps and y on odd ones. Returns what `simulate` returns."""
    features = torch.tensor([[phi], [alpha * phi]], dtype=torch.float64)
    trunk, head = torch.eye(1, dtype=torch.float64), torch.tensor([theta], dtype=torch.float64)
    return simulate(features, trunk, head, [0, 0], torch.ones(2), [0, 1] * args.epochs, args)


def figure_5(run, args):
    """The two-state toy: for each alpha curves, and a table with a line per step: whose sample,
    whether it was clipped, and what each ratio did."""
    generator = np.random.default_rng(args.seed)
    phi, theta = generator.normal(), generator.normal(size=2).tolist()
    phi, theta = phi if args.phi is None else args.phi, args.theta or theta
    for alpha in args.alpha:
        ratios, clipped = two_states(args, alpha, phi, theta)
        print(f"alpha = {alpha:g}: ratios pi(a1|s) / pi_old(a1|s) of x and y")
        print(" step  sample            x         y    moved")
        for step, (then, now) in enumerate(zip(ratios, ratios[1:])):
            sample, other = "xy" if step % 2 == 0 else "yx"
            moves = [f"{s} {b - a:+.4f}" for s, a, b in zip("xy", then, now) if a != b]
            moved, clip, why = "  ".join(moves), "", f"{other} moved by {sample}'s gradient"
            if clipped[step]:
                moved, clip, why = "nothing", "clipped", f"at its limit: no gradient from {sample}"
            print(f"{step:5}  {sample} {clip:9}{now[0]:9.4f} {now[1]:9.4f}    {moved} ({why})")
        print(f"final ratios: x {ratios[-1, 0]:.3f}, y {ratios[-1, 1]:.3f}\n")
        for step, (x, y) in enumerate(ratios.tolist()):
            run.log({f"toy/alpha={alpha:g}": {"ratio_x": x, "ratio_y": y}}, step)


def random_states(args, rank, seed):
    """What `simulate` takes first: n states whose d-dimensional features have the given rank.

    The features are the first `rank` columns of a random orthogonal matrix, scaled to a mean
    squared norm of 1: orthonormal if the rank is n, collinear if it is 1. Each state has an action
    sampled from the policy and a standard normal advantage."""
    generator = torch.Generator().manual_seed(seed)
    n, dim = args.states, args.dim
    normal = torch.randn(n, n, generator=generator, dtype=torch.float64)
    inputs = torch.linalg.qr(normal)[0][:, :dim]
    trunk = torch.diag((torch.arange(dim) < rank).double() * math.sqrt(n / rank))
    head = torch.randn(dim, args.actions, generator=generator, dtype=torch.float64) / math.sqrt(dim)
    probs = (inputs @ trunk @ head).softmax(-1)
    actions = torch.multinomial(probs, 1, generator=generator).squeeze(1)
    advantages = torch.randn(n, generator=generator, dtype=torch.float64)
    epochs = [torch.randperm(n, generator=generator) for _ in range(args.epochs)]
    return inputs, trunk, head, actions, advantages, torch.cat(epochs).tolist()


def ratios_by_rank(run, args):
    """The generalised toy: mean ratios beyond the limits, one row and one point per rank."""
    ranks, arms = args.features_rank or range(1, args.dim + 1), {"fixed features": {}}
    if args.learn_features:  # with full rank as a control
        ranks, pfo = sorted({*ranks, args.dim}), {"pfo_coef": args.pfo_coef}
        arms = {"learned features": {}, f"learned, PFO {args.pfo_coef:g}": pfo}
    keys = ("ratio_mean_above", "ratio_mean_below")
    print(f"{'':24}rank  " + "".join(f"{key:>28}" for key in keys))
    for arm, pfo in arms.items():
        for rank in ranks:
            rows = []
            for seed in range(args.seed, args.seed + args.num_seeds):
                toy = random_states(args, rank, seed)
                ratios, _ = simulate(*toy, args, args.learn_features, **pfo)
                stats = ratio_stats(ratios[-1].log(), args.clip_coef)
                rows.append([stats[key] for key in keys])
            values = torch.tensor(rows, dtype=torch.float64)  # NaN: no ratio beyond its limit
            mean, count = values.nanmean(0), (~values.isnan()).sum(0)
            error = ((values - mean).square().nansum(0) / (count - 1) / count).sqrt()
            cells = (f"{m:18.4f} +- {e:6.4f}" for m, e in zip(mean, error))
            print(f"{arm:24}{rank:4}  " + "".join(cells))
            run.log({f"toy/{arm}": dict(zip(keys, mean))}, rank)


def toy(args):
    """Figure 5, or with --states its generalisation, in a folder of its own."""
    torch.set_num_threads(1)  # twenty times faster than more, where the machine is busy
    run = Run(args)
    ratios_by_rank(run, args) if args.states else figure_5(run, args)
    run.close()


# From here on: the smallest complete PPO


@dataclass
class Args:
    """PPO-Clip on a small task with the diagnostics and interventions of arXiv 2405.00662.
    Intervals are fractions of the whole run, rounded to whole iterations; 0 switches off."""

    # Experiment
    env_id: str = "CartPole-v1"  # Gymnasium task with a flat Box observation, Discrete actions
    seed: Seed = 1  # of every random generator (the paper: 25, 7, 64, 27, 4)
    total_timesteps: Steps = 100_000  # environment steps of the run, whole iterations of them
    torch_threads: Annotated[int, (0, 256)] = 1  # CPU threads; one is fastest; 0: torch's choice
    cuda: bool = True  # use a CUDA device where there is one
    compile: bool = False  # compile the gradient step: up to twice as fast after about a minute
    runs_dir: str = "runs"  # folder that holds the runs
    run_name: str = ""  # the run's folder within --runs-dir; empty: task, script, seed and time

    # PPO
    learning_rate: Positive = 1e-3  # Adam's
    anneal_lr: bool = False  # lower the learning rate linearly to 0 over the run
    num_envs: Few = 8  # environments
    num_steps: Count = 128  # steps per environment and iteration
    gamma: Fraction = 0.99  # discount factor
    gae_lambda: Fraction = 0.95  # lambda of generalised advantage estimation
    minibatch_size: Count = 128  # samples per gradient step; an epoch drops an incomplete minibatch
    update_epochs: Few = 10  # epochs per batch (the paper: 10, 15, 20; on Atari 4, 6, 8)
    clip_coef: Positive = 0.2  # epsilon of PPO-Clip
    ent_coef: Coefficient = 0.0  # coefficient of the entropy bonus; 0 disables
    vf_coef: Coefficient = 0.5  # coefficient of the squared error of the values
    max_grad_norm: Positive = 0.5  # of actor and critic each; of both as one with --share-trunk
    target_kl: Coefficient = 0.0  # no further epoch after a larger approximate KL; 0 disables
    time_limit: Literal["terminate", "bootstrap"] = "bootstrap"  # returns end there, or go on
    activation: Literal["tanh", "relu"] = "tanh"  # of both networks
    width: Few = 64  # units of the hidden layers

    # Interventions
    pfo_coef: Coefficient = 0.0  # of PFO, equation 2 (the paper: 1; 10 with relu); 0 disables
    pfo_layers: Literal["last", "all"] = "last"  # hidden layers whose preactivations PFO holds
    pfo_reduction: Literal["mean", "sum"] = "mean"  # over dimensions: the authors', equation 2's
    share_trunk: bool = False  # one trunk for actor and critic
    reset_adam: bool = False  # forget Adam's moments after every batch
    adam_beta1: Decay = 0.9  # decay of Adam's first moment
    adam_beta2: Decay = 0.999  # decay of Adam's second moment (the paper's intervention: 0.9)
    reward_keep_prob: Fraction = 1.0  # probability of keeping a reward (Figure 35: 0.1); 1 disables

    # Diagnostics
    log_interval: Fraction = 0.001  # between two points of the curves
    capacity_interval: Fraction = 0.025  # between two fits of the capacity loss
    capacity_steps: Count = 2000  # states that it is fitted to
    capacity_envs: Few = 8  # environments that collect them
    capacity_epochs: Few = 4  # epochs of a fit
    capacity_data: Literal["target", "initial"] = "target"  # who collects: it, or the first agent
    snapshot_interval: Fraction = 0.025  # between two checkpoints that are kept

    def __post_init__(self):
        check_ranges(self)


class Outputs(NamedTuple):
    """What the networks say of observations (B, ...)."""

    policy: torch.Tensor  # (B, P), as Agent describes it
    values: torch.Tensor  # (B,)
    actor_preactivations: torch.Tensor  # (B, D) of the last hidden layer
    critic_preactivations: torch.Tensor  # (B, D) of the last hidden layer
    held: torch.Tensor  # (B, K), the preactivations of the actor that PFO holds


def numpy_layer(layer):
    """A layer as a function of NumPy arrays (B, D); one not known here goes through torch."""
    if type(layer) is nn.Linear and layer.bias is not None:
        weight, bias = (p.detach().cpu().numpy() for p in (layer.weight, layer.bias))
        return lambda x: x @ weight.T + bias
    known = {nn.Tanh: np.tanh, nn.ReLU: lambda x: np.maximum(x, 0)}
    layer = copy.deepcopy(layer).cpu()
    return known.get(type(layer), lambda x: layer(torch.from_numpy(x)).detach().numpy())


class Agent(nn.Module):
    """Actor and critic. A policy (B, A) holds the log-probabilities of the actions."""

    def __init__(self, envs, args):
        super().__init__()
        self.action_dim, self.hold_all = envs.action_dim, args.pfo_layers == "all"
        self.activation = nn.Tanh() if args.activation == "tanh" else nn.ReLU()

        def trunk():  # without the last activation: what it puts out are preactivations
            return nn.Sequential(
                nn.Linear(envs.obs_dim, args.width),
                self.activation,
                nn.Linear(args.width, args.width),
            )

        self.actor_trunk = trunk()
        self.actor_head = nn.Linear(args.width, self.action_dim)
        self.critic_trunk = trunk()
        if args.share_trunk:
            self.critic_trunk = self.actor_trunk
        self.critic_head = nn.Linear(args.width, 1)
        # Gradients are clipped per group: actor and critic each on its own, or all as one
        named = list(self.named_parameters())
        networks = [""] if args.share_trunk else ["actor", "critic"]
        self.groups = [[p for name, p in named if name.startswith(x)] for x in networks]
        assert sum(map(len, self.groups)) == len(named), "name parameters actor_... or critic_..."

    def preactivations(self, trunk, x):
        """What stands before each activation of a trunk, and what it puts out, first to last."""
        outputs = []
        for layer in trunk:
            if layer is self.activation:
                outputs.append(x)
            x = layer(x)
        return [*outputs, x]

    def forward(self, obs):
        """obs (B, D) -> Outputs."""
        actor = critic = self.preactivations(self.actor_trunk, obs)
        if self.critic_trunk is not self.actor_trunk:
            critic = self.preactivations(self.critic_trunk, obs)
        policy = self.actor_head(self.activation(actor[-1])).log_softmax(-1)
        values = self.critic_head(self.activation(critic[-1])).squeeze(-1)
        held = torch.cat([x.flatten(1) for x in actor], 1) if self.hold_all else actor[-1]
        return Outputs(policy, values, actor[-1], critic[-1], held)

    def noise(self, num_steps, num_envs, generator=None):
        """(T, E, A) standard Gumbel numbers, what `numpy_actor` needs to sample."""
        exponential = torch.empty(num_steps, num_envs, self.action_dim)
        return -exponential.exponential_(generator=generator).log().numpy()

    def numpy_actor(self):
        """The actor in NumPy, (obs (E, D), noise (E, A)) -> actions (E,); faster than torch."""
        layers = [numpy_layer(x) for x in (*self.actor_trunk, self.activation, self.actor_head)]

        def act(x, noise):
            for layer in layers:
                x = layer(x)
            return (x + noise).argmax(-1)  # the largest logit + Gumbel noise samples the policy

        return act

    def log_prob(self, policy, actions):
        """(B,) log-probabilities of the actions (B,)."""
        return policy.gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def entropy(self, policy):
        """(B,) entropies."""
        return -(policy.exp() * policy).sum(-1)

    def kl(self, policy, other):
        """(B,) KL(policy || other)."""
        return (policy.exp() * (policy - other)).sum(-1)

    def policy_stats(self, policy, actions):
        """What is logged as policy/NAME: variance over states of each probability, and entropy."""
        return {"variance": policy.exp().var(0).mean(), "entropy": self.entropy(policy).mean()}


def make_optimizer(agent, args):
    """Adam over one vector (P,) that holds all parameters of the agent, which become views of it.
    One clipping and one step instead of one per tensor: an eighth of an eager gradient step, two
    fifths of a compiled one. The price: one learning rate for all."""
    parameters = [p for group in agent.groups for p in group]
    vector = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    for p, part in zip(parameters, vector.detach().split([p.numel() for p in parameters])):
        p.data = part.view_as(p)
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.Adam([vector], args.learning_rate, betas, eps=1e-8, fused=True), vector


@torch.no_grad()
def evaluate(agent, obs):
    """The Outputs for `obs` (N, ...), in chunks: never all conv maps in memory at once."""
    return Outputs(*map(torch.cat, zip(*(agent(chunk) for chunk in obs.split(1024)))))


def compute_gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
    """Advantages and returns (T, E) of generalised advantage estimation (Schulman et al. 2015).

    All arguments are (T, E). `next_values` are those of the true next observations, at an episode's
    end of its last one, and count unless it terminated; nothing passes beyond `dones`."""
    deltas = rewards + gamma * (1 - terminations.to(values.dtype)) * next_values - values
    decay = gamma * gae_lambda * (1 - dones.to(values.dtype))
    advantages = torch.empty_like(deltas)
    last = torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantages[t] = last = deltas[t] + decay[t] * last
    return advantages, advantages + values


def shuffled_minibatches(batch, minibatch_size):
    """One epoch: the tensors (N, ...) of the dict `batch` cut alike into random dicts of (B, ...).
    Advantages are normalised within each minibatch; an incomplete last one is dropped."""
    num_minibatches = len(batch["obs"]) // minibatch_size
    order = torch.randperm(len(batch["obs"]))[: num_minibatches * minibatch_size]
    order = order.to(batch["obs"].device, non_blocking=True)
    parts = {k: x[order].unflatten(0, (num_minibatches, minibatch_size)) for k, x in batch.items()}
    std, mean = torch.std_mean(parts["advantages"], 1, correction=0, keepdim=True)
    parts["advantages"] = (parts["advantages"] - mean) / std.clamp_min(1e-6)
    for minibatch in zip(*parts.values()):
        yield dict(zip(parts, minibatch))


def clipped_gradient(agent, loss, max_grad_norm):
    """The gradient (P,) of `loss`, clipped per group of the agent, and the norms before that."""
    gradients = iter(torch.autograd.grad(loss, [p for group in agent.groups for p in group]))
    parts = [torch.cat([next(gradients).flatten() for _ in group]) for group in agent.groups]
    norms = [part.norm() for part in parts]
    scales = [(max_grad_norm / (norm + 1e-6)).clamp_max(1) for norm in norms]
    return torch.cat([part * scale for part, scale in zip(parts, scales)]), norms


def ppo_gradient(agent, args, obs, actions, logprobs, advantages, returns, old_held):
    """The clipped gradient (P,) of PPO-Clip's loss (equation 1) with value loss, entropy bonus and
    PFO on a minibatch, whose tensors all start with (B,). Returns besides it a dict of scalars or
    (B,), whose means are logged as losses/NAME, and the policies (B, ...)."""
    new = agent(obs)
    logratio = agent.log_prob(new.policy, actions) - logprobs
    ratio = logratio.clamp(math.log(1e-7), math.log(1e9)).exp()
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped_ratio * advantages).mean()
    value_loss = args.vf_coef * F.mse_loss(new.values, returns)
    pfo = pfo_loss(new.held, old_held, args.pfo_reduction)
    losses = {"policy_loss": policy_loss, "value_loss": value_loss, "pfo_loss": pfo}
    loss = policy_loss + value_loss
    if args.ent_coef:
        loss = loss - args.ent_coef * agent.entropy(new.policy).mean()
    if args.pfo_coef:  # a term of 0 would be NaN where PFO is infinite
        loss = loss + args.pfo_coef * pfo
    gradient, norms = clipped_gradient(agent, loss, args.max_grad_norm)
    losses |= {"actor_grad_norm": norms[0], "critic_grad_norm": norms[-1]}
    logratio = logratio.detach()  # Schulman, "Approximating KL Divergence"
    losses |= {"old_approx_kl": -logratio, "approx_kl": logratio.expm1() - logratio}
    losses["clipfrac"] = (ratio != clipped_ratio).float()
    return gradient, {name: x.detach() for name, x in losses.items()}, new.policy.detach()


@torch.no_grad()
def feature_ranks(features):
    """The five rank measures of the paper's appendix E for `features` (N, D): a dict of floats.

    With sigma the singular values of the uncentred matrix and delta = 0.01: `effective_rank` (Roy &
    Vetterli 2007), `pca_rank` (Yang et al. 2020; the paper's figures), `srank` (Kumar et al. 2021),
    `feature_rank` (Lyle et al. 2022), `torch_rank` (torch.linalg.matrix_rank). All are 0 for a zero
    or empty matrix and NaN if an entry is not finite."""
    delta, eps = 0.01, torch.finfo(features.dtype).eps
    rounding = max(10 * eps, 1e-9)  # of the sums, so that ties count exactly
    names = ("effective_rank", "pca_rank", "srank", "feature_rank", "torch_rank")
    if not features.isfinite().all():
        return dict.fromkeys(names, math.nan)
    if features.count_nonzero() == 0:
        return dict.fromkeys(names, 0.0)
    sigma = torch.linalg.svdvals(features.double())
    p = sigma / sigma.sum()
    variance = sigma**2 / (sigma**2).sum()
    ranks = (
        torch.special.entr(p).sum().exp(),
        (variance.cumsum(0) <= 1 - delta + rounding).sum() + 1,
        (p.cumsum(0) <= 1 - delta + rounding).sum() + 1,
        (sigma / math.sqrt(len(features)) > delta).sum(),
        (sigma > sigma[0] * max(features.shape) * eps).sum(),
    )
    return {name: float(rank) for name, rank in zip(names, ranks)}


@torch.no_grad()
def dead_neurons(features, activation):
    """How many columns of `features` (N, D) do not vary (footnote 7): for "relu" those that are 0
    on all samples, for "tanh" those with a standard deviation below 0.001; NaN is not dead. Raises
    ValueError for another `activation`."""
    if activation not in ("relu", "tanh"):
        raise ValueError(f'activation must be "relu" or "tanh", not {activation!r}')
    dead = (features == 0).all(0) if activation == "relu" else features.std(0) < 0.001
    return int(dead.sum())


@torch.no_grad()
def representation(agent, args, network, outputs):
    """Ranks, dead neurons and L2 norms of the `network`, "actor" or "critic": a dict of numbers.
    They are those of its last hidden layer in the Outputs for N states. Norms are means over the
    states, `weight_norm` is that of all weights and biases."""
    preactivations = getattr(outputs, f"{network}_preactivations")
    features = agent.activation(preactivations)
    trunk, head = getattr(agent, f"{network}_trunk"), getattr(agent, f"{network}_head")
    weights = torch.cat([p.flatten() for p in (*trunk.parameters(), *head.parameters())])
    return feature_ranks(features) | {
        "dead_neurons": dead_neurons(features, args.activation),
        "preactivation_norm": preactivations.norm(dim=1).mean().item(),
        "feature_norm": features.norm(dim=1).mean().item(),
        "weight_norm": weights.norm().item(),
    }


@torch.no_grad()
def capacity_target(target, frames, index):
    """The capacity data: (frames, index), and the target's policies (N, P) and values (N,)."""
    device = next(target.parameters()).device
    outputs = [target(frames[chunk].to(device))[:2] for chunk in index.split(1024)]
    return frames, index, *(torch.cat(parts) for parts in zip(*outputs))


def capacity_loss(agent, args, frames, index, target_policies, target_values, adam_state=None):
    """What is left of the loss when a copy was fitted to a random target (section 2).

    The actor's loss is the mean KL(target || copy), the critic's the mean squared error. Adam with
    the run's settings, fresh or from `adam_state`, takes `capacity_epochs` over the data; each fit
    shuffles alike and touches no other random generator. Returns floats: `actor` and `critic` on
    all data after the fit, and the same `_last_minibatch` before the last step."""
    device = target_values.device
    copied = copy.deepcopy(agent)
    optimizer, vector = make_optimizer(copied, args)
    if adam_state:
        optimizer.load_state_dict(optimizer.state_dict() | {"state": adam_state})
    generator = torch.Generator().manual_seed(args.seed)

    def losses(rows):
        policies, values = copied(frames[index[rows]].to(device))[:2]
        rows = rows.to(device)
        return copied.kl(target_policies[rows], policies), (values - target_values[rows]).square()

    full = len(index) // args.minibatch_size * args.minibatch_size
    for _ in range(args.capacity_epochs):
        permutation = torch.randperm(len(index), generator=generator)
        for rows in permutation[:full].split(args.minibatch_size):
            actor_last, critic_last = (loss.mean() for loss in losses(rows))
            vector.grad, _ = clipped_gradient(copied, actor_last + critic_last, args.max_grad_norm)
            optimizer.step()
    with torch.no_grad():
        chunks = [losses(rows) for rows in torch.arange(len(index)).split(1024)]
    actor, critic = (torch.cat(parts).mean() for parts in zip(*chunks))
    names = ("actor", "critic", "actor_last_minibatch", "critic_last_minibatch")
    return {k: x.item() for k, x in zip(names, (actor, critic, actor_last, critic_last))}


def train(args):
    # Setup
    check(args)
    batch_size = steps_per_iteration = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // steps_per_iteration
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.torch_threads or torch.get_num_threads())
    envs = Envs(args, args.num_envs, stream=0)
    torch.manual_seed(2**32 - 1 - args.seed)  # an odd sum: never the agent's own seed
    target = Agent(envs, args).to(device)  # the random network that the capacity loss fits
    torch.manual_seed(args.seed)
    agent = Agent(envs, args).to(device)
    optimizer, vector = make_optimizer(agent, args)
    gradient = ppo_gradient
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # backward and clipping in the same graph
        torch._inductor.config.fallback_random = True  # the eager script's random numbers
        torch._inductor.config.cpp_wrapper = device.type == "cpu"  # a tenth faster
        gradient = torch.compile(ppo_gradient, fullgraph=True)
    obs = np.zeros((args.num_steps, args.num_envs, envs.obs_dim), np.float32)
    actions = np.zeros((args.num_steps, args.num_envs), np.int64)
    rewards = np.zeros((args.num_steps, args.num_envs), np.float32)
    terminations, truncations = np.zeros_like(rewards, bool), np.zeros_like(rewards, bool)

    if args.capacity_interval:
        capacity_envs = Envs(args, args.capacity_envs, stream=2)
        collector = target if args.capacity_data == "target" else agent
        states = capacity_envs.collect(collector, args.capacity_steps, seed=args.seed)
        capacity_data = capacity_target(target, *states)
    next_obs, global_step = envs.reset(), 0
    run = Run(args)  # from here on there is a folder
    if args.snapshot_interval:
        run.save(0, agent, optimizer)
    if args.capacity_interval:
        run.log({"capacity": capacity_loss(agent, args, *capacity_data)}, 0)
    log_time, log_iteration = time.perf_counter(), 0
    tqdm.write(f"{run.dir} from step 0 on")
    tqdm.write(f"{'step':>12}" + "".join(f"{name:>13}" for name in run.columns))
    bar = tqdm(total=num_iterations * steps_per_iteration, unit=" steps", dynamic_ncols=True)
    for iteration in range(1, num_iterations + 1):
        logging, scalars = due(args.log_interval, iteration, num_iterations), {}

        # Rollout: the actor alone; one forward afterwards gives values and log-probabilities
        act, noise = agent.numpy_actor(), agent.noise(args.num_steps, args.num_envs)
        final_obs = []
        for t in range(args.num_steps):
            obs[t], actions[t] = next_obs, act(next_obs, noise[t])
            next_obs, rewards[t], terminations[t], truncations[t], ended = envs.step(actions[t])
            final_obs += ended
        global_step += steps_per_iteration
        if args.reward_keep_prob < 1:
            rewards *= envs.mask_rng.random(rewards.shape) < args.reward_keep_prob
        b_obs = torch.from_numpy(obs).flatten(0, 1).to(device)
        b_actions = torch.from_numpy(actions).flatten(0, 1).to(device)
        last_obs = torch.from_numpy(np.stack([*next_obs, *final_obs])).to(device)

        # Advantages
        old, last_values = evaluate(agent, b_obs), evaluate(agent, last_obs).values.cpu()
        b_logprobs = agent.log_prob(old.policy, b_actions)
        dones = torch.from_numpy(terminations | truncations)
        terminal = dones if args.time_limit == "terminate" else torch.from_numpy(terminations)
        values = old.values.view(dones.shape).cpu()
        next_values = torch.cat([values[1:], last_values[None, : args.num_envs]])
        next_values[dones] = last_values[args.num_envs :]
        gae_inputs = torch.from_numpy(rewards), values, next_values, terminal, dones
        advantages, returns = compute_gae(*gae_inputs, args.gamma, args.gae_lambda)
        b_advantages, b_returns = advantages.flatten().to(device), returns.flatten().to(device)

        # Representation: of the networks that collected the batch
        if logging:
            scalars["representation/actor"] = representation(agent, args, "actor", old)
            scalars["representation/critic"] = representation(agent, args, "critic", old)
            scalars["policy"] = agent.policy_stats(old.policy, b_actions)

        # PPO update
        if args.anneal_lr:
            lr = (1 - (iteration - 1) / num_iterations) * args.learning_rate
            optimizer.param_groups[0]["lr"] = lr
        batch = {"obs": b_obs, "actions": b_actions, "logprobs": b_logprobs}
        batch |= {"advantages": b_advantages, "returns": b_returns, "old_held": old.held}
        all_losses, policies = [], []
        for _ in range(args.update_epochs):
            for minibatch in shuffled_minibatches(batch, args.minibatch_size):
                vector.grad, losses, policy = gradient(agent, args, **minibatch)
                optimizer.step()
                all_losses.append(losses)
                policies.append(policy)
            if args.target_kl and losses["approx_kl"].mean() > args.target_kl:
                break
        if args.reset_adam:
            optimizer.state.clear()

        # Trust region: end of the update against its start
        if logging:
            new = evaluate(agent, b_obs)
            logratio = agent.log_prob(new.policy, b_actions) - b_logprobs
            scalars["trust_region"] = ratio_stats(logratio, args.clip_coef) | {
                "kl": agent.kl(old.policy, new.policy).mean(),
                "preactivation_drift": pfo_loss(new.held, old.held, args.pfo_reduction),
            }

        # Capacity loss
        if due(args.capacity_interval, iteration, num_iterations):
            scalars["capacity"] = capacity_loss(agent, args, *capacity_data)

        # Logging
        if logging:
            scalars["charts"] = {"learning_rate": optimizer.param_groups[0]["lr"]}
            if envs.finished:
                episode = zip(("episodic_return", "episodic_length"), np.mean(envs.finished, 0))
                scalars["charts"] |= dict(episode)
                envs.finished.clear()
            seconds = time.perf_counter() - log_time
            scalars["charts"]["SPS"] = (iteration - log_iteration) * batch_size / seconds
            log_time, log_iteration = time.perf_counter(), iteration
            scalars["losses"] = {k: torch.stack([x[k] for x in all_losses]).mean() for k in losses}
            entropies = [agent.entropy(part) for part in torch.cat(policies).split(512)]
            scalars["losses"] |= {
                "entropy": torch.cat(entropies).mean(),
                "policy_objective_last_minibatch": -losses["policy_loss"],
                "explained_variance": 1 - (b_returns - old.values).var() / b_returns.var(),
            }
        run.log(scalars, global_step, row=due(0.025, iteration, num_iterations))
        bar.update(steps_per_iteration)

        # Checkpoint
        if not vector.isfinite().all():
            what = "parameters" if b_obs.isfinite().all() else "observations and parameters"
            fail(f"{what} are not finite at step {global_step}; {run.kept}", code=1)
        if due(args.snapshot_interval, iteration, num_iterations):
            run.save(global_step, agent, optimizer)

    bar.close()
    run.close()


def main():
    if sys.argv[1:2] == ["train"]:
        train(tyro.cli(Args, prog=f"{Path(sys.argv[0]).name} train", args=sys.argv[2:]))
    else:
        toy(tyro.cli(ToyArgs))


# What follows is no part of the toy or of PPO: messages, flags, environments, the folder of a run


def say(message):
    """A line on stderr that leaves the progress bar whole."""
    tqdm.write(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)


def fail(message, code=2):
    """Say on one line of stderr what is wrong and exit with `code`."""
    say(f"error: {message}")
    raise SystemExit(code)


def due(interval, iteration, num_iterations):
    """Whether this iteration is nearest to a multiple of `interval`, or the last; 0: never."""
    period = max(1.0, interval * num_iterations)
    nearest = round(round(iteration / period) * period) == iteration
    return interval > 0 and (nearest or iteration == num_iterations)


def check_ranges(args):
    """Raises ValueError, which tyro shows, if a flag is out of its range or a name too long."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        bounds, value = getattr(hint, "__metadata__", [None])[0], getattr(args, name)
        numbers = value if isinstance(value, tuple) else [] if value is None else [value]
        if isinstance(bounds, tuple) and not all(bounds[0] <= x <= bounds[1] for x in numbers):
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} is {value}: it must be from {bounds[0]} to {bounds[1]}")
    path = os.fsencode(Path(args.runs_dir, args.run_name))
    if re.search(r"[/\\]|^\.\.?$", args.run_name) or re.search(rb"[^/]{200}", path):
        raise ValueError("--run-name: no slash; it and each part of --runs-dir: under 200 bytes")


def check(args):
    """Exit with one line where flags do not go together."""
    batch_size = args.num_envs * args.num_steps
    if not 2 <= args.minibatch_size <= batch_size:
        fail(f"--minibatch-size is {args.minibatch_size}: it must be from 2 to {batch_size}")
    if args.total_timesteps < batch_size:
        fail(f"--total-timesteps is {args.total_timesteps}: it must be {batch_size} or more")
    least = max(args.minibatch_size, args.capacity_envs)  # a minibatch, a step of each
    if args.capacity_interval and args.capacity_steps < least:
        fail(f"--capacity-steps is {args.capacity_steps}: it must be {least} or more")
    if args.compile and not shutil.which(os.environ.get("CXX", "g++")):
        fail("--compile needs a C++ compiler: g++, or the one that CXX names")


class Envs:
    """`num_envs` copies of the task, stepped in turn; an episode that ends is followed by the next.
    Observations (E, D) are used as they are."""

    def __init__(self, args, num_envs, stream, obs_stats=None):
        gym.logger.min_level = gym.logger.ERROR  # no advice to move on to a newer version
        try:
            self.envs = [gym.make(args.env_id, disable_env_checker=True) for _ in range(num_envs)]
        except Exception as error:  # whatever a task's constructor raises
            fail(f"--env-id {args.env_id} cannot be made: {error!r}")
        obs_space, space = self.envs[0].observation_space, self.envs[0].action_space
        flat = isinstance(obs_space, gym.spaces.Box) and len(obs_space.shape) == 1
        if not flat or not isinstance(space, gym.spaces.Discrete) or space.start != 0:
            what = f"observes {obs_space} and acts by {space}"
            fail(f"--env-id {args.env_id} {what}: they must be a flat Box and Discrete from 0 on")
        self.obs_dim, self.action_dim = obs_space.shape[0], int(space.n)
        self.rng = np.random.default_rng([args.seed, stream])
        self.mask_rng = np.random.default_rng([args.seed, stream + 1])
        self.obs = np.zeros((num_envs, self.obs_dim), np.float32)
        self.returns, self.lengths = [0.0] * num_envs, [0] * num_envs  # of the episodes that go on
        self.finished = []  # (return, length) of the episodes that ended since the last log

    def start(self, i):
        """Begin an episode of environment i."""
        self.obs[i], _ = self.envs[i].reset(seed=int(self.rng.integers(2**31)))
        self.returns[i], self.lengths[i] = 0.0, 0

    def reset(self):
        for i in range(len(self.envs)):
            self.start(i)
        return self.obs.copy()

    def step(self, actions):
        """One step with the `actions` (E,): the next observations (E, D), rewards, terminations
        and truncations (E,), and the last observations of episodes that ended."""
        outcomes, final_obs = [], []
        for i, action in enumerate(actions.tolist()):
            self.obs[i], reward, terminated, truncated, _ = self.envs[i].step(action)
            outcomes.append((reward, terminated, truncated))
            self.returns[i] += float(reward)
            self.lengths[i] += 1
            if terminated or truncated:
                final_obs.append(self.obs[i].copy())
                self.finished.append((self.returns[i], self.lengths[i]))
                self.start(i)
        return self.obs.copy(), *zip(*outcomes), final_obs

    def collect(self, agent, num_steps, seed):
        """States that the agent's sampled actions lead to, and the index (num_steps,) of them."""
        act, states, next_obs = agent.numpy_actor(), [], self.reset()
        generator = torch.Generator().manual_seed(seed)
        for noise in agent.noise(-(-num_steps // len(self.envs)), len(self.envs), generator):
            states.append(next_obs)
            next_obs, *_ = self.step(act(next_obs, noise))
        return torch.from_numpy(np.concatenate(states)[:num_steps]), torch.arange(num_steps)


class Run:
    """The folder of a run: args.json, event files for TensorBoard, and checkpoints/STEP.pt."""

    kept = "nothing was kept"  # what a message says that ends the process early
    columns = {  # of the rows in the terminal
        "return": "charts/episodic_return",
        "actor rank": "representation/actor/pca_rank",
        "dead": "representation/actor/dead_neurons",
        "norm": "representation/actor/preactivation_norm",
        "ratio below": "trust_region/ratio_mean_below",
        "capacity": "capacity/actor",
    }

    def __init__(self, args):
        task = re.sub(r"[/\\:]", "-", getattr(args, "env_id", "toy"))
        name = f"{task}__{Path(__file__).stem}__{args.seed}__{int(time.time())}"
        args.run_name = args.run_name or name
        self.args, self.scalars = args, {}  # last value of each tag
        self.dir = Path(args.runs_dir, args.run_name)
        try:
            self.dir.mkdir(parents=True)
        except FileExistsError:
            fail(f"{self.dir} exists or was just started: choose another --run-name")
        except OSError as error:
            fail(f"--runs-dir: {self.dir} cannot be made ({error.strerror})")
        Run.kept = f"{self.dir} keeps the curves so far"
        (self.dir / "args.json").write_text(json.dumps(asdict(args), indent=2))
        self.writer = SummaryWriter(self.dir)
        rows = "".join(f"|{name}|{value}|\n" for name, value in asdict(args).items())
        self.writer.add_text("hyperparameters", "|flag|value|\n|-|-|\n" + rows, 0)

    def log(self, scalars, step, row=False):
        """Write the dict {"group": {"name": number}}, what is not finite as NaN; print a `row`."""
        flat = {f"{group}/{name}": x for group, part in scalars.items() for name, x in part.items()}
        for tag, value in flat.items():
            self.scalars[tag] = float(value) if math.isfinite(value) else math.nan
            self.writer.add_scalar(tag, self.scalars[tag], step)
        if row:
            cells = (f"{self.scalars.get(tag, math.nan):13.4g}" for tag in self.columns.values())
            tqdm.write(f"{step:12,}" + "".join(cells))
        self.writer.flush()

    def save(self, global_step, agent, optimizer):
        """Write checkpoints/STEP.pt, which capacity.py reads, at once or not at all."""
        state = {"script": Path(__file__).stem, "args": asdict(self.args), "obs_stats": {}}
        state |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
        (self.dir / "checkpoints").mkdir(exist_ok=True)
        path = self.dir / "checkpoints" / f"{global_step}.pt"
        torch.save(state | {"global_step": global_step}, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
        checkpoints = len(list(path.parent.glob("*.pt")))
        Run.kept = f"{self.dir} keeps the curves so far and {checkpoints} checkpoints"

    def close(self):
        self.writer.close()
        tqdm.write(f"{self.dir} is finished; its curves: tensorboard --logdir {self.args.runs_dir}")


def never_fail(stream):
    """Let `stream` drop what a full disk or a terminal without the letters cannot take."""
    write, flush = stream.write, stream.flush

    def try_to_write(text):
        with contextlib.suppress(OSError):
            write(text)
            flush()

    stream.reconfigure(errors="replace")
    stream.write, stream.flush = try_to_write, lambda: None


if __name__ == "__main__":
    never_fail(sys.stdout)
    never_fail(sys.stderr)
    threading.excepthook = lambda _: None  # the log has a thread; its fault ends main() as well
    try:
        main()
    except KeyboardInterrupt:
        fail(f"interrupted; {Run.kept}", code=130)
    except OSError as error:
        fail(f"{error}; {Run.kept}", code=1)
    except (MemoryError, torch.OutOfMemoryError):
        fail("out of memory: use a smaller --minibatch-size, --num-envs, ... or --no-cuda", code=1)
    except Exception as error:  # of a task, for example
        traceback.print_exc()
        fail(f"{error!r}; {Run.kept}", code=1)

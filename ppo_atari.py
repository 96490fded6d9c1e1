"""PPO-Clip on Atari, watched while its representation collapses (arXiv 2405.00662).

    python ppo_atari.py --update-epochs 8                 # many epochs per batch
    python ppo_atari.py --update-epochs 8 --pfo-coef 1    # the same with PFO, equation 2

A reader may stop at the end of `main`: what stands below it is no part of PPO. `global_step` counts
frames, as the paper does. What differs from CleanRL's ppo_atari.py: the paper's environment (sticky
actions, frameskip 3, no life loss, no no-ops, no FIRE), no value clipping, no annealing, PyTorch's
initialisation, actor and critic separate and clipped apart, and every number of the paper logged.
"""

import contextlib
import copy
import difflib
import importlib
import io
import json
import math
import os
import re
import shutil
import sys
import threading
import time
import traceback
import zipfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_type_hints

import ale_py
import filelock
import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from ale_py.vector_env import AtariVectorEnv
from torch.utils._pytree import tree_map
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
Threads = Annotated[int, (0, 256)]
Seed = Annotated[int, (0, 2**32 - 1)]


@dataclass
class Args:
    """PPO-Clip on Atari with the diagnostics and interventions of arXiv 2405.00662.
    Intervals are fractions of the whole run, rounded to whole iterations; 0 switches off."""

    # Experiment
    # a game (the paper: Phoenix, NameThisGame, DoubleDunk, Qbert, Gravitar, BattleZone)
    env_id: str = "ALE/Phoenix-v5"
    seed: Seed = 1  # of every random generator (the paper: 25, 7, 64, 27, 4)
    total_timesteps: Steps = 100_000_000  # frames of the run, whole iterations of them
    torch_threads: Threads = 0  # CPU threads; 0: torch's choice
    env_threads: Threads = 0  # threads of the emulators; 0: one a game, at most one a CPU
    cuda: bool = True  # use a CUDA device where there is one
    tf32: bool = False  # let a CUDA device multiply in TF32: faster, with 10 bits of mantissa
    compile: bool = False  # compile gradient step and rollout, on CUDA as CUDA graphs: a minute
    runs_dir: str = "runs"  # folder that holds the runs
    run_name: str = ""  # the run's folder within --runs-dir; empty: task, script, seed and time
    resume: bool = False  # go on with the run --run-name if it exists, with its own flags
    fork_from: str = ""  # a checkpoint that a new run goes on from, with its flags unless given
    fork_step: tyro.conf.Suppress[int] = 0  # the step of that checkpoint
    track: bool = False  # log to Weights & Biases as well (pip install wandb)

    # PPO
    learning_rate: Positive = 2.5e-4  # Adam's
    anneal_lr: bool = False  # lower the learning rate linearly to 0 over the run
    num_envs: Few = 8  # environments
    num_steps: Count = 128  # steps per environment and iteration
    gamma: Fraction = 0.99  # discount factor
    gae_lambda: Fraction = 0.95  # lambda of generalised advantage estimation
    minibatch_size: Count = 256  # samples per gradient step; an epoch drops an incomplete minibatch
    update_epochs: Few = 4  # epochs per batch (the paper: 4, 6, 8)
    clip_coef: Positive = 0.1  # epsilon of PPO-Clip
    ent_coef: Coefficient = 0.01  # coefficient of the entropy bonus; 0 disables
    vf_coef: Coefficient = 0.5  # coefficient of the squared error of the values
    max_grad_norm: Positive = 0.5  # of actor and critic each; of both as one with --share-trunk
    target_kl: Coefficient = 0.0  # no further epoch after a larger approximate KL; 0 disables
    time_limit: Literal["terminate", "bootstrap"] = "terminate"  # returns end there, or go on
    max_episode_frames: Steps = 108_000  # the time limit of a game, no-ops at its start aside
    frameskip: Few = 3  # frames per action
    sticky: Fraction = 0.25  # probability that a frame repeats the action before; 0 disables
    maxpool: bool = False  # observe the maximum of the last two frames
    noop_max: Annotated[int, (0, 1000)] = 0  # most no-operations that begin a game; 0 disables
    fire_reset: bool = False  # press FIRE at the start of a game
    episodic_life: bool = False  # a lost life ends the return that is learned, not the game
    sign_reward: bool = True  # learn from the sign of the reward; the raw return is logged
    activation: Literal["tanh", "relu"] = "relu"  # of both networks
    width: Few = 512  # units of the hidden linear layer

    # Interventions
    pfo_coef: Coefficient = 0.0  # of PFO, equation 2 (the paper: 1; 10 for all); 0 disables
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
    capacity_steps: Count = 36_000  # states that it is fitted to
    capacity_envs: Few = 1  # environments that collect them
    capacity_epochs: Few = 1  # epochs of a fit
    capacity_data: Literal["target", "initial"] = "target"  # who collects: it, or the first agent
    snapshot_interval: Fraction = 0.025  # between two checkpoints that are kept
    checkpoint_interval: Fraction = 0.001  # between two saves of latest.pt

    def __post_init__(self):
        """Raises ValueError, which tyro shows, if a flag is out of its range or a name too long."""
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            bounds, value = getattr(hint, "__metadata__", [None])[0], getattr(self, name)
            if isinstance(bounds, tuple) and not bounds[0] <= value <= bounds[1]:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} is {value}: it must be from {bounds[0]} to {bounds[1]}")
        path = os.fsencode(Path(self.runs_dir, self.run_name))
        if re.search(r"[/\\]|^\.\.?$", self.run_name) or re.search(rb"[^/]{200}", path):
            raise ValueError("--run-name: no slash; it and each part of --runs-dir under 200 bytes")


class Outputs(NamedTuple):
    """What the networks say of observations (B, ...)."""

    policy: torch.Tensor  # (B, P), as Agent describes it
    values: torch.Tensor  # (B,)
    actor_preactivations: torch.Tensor  # (B, D) of the last hidden layer
    critic_preactivations: torch.Tensor  # (B, D) of the last hidden layer
    held: torch.Tensor  # (B, K), the preactivations of the actor that PFO holds


class Agent(nn.Module):
    """Actor and critic. A policy (B, A) holds the log-probabilities of the actions."""

    def __init__(self, envs, args):
        super().__init__()
        self.action_dim, self.hold_all = envs.action_dim, args.pfo_layers == "all"
        self.activation = nn.Tanh() if args.activation == "tanh" else nn.ReLU()

        def trunk():  # without the last activation: what it puts out are preactivations
            return nn.Sequential(
                nn.Conv2d(4, 32, 8, stride=4),  # (B, 4, 84, 84) -> (B, 32, 20, 20)
                self.activation,
                nn.Conv2d(32, 64, 4, stride=2),  # -> (B, 64, 9, 9)
                self.activation,
                nn.Conv2d(64, 64, 3),  # -> (B, 64, 7, 7)
                self.activation,
                nn.Flatten(),
                nn.Linear(64 * 7 * 7, args.width),
            )

        self.actor_trunk = trunk()
        self.actor_head = nn.Linear(args.width, self.action_dim)
        self.critic_trunk = self.actor_trunk if args.share_trunk else trunk()
        self.critic_head = nn.Linear(args.width, 1)
        # Gradients are clipped per group: actor and critic each on its own, or all as one
        named = list(self.named_parameters())
        networks = [""] if args.share_trunk else ["actor", "critic"]
        self.groups = [[p for name, p in named if name.startswith(x)] for x in networks]
        assert sum(map(len, self.groups)) == len(named), "name parameters actor_... or critic_..."

    def scaled(self, obs):
        """uint8 -> [0, 1], channels last: up to a quarter off a gradient step on a CPU."""
        return (obs / 255).contiguous(memory_format=torch.channels_last)

    def preactivations(self, trunk, x):
        """What stands before each activation of a trunk, and what it puts out, first to last."""
        outputs = []
        for layer in trunk:
            if layer is self.activation:
                outputs.append(x)
            x = layer(x)
        return [*outputs, x]

    def policy(self, preactivations):
        """The policy (B, A) from the last preactivations (B, D) of the actor."""
        return self.actor_head(self.activation(preactivations)).log_softmax(-1)

    def forward(self, obs):
        """obs (B, 4, 84, 84) uint8 -> Outputs."""
        x = self.scaled(obs)
        actor = critic = self.preactivations(self.actor_trunk, x)
        if self.critic_trunk is not self.actor_trunk:
            critic = self.preactivations(self.critic_trunk, x)
        values = self.critic_head(self.activation(critic[-1])).squeeze(-1)
        held = torch.cat([x.flatten(1) for x in actor], 1) if self.hold_all else actor[-1]
        return Outputs(self.policy(actor[-1]), values, actor[-1], critic[-1], held)

    def noise(self, num_steps, num_envs, generator=None):
        """(T, E, A) standard Gumbel numbers, what `sample` needs."""
        uniform = torch.empty(num_steps, num_envs, self.action_dim)
        return -uniform.exponential_(generator=generator).log()

    @torch.no_grad()
    def sample(self, obs, noise):
        """Actions (E,) for obs (E, 4, 84, 84) and noise (E, A): the actor alone."""
        return (self.policy(self.actor_trunk(self.scaled(obs))) + noise).argmax(-1)

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


def pfo_loss(preactivations, old_preactivations, reduction="mean"):
    """Proximal Feature Optimization (equation 2): mean squared change of (B, K), a scalar.
    The equation has a "sum" over K; the published coefficients belong to the "mean" over it."""
    value = (preactivations - old_preactivations).square().mean()
    return value if reduction == "mean" else value * preactivations.shape[1]


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


def compiled(function, device):
    """`function` as one compiled graph; on CUDA a CUDA graph, whose outputs are copied, since its
    next replay overwrites them."""
    torch._dynamo.config.trace_autograd_ops = True  # backward and clipping in the same graph
    torch._inductor.config.fallback_random = True  # the eager script's random numbers
    torch._inductor.config.cpp_wrapper = device.type == "cpu"  # a tenth faster
    if device.type == "cpu":
        return torch.compile(function, fullgraph=True)
    graph = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    return lambda *args, **kwargs: tree_map(torch.clone, graph(*args, **kwargs))


def main():
    # Setup
    run = Run(tyro.cli(Args))  # a new one, one that is resumed, or a fork
    args = run.args
    batch_size = args.num_envs * args.num_steps
    steps_per_iteration = batch_size * args.frameskip
    num_iterations = args.total_timesteps // steps_per_iteration
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.torch_threads or torch.get_num_threads())
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.tf32
    envs = Envs(args, args.num_envs, stream=0)
    torch.manual_seed(2**32 - 1 - args.seed)  # an odd sum: never the agent's own seed
    target = Agent(envs, args).to(device)  # the random network that the capacity loss fits
    torch.manual_seed(args.seed)
    agent = Agent(envs, args).to(device)
    optimizer, vector = make_optimizer(agent, args)
    gradient, sample = ppo_gradient, agent.sample
    if args.compile:
        gradient, sample = compiled(gradient, device), compiled(sample, device)
    shape = (args.num_steps, args.num_envs)
    obs = torch.from_numpy(np.zeros((*shape, 4, 84, 84), np.uint8)).to(device)
    actions = torch.zeros(*shape, dtype=torch.int64, device=device)
    rewards = np.zeros(shape, np.float32)
    terminations, truncations = np.zeros_like(rewards, bool), np.zeros_like(rewards, bool)

    if args.capacity_interval:
        capacity_envs = Envs(args, args.capacity_envs, stream=2)
        collector = target if args.capacity_data == "target" else agent
        states = capacity_envs.collect(collector, args.capacity_steps, seed=args.seed)
        capacity_data = capacity_target(target, *states)
    next_obs, global_step = run.start(agent, optimizer, envs)  # from here on there is a folder
    if args.capacity_interval and global_step == 0:
        run.log({"capacity": capacity_loss(agent, args, *capacity_data)}, 0)
    log_time, log_iteration = time.perf_counter(), global_step // steps_per_iteration
    total_steps = num_iterations * steps_per_iteration
    bar = tqdm(total=total_steps, initial=global_step, unit=" steps", dynamic_ncols=True)
    for iteration in range(log_iteration + 1, num_iterations + 1):
        logging, scalars = due(args.log_interval, iteration, num_iterations), {}

        # Rollout: the actor alone; one forward afterwards gives values and log-probabilities
        noise = agent.noise(args.num_steps, args.num_envs).to(device)
        final_obs = []
        for t in range(args.num_steps):
            obs[t].copy_(torch.from_numpy(next_obs), non_blocking=True)
            actions[t] = sample(obs[t], noise[t])
            outcome = envs.step(actions[t].cpu().numpy())
            next_obs, rewards[t], terminations[t], truncations[t], ended = outcome
            final_obs += ended
        global_step += steps_per_iteration
        if args.reward_keep_prob < 1:
            rewards *= envs.mask_rng.random(rewards.shape) < args.reward_keep_prob
        b_obs, b_actions = obs.flatten(0, 1), actions.flatten()
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
        if not vector.isfinite().all():  # a state to look into, never to go on from
            run.save(global_step, ["checkpoints/diverged.pt"])
            what = "parameters" if b_obs.isfinite().all() else "observations and parameters"
            fail(f"{what} are not finite at step {global_step}: checkpoints/diverged.pt", code=1)
        keep = due(args.snapshot_interval, iteration, num_iterations)
        if keep or due(args.checkpoint_interval, iteration, num_iterations):
            run.save(global_step, [f"checkpoints/{global_step}.pt"] * keep + ["latest.pt"])

    bar.close()
    run.close()


# What follows is no part of PPO: messages, flags, environments, the folder of a run


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


def check(args):
    """Exit with one line where flags do not go together."""
    batch_size = args.num_envs * args.num_steps
    if not 2 <= args.minibatch_size <= batch_size:
        fail(f"--minibatch-size is {args.minibatch_size}: it must be from 2 to {batch_size}")
    least = args.fork_step + batch_size * args.frameskip
    if args.total_timesteps < least:
        fail(f"--total-timesteps is {args.total_timesteps}: it must be {least} or more")
    least = max(args.minibatch_size, args.capacity_envs)  # a minibatch, a step of each
    if args.capacity_interval and args.capacity_steps < least:
        fail(f"--capacity-steps is {args.capacity_steps}: it must be {least} or more")
    if args.compile and not shutil.which(os.environ.get("CXX", "g++")):
        fail("--compile needs a C++ compiler: g++, or the one that CXX names")


def read_state(path):
    """The state in a file. Raises BadZipFile if it is damaged; exits if it is no state of ours."""
    try:
        if not Path(path).is_file():
            fail(f"there is no file {path}")
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch.load would not notice a flipped bit
                raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise almost anything
        raise zipfile.BadZipFile(f"{path} is damaged or no checkpoint: {error!r}") from None
    kinds = {"script": str, "versions": str, "global_step": int, "rng": torch.Tensor}
    kinds |= dict.fromkeys(("args", "agent", "optimizer", "envs", "obs_stats", "log_sizes"), dict)
    fits = isinstance(state, dict) and all(isinstance(state.get(k), kinds[k]) for k in kinds)
    if not fits or state["script"] != Path(__file__).stem:
        fail(f"{path} is no state of {Path(__file__).name}")
    return state


class Envs:
    """`num_envs` games side by side in ALE's vector environment; one that ends is followed by the
    next. Seed and actions give a game back exactly, so a state holds no more of it. Observations
    (E, 4, 84, 84) uint8 are the last four frames, zeros before a game's first."""

    def __init__(self, args, num_envs, stream, obs_stats=None):
        self.obs_stats, self.simulator = {}, "ale-py"
        gym.register_envs(ale_py)
        games = [name for name in gym.registry if re.fullmatch(r"ALE/\w+-v5", name)]
        if args.env_id not in games:
            name = re.sub(r"^ALE/|(-ram)?(NoFrameskip|Deterministic)?-v\d+$", "", args.env_id)
            nearest = difflib.get_close_matches(f"ALE/{name}-v5", games, 1, 0)[0]
            fail(f"--env-id {args.env_id} is no game with images; the nearest name is {nearest}")
        self.settings = {  # what decides the frames
            "frameskip": args.frameskip,
            "repeat_action_probability": args.sticky,
            "maxpool": args.maxpool,
            "noop_max": args.noop_max,
            "use_fire_reset": args.fire_reset,
        }
        # Where a game ends, ALE shows the frame before once more. After a termination its value
        # counts nowhere; a time limit's would, so the steps are counted here and ALE has no limit
        self.limit = math.ceil(args.max_episode_frames / args.frameskip)
        self.envs = AtariVectorEnv(
            gym.spec(args.env_id).kwargs["game"],
            num_envs,
            num_threads=args.env_threads,
            life_loss_info=args.episodic_life,  # `episodic_life` would begin a new game
            reward_clipping=False,
            max_num_frames_per_episode=2**31 - 1,
            **self.settings,
        )
        self.envs.reset(seed=0)  # all must be reset together once before one can be alone
        self.action_dim = int(self.envs.single_action_space.n)
        self.sign_reward, self.episodic_life = args.sign_reward, args.episodic_life
        self.rng = np.random.default_rng([args.seed, stream])
        self.mask_rng = np.random.default_rng([args.seed, stream + 1])
        self.seeds, self.returns = np.zeros(num_envs, np.int64), np.zeros(num_envs)
        self.actions = [[] for _ in range(num_envs)]  # of the games that go on
        self.finished = []  # (return, length) of the games that ended since the last log

    @contextlib.contextmanager
    def blamed(self):
        """What goes wrong inside the emulators ends the run and says where."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            games = [f"seed {x} step {len(y)}" for x, y in zip(self.seeds, self.actions)]
            fail(f"the emulator crashed ({', '.join(games)}): {error!r}; {Run.go_on}", code=1)

    def start(self, which):
        """Start the games of the mask `which` (E,) from their seeds: the observations of all."""
        with self.blamed():
            self.obs, info = self.envs.reset(seed=self.seeds[which], options={"reset_mask": which})
        self.lives = info["lives"]
        return self.obs.copy()

    def start_next(self, which):
        """Start the next games where the mask `which` (E,) says so: the observations of all."""
        self.seeds[which] = self.rng.integers(2**31, size=which.sum())
        self.returns[which] = 0
        for i in np.flatnonzero(which):
            self.actions[i] = []
        return self.start(which)

    def reset(self):
        return self.start_next(np.ones(len(self.seeds), bool))

    def step(self, actions):
        """One step with the `actions` (E,): the next observations (E, 4, 84, 84), rewards,
        terminations and truncations (E,), and the last observations of episodes that ended."""
        with self.blamed():
            self.obs, rewards, terminations, _, info = self.envs.step(actions)
        self.returns += rewards
        for played, action in zip(self.actions, actions.tolist()):
            played.append(action)
        lengths = np.array([len(played) for played in self.actions])
        life_lost = (0 < info["lives"]) & (info["lives"] < self.lives)  # else the game is over
        self.lives = info["lives"]
        out_of_time = lengths >= self.limit
        over = terminations & ~(life_lost & self.episodic_life) | out_of_time
        truncations = out_of_time & ~terminations
        self.finished += zip(self.returns[over].tolist(), lengths[over].tolist())
        final_obs = list(self.obs[terminations | truncations])
        next_obs = self.start_next(over) if over.any() else self.obs.copy()
        rewards = np.sign(rewards) if self.sign_reward else rewards
        return next_obs, rewards, terminations, truncations, final_obs

    def collect(self, agent, num_steps, seed):
        """The frames that the agent's sampled actions lead to, each once, (num_steps + 1, 84, 84)
        uint8, the first of zeros, and the index (num_steps, 4) of each state's four."""
        frames = torch.zeros(num_steps + 1, 84, 84, dtype=torch.uint8)
        index = torch.zeros(num_steps, 4, dtype=torch.int64)
        n, next_obs, device = 0, self.reset(), next(agent.parameters()).device
        generator, num_envs = torch.Generator().manual_seed(seed), len(self.seeds)
        for noise in agent.noise(-(-num_steps // num_envs), num_envs, generator):
            for i in range(min(num_envs, num_steps - n)):
                n += 1
                stack = [n - k * num_envs if k <= len(self.actions[i]) else 0 for k in (3, 2, 1, 0)]
                frames[n], index[n - 1] = torch.from_numpy(next_obs[i, -1]), torch.tensor(stack)
            actions = agent.sample(torch.from_numpy(next_obs).to(device), noise.to(device))
            next_obs, *_ = self.step(actions.cpu().numpy())
        return frames, index

    def state_dict(self):
        return {
            "rngs": [rng.bit_generator.state for rng in (self.rng, self.mask_rng)],
            "settings": self.settings,
            "seeds": self.seeds.tolist(),
            "actions": [torch.tensor(actions, dtype=torch.uint8) for actions in self.actions],
            "returns": self.returns.tolist(),
            "obs": torch.from_numpy(self.obs.copy()),
            "finished": list(self.finished),
        }

    def load_state_dict(self, state, obs_stats, reseeded):
        """Play the games again, side by side, so that all arrive together; or start others where
        there are more or fewer of them, or a setting that decides their frames is another."""
        if not reseeded:
            self.rng.bit_generator.state, self.mask_rng.bit_generator.state = state["rngs"]
        if state["settings"] != self.settings or len(state["seeds"]) != len(self.seeds):
            return self.reset()
        self.seeds[:], self.returns[:] = state["seeds"], state["returns"]
        self.actions = [actions.tolist() for actions in state["actions"]]
        lengths = np.array([len(actions) for actions in self.actions])
        waits = lengths.max() - lengths  # steps until a game begins
        for t in range(lengths.max() + 1):
            if (waits == t).any():
                self.start(waits == t)
            if t < lengths.max():
                actions = [x[t - wait] if t >= wait else 0 for x, wait in zip(self.actions, waits)]
                with self.blamed():
                    self.obs, *_, info = self.envs.step(np.array(actions))
                self.lives = info["lives"]
        if not np.array_equal(self.obs, state["obs"].numpy()):
            say("the emulator is another one (replayed games end elsewhere): the run differs")
        self.finished = [tuple(episode) for episode in state["finished"]]
        return self.obs.copy()


class Run:
    """The folder of a run: a lock, args.json, event files for TensorBoard, and states.
    A state (latest.pt, and those kept as checkpoints/STEP.pt) holds all that decides how the run
    goes on. The event files are on disk before the state that counts on them, and are cut back to
    the sizes that it remembers, so that they show every point once."""

    go_on = "nothing was started"  # what a message about a fault ends with
    columns = {  # of the rows in the terminal
        "return": "charts/episodic_return",
        "actor rank": "representation/actor/pca_rank",
        "dead": "representation/actor/dead_neurons",
        "norm": "representation/actor/preactivation_norm",
        "ratio below": "trust_region/ratio_mean_below",
        "capacity": "capacity/actor",
    }

    def __init__(self, args):
        self.dir, self.scalars = Path(args.runs_dir, args.run_name), {}  # last value of each tag
        if args.resume and not args.run_name:
            fail("--resume needs the --run-name of the run to go on with")
        self.resumed = self.newest_state() if args.resume else None  # its own state, or None
        self.saved = self.resumed or (read_state(args.fork_from) if args.fork_from else None)
        self.args = self.inherit(args) if self.saved else args
        check(self.args)
        name = f"{self.args.env_id}__{Path(__file__).stem}__{self.args.seed}__{int(time.time())}"
        self.args.run_name = args.run_name or re.sub(r"[/\\:]", "-", name)
        self.dir = Path(args.runs_dir, self.args.run_name)
        if self.dir.exists() and not args.resume:
            fail(f"{self.dir} exists: choose another --run-name, or --resume to go on with it")

    def newest_state(self):
        """The newest state of the folder that can be read; None where there is no state."""
        kept = [path for path in self.dir.glob("checkpoints/*.pt") if path.stem.isdecimal()]
        kept.sort(key=lambda path: int(path.stem), reverse=True)
        states = [path for path in (self.dir / "latest.pt", *kept) if path.is_file()]
        if (self.dir / "latest.pt").is_dir():
            fail(f"{self.dir / 'latest.pt'} is a folder: move it away")
        for path in states:
            try:
                return read_state(path)
            except zipfile.BadZipFile as error:
                say(f"{error}: the run goes on from the state before it")
        if states:
            fail(f"no state of {self.dir} can be read: start again under another --run-name")
        say(f"there is no state in {self.dir}: the run starts")

    def inherit(self, args):
        """The flags of the run that is resumed, or of the parent of a fork, less those given."""
        own = {"runs_dir": args.runs_dir, "run_name": args.run_name, "resume": args.resume}
        if not self.resumed:
            own |= {"fork_from": args.fork_from, "fork_step": self.saved["global_step"]}
        try:
            before = Args(**self.saved["args"] | own)
        except (TypeError, ValueError) as error:  # a flag that is gone
            fail(f"the state of {args.fork_from or self.dir} does not fit: {error}")
        args = tyro.cli(Args, default=before)
        then = asdict(before)
        changed = {k: f"{k} {then[k]} is now {x}" for k, x in asdict(args).items() if x != then[k]}
        fixed = {"env_id", "width", "share_trunk", "policy_std"}  # what the weights fit
        if self.resumed:  # what may change touches nothing that was computed
            free = {"cuda", "track", "" if args.anneal_lr else "total_timesteps"}
            fixed = {k for k in changed if k not in free and not k.endswith("_interval")}
        wrong = "; ".join(text for name, text in changed.items() if name in fixed)
        if wrong:
            fail(f"what the run was made with cannot change: {wrong}; leave that out, or fork")
        what = self.dir if self.resumed else f"a fork of {args.fork_from}, step {args.fork_step}"
        if changed or not self.resumed:
            say(f"{what}: {'; '.join(changed.values()) or 'as it was'}")
        return args

    def start(self, agent, optimizer, envs):
        """Bring all parts to the saved state or reset them, open the folder: next_obs and step."""
        self.agent, self.optimizer, self.envs = agent, optimizer, envs
        device = torch.cuda.get_device_name() if next(agent.parameters()).is_cuda else "CPU"
        versions = [f"{x} {version(x)}" for x in ("torch", "numpy", "gymnasium", envs.simulator)]
        self.versions = ", ".join([device, f"{torch.get_num_threads()} threads", *versions])
        step = self.saved["global_step"] if self.saved else 0
        try:
            next_obs = self.restore(**self.saved) if self.saved else envs.reset()
        except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
            fail(f"the state of {self.args.fork_from or self.dir} does not fit: {str(error)[:300]}")
        if self.args.track:
            run_id = re.sub(r"[^a-zA-Z0-9_-]", "-", self.args.run_name)
            settings = {"config": asdict(self.args), "sync_tensorboard": True, "resume": "allow"}
            try:
                wandb = importlib.import_module("wandb")
                wandb.init(name=self.args.run_name, id=run_id, **settings)
            except Exception as error:  # not installed, or no login
                fail(f"--track needs Weights & Biases (pip install wandb; wandb login): {error}")
        try:
            self.dir.mkdir(parents=True, exist_ok=self.args.resume)
        except FileExistsError:
            fail(f"{self.dir} is being started by another process")
        except OSError as error:
            fail(f"--runs-dir: {self.dir} cannot be made ({error.strerror})")
        self.lock = filelock.FileLock(self.dir / ".lock", timeout=0, fallback_to_soft=False)
        self.lock.acquire()
        where = f"--runs-dir {self.args.runs_dir} --run-name {self.dir.name}"
        Run.go_on = f"python {Path(sys.argv[0]).name} {where} --resume goes on from its last state"
        (self.dir / "checkpoints").mkdir(exist_ok=True)
        (self.dir / "args.json").write_text(json.dumps(asdict(self.args), indent=2))
        sizes = self.saved["log_sizes"] if self.resumed else {}
        for path in {self.dir / name for name in sizes} | set(self.dir.glob("events.*")):
            if not path.exists() or path.stat().st_size < sizes.get(path.name, 0):
                fail(f"{path} is shorter than it was: bring it back, or use another --run-name")
            os.truncate(path, sizes.get(path.name, 0))
        self.writer = SummaryWriter(self.dir)
        if not self.resumed:
            rows = "".join(f"|{name}|{value}|\n" for name, value in asdict(self.args).items())
            self.writer.add_text("hyperparameters", "|flag|value|\n|-|-|\n" + rows, step)
        self.save(step, [f"checkpoints/{step}.pt"] * (not self.resumed) + ["latest.pt"])
        tqdm.write(f"{self.dir} from step {step} on")
        tqdm.write(f"{'step':>12}" + "".join(f"{name:>13}" for name in self.columns))
        return next_obs, step

    def restore(self, agent, optimizer, envs, obs_stats, rng, args, versions, scalars, **_):
        """Bring all parts to where a state left them; Adam's settings are the flags': next_obs."""
        if versions != self.versions:
            say(f"not bit for bit from here on: it was {versions}, and is {self.versions}")
        reseeded, self.scalars = args["seed"] != self.args.seed, scalars
        self.agent.load_state_dict(agent)
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": optimizer["state"]})
        next_obs = self.envs.load_state_dict(envs, obs_stats, reseeded)
        if not reseeded:
            torch.set_rng_state(rng)
        return next_obs

    def log(self, scalars, step, row=False):
        """Write the dict {"group": {"name": number}}, what is not finite as NaN; print a `row`."""
        flat = {f"{group}/{name}": x for group, part in scalars.items() for name, x in part.items()}
        for tag, value in flat.items():
            self.scalars[tag] = float(value) if math.isfinite(value) else math.nan
            self.writer.add_scalar(tag, self.scalars[tag], step)
        if row:
            cells = (f"{self.scalars.get(tag, math.nan):13.4g}" for tag in self.columns.values())
            tqdm.write(f"{step:12,}" + "".join(cells))

    def save(self, global_step, names):
        """Write all that the run needs to go on from here into the files `names` of its folder."""
        self.writer.flush()
        sizes = {}
        for path in self.dir.glob("events.*"):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            sizes[path.name] = path.stat().st_size
        state = {"script": Path(__file__).stem, "versions": self.versions, "log_sizes": sizes}
        state |= {"args": asdict(self.args), "global_step": global_step, "scalars": self.scalars}
        state |= {"agent": self.agent.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"envs": self.envs.state_dict(), "obs_stats": self.envs.obs_stats}
        buffer = io.BytesIO()
        torch.save(state | {"rng": torch.get_rng_state()}, buffer)
        for path in (self.dir / name for name in names):  # each at once or not at all
            with open(f"{path}.tmp", "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{path}.tmp", path)

    def close(self):
        self.writer.close()
        self.lock.release()
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
    tqdm.get_lock()  # takes a moment, in which Ctrl-C would break tqdm
    try:
        main()
    except KeyboardInterrupt:
        fail(f"interrupted; {Run.go_on}", code=130)
    except zipfile.BadZipFile as error:
        fail(error)
    except filelock.Timeout as error:
        fail(f"another process is at work on this run: {error.lock_file}")
    except OSError as error:
        fail(f"{error}; {Run.go_on}", code=1)
    except (MemoryError, torch.OutOfMemoryError):
        fail("out of memory: use a smaller --minibatch-size, --num-envs, ... or --no-cuda", code=1)

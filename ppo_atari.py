"""PPO-Clip on Atari, with the diagnostics that show its representation collapse (arXiv 2405.00662).

    python ppo_atari.py --update-epochs 8 --compile --tf32
    python ppo_atari.py --update-epochs 8 --compile --tf32 --pfo-coef 1

Each command trains Phoenix for 100 million frames, the second one with PFO (equation 2). On a GPU
this takes three to four hours (estimated from its speed on an H200; these runs were not made). On
a CPU, four changed lines and two commands in .results/atari.md show a collapse in twenty minutes:
an agent learns CrazyClimber, continues at ten times the learning rate, and loses rank and return.
The paper also uses NameThisGame, DoubleDunk, Qbert, Gravitar and BattleZone.

Main differences from CleanRL's ppo_atari.py: the paper's environment (sticky actions, frameskip 3;
a lost life ends no episode; no no-ops or FIRE), no value clipping, a constant learning rate,
PyTorch's initialisation, and actor and critic as separate networks with separate gradient clipping.
`global_step` counts frames, as in the paper. You can stop reading at the end of `main`: the rest is
diagnostics, environments, and the code that saves runs.
"""

import contextlib
import copy
import difflib
import importlib.util
import io
import json
import math
import os
import re
import shlex
import shutil
import sys
import time
import traceback
import zipfile
import zlib
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints
from unittest import mock

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
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

# Flag types with their smallest and largest value
Fraction = Annotated[float, (0, 1)]
Decay = Annotated[float, (0, 1 - 1e-6)]
Coefficient = Annotated[float, (0, 1e6)]
Positive = Annotated[float, (1e-12, 1e6)]
Count = Annotated[int, (1, 10**12)]
Threads = Annotated[int, (0, 256)]
Seed = Annotated[int, (0, 2**32 - 1)]


@dataclass
class Args:
    """PPO-Clip on Atari with the diagnostics and interventions of arXiv 2405.00662.
    Intervals are fractions of the run, in whole iterations (rollout and update); 0 disables."""

    # Experiment

    env_id: str = "ALE/Phoenix-v5"  # the game, as ALE/NAME-v5
    seed: Seed = 1  # seed of all random generators (the paper uses 25, 7, 64, 27 and 4)
    total_timesteps: Count = 100_000_000  # frames, rounded down to whole iterations
    torch_threads: Threads = 0  # CPU threads; 0 lets torch choose
    env_threads: Threads = 0  # threads of the emulators; 0: one per game, at most one per CPU
    cuda: bool = True  # use a GPU if there is one
    tf32: bool = False  # let a GPU multiply in TF32: faster, but with 10 bits of mantissa
    compile: bool = False  # compile gradient step and rollout, which takes about a minute
    runs_dir: str = "runs"  # folder that holds all runs
    run_name: str = ""  # name of the run's folder; by default made from its flags and time
    resume: bool = False  # continue the run --run-name with its own flags, if it exists
    fork_from: str = ""  # start from this checkpoint; flags that you omit are those of its run
    fork_step: tyro.conf.Suppress[int] = 0  # step of that checkpoint
    track: bool = False  # also log to Weights & Biases (pip install wandb)

    # PPO

    learning_rate: Positive = 2.5e-4  # learning rate of Adam
    anneal_lr: bool = False  # lower the learning rate linearly to 0 over the run
    num_envs: Count = 8  # number of environments
    num_steps: Count = 128  # steps per environment and iteration
    gamma: Fraction = 0.99  # discount factor
    gae_lambda: Fraction = 0.95  # lambda of generalised advantage estimation (GAE)
    minibatch_size: Count = 256  # samples per gradient step; an incomplete minibatch is dropped
    update_epochs: Count = 4  # epochs per batch (the paper uses 4, 6 and 8)
    clip_coef: Positive = 0.1  # epsilon of PPO-Clip
    ent_coef: Coefficient = 0.01  # coefficient of the entropy bonus; 0 disables it
    vf_coef: Coefficient = 0.5  # coefficient of the squared error of the values
    max_grad_norm: Positive = 0.5  # clip the gradient of each network to this norm
    target_kl: Coefficient = 0.0  # stop an update after an epoch with a larger KL; 0: never
    # at a time limit, end the return or bootstrap it with the value
    time_limit: Literal["terminate", "bootstrap"] = "terminate"
    max_episode_frames: Count = 108_000  # time limit of a game in frames, without its no-ops
    frameskip: Annotated[int, (1, 4096)] = 3  # frames per action
    sticky: Fraction = 0.25  # probability that a frame repeats the previous action; 0 disables it
    maxpool: bool = False  # observe the maximum of the last two frames
    noop_max: Annotated[int, (0, 1000)] = 0  # largest number of no-ops at a game's start
    fire_reset: bool = False  # press FIRE at the start of a game
    episodic_life: bool = False  # a lost life ends the return for learning; the game continues
    sign_reward: bool = True  # learn from the sign of the reward; the raw return is logged
    activation: Literal["tanh", "relu"] = "relu"  # activation of both networks
    width: Count = 512  # units of the hidden linear layer

    # Interventions

    # coefficient of PFO, Proximal Feature Optimization (the paper: 1; 10 for all layers); 0: no PFO
    pfo_coef: Coefficient = 0.0
    pfo_layers: Literal["last", "all"] = "last"  # hidden layers that PFO regularises
    pfo_reduction: Literal["mean", "sum"] = "mean"  # mean over units (authors' code) or sum (eq. 2)
    share_trunk: bool = False  # actor and critic share one trunk
    reset_adam: bool = False  # reset Adam's moments after every batch
    adam_beta1: Decay = 0.9  # decay of Adam's first moment
    adam_beta2: Decay = 0.999  # decay of Adam's second moment (the paper also uses 0.9)
    reward_keep_prob: Fraction = 1.0  # probability of keeping a reward (Figure 35 uses 0.1)

    # Diagnostics

    log_interval: Fraction = 0.001  # interval between two points of the curves
    capacity_interval: Fraction = 0.025  # interval between two fits of the capacity loss
    capacity_steps: Count = 36_000  # states per fit of the capacity loss
    capacity_envs: Count = 1  # environments that collect those states
    capacity_epochs: Count = 1  # epochs of a fit
    capacity_data: Literal["target", "initial"] = "target"  # the network that collects these states
    snapshot_interval: Fraction = 0.025  # interval between two checkpoints that are kept
    checkpoint_interval: Fraction = 0.001  # interval between two saves of latest.pt


class Outputs(NamedTuple):
    """The outputs of the networks for a batch of B observations."""

    policy: torch.Tensor  # (B, P), as Agent describes it
    values: torch.Tensor  # (B,)
    actor_preactivations: torch.Tensor  # (B, D), of the last hidden layer
    critic_preactivations: torch.Tensor  # (B, D), of the last hidden layer
    pfo_preactivations: torch.Tensor  # (B, K), the actor's preactivations that PFO regularises


class Agent(nn.Module):
    """Actor and critic. A policy (B, A) holds the log-probabilities of the actions."""

    def __init__(self, envs, args):
        super().__init__()
        self.action_dim = envs.action_dim
        self.pfo_all_layers = args.pfo_layers == "all"
        self.activation = nn.Tanh() if args.activation == "tanh" else nn.ReLU()

        def trunk():  # the last activation is left out, so that a trunk returns preactivations
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
        # Gradients are clipped per group: actor and critic separately, or both together
        named = list(self.named_parameters())
        networks = [""] if args.share_trunk else ["actor", "critic"]
        self.groups = [[p for name, p in named if name.startswith(x)] for x in networks]
        assert sum(map(len, self.groups)) == len(named), "name parameters actor_... or critic_..."

    def scaled(self, obs):
        """uint8 -> [0, 1], channels last, which saves up to a quarter of a CPU's gradient step."""
        return (obs / 255).contiguous(memory_format=torch.channels_last)

    def preactivations(self, trunk, x):
        """The inputs of the trunk's activations and its output, in order."""
        outputs = []
        for layer in trunk:
            if layer.__module__ == nn.Tanh.__module__:  # any activation of torch.nn
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
        pfo = torch.cat([x.flatten(1) for x in actor], 1) if self.pfo_all_layers else actor[-1]
        return Outputs(self.policy(actor[-1]), values, actor[-1], critic[-1], pfo)

    def noise(self, num_steps, num_envs, generator=None):
        """(T, E, A) standard Gumbel noise for `sample`."""
        exponential = torch.empty(num_steps, num_envs, self.action_dim)
        return -exponential.exponential_(generator=generator).log()

    @torch.no_grad()
    def sample(self, obs, noise):
        """Actions (E,) for obs (E, 4, 84, 84) and noise (E, A); only the actor runs."""
        return (self.policy(self.actor_trunk(self.scaled(obs))) + noise).argmax(-1)

    def log_prob(self, policy, actions):
        """(B,) log-probabilities of the actions (B,)."""
        return policy.gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def entropy(self, policy):
        """(B,) entropies."""
        return -(policy.exp() * policy).sum(-1)

    def kl(self, policy, other):
        """(B,) KL(policy || other), in float64. Adding exp(other) - exp(policy), which
        sums to 0, makes no term negative, so that nearly equal policies lose no digits."""
        policy = policy.double()
        other = other.double()
        return (policy.exp() * (policy - other) - policy.exp() + other.exp()).sum(-1)

    def policy_stats(self, policy, actions):
        """The numbers logged as policy/NAME: variance of the probabilities over states, entropy."""
        return {"variance": policy.exp().var(0).mean(), "entropy": self.entropy(policy).mean()}


@torch.no_grad()
def evaluate(agent, obs):
    """The Outputs for `obs` (N, ...), computed in chunks to save memory."""
    chunks = [agent(chunk) for chunk in obs.split(1024)]
    return Outputs(*map(torch.cat, zip(*chunks)))


def compute_gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
    """Advantages and returns (T, E) of generalised advantage estimation (Schulman et al. 2015).
    Tensors are (T, E). `next_values` holds the value of the observation after each step. At the end
    of an episode this is its last observation, and the value is ignored if the episode terminated.
    No advantage flows across `dones`."""
    deltas = rewards + gamma * (1 - terminations.to(values.dtype)) * next_values - values
    decay = gamma * gae_lambda * (1 - dones.to(values.dtype))
    advantages = torch.empty_like(deltas)
    last = torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        last = deltas[t] + decay[t] * last
        advantages[t] = last
    return advantages, advantages + values


def minibatches(batch, minibatch_size):
    """Yield the minibatches of one epoch: dicts of tensors (B, ...), cut from the tensors (N, ...)
    of the dict `batch` in random order. An incomplete last minibatch is dropped."""
    num_minibatches = len(batch["obs"]) // minibatch_size
    order = torch.randperm(len(batch["obs"]))[: num_minibatches * minibatch_size]
    order = order.to(batch["obs"].device, non_blocking=True)
    parts = [x[order].unflatten(0, (num_minibatches, minibatch_size)) for x in batch.values()]
    for minibatch in zip(*parts):
        yield dict(zip(batch, minibatch))


def pfo_loss(preactivations, old_preactivations, reduction="mean"):
    """Proximal Feature Optimization (equation 2): mean squared change of preactivations (B, K).
    Equation 2 has a "sum" over K, but the paper's coefficients were used with the "mean"."""
    value = (preactivations - old_preactivations).square().mean()
    return value if reduction == "mean" else value * preactivations.shape[1]


def ppo_gradient(agent, args, obs, actions, logprobs, advantages, returns, old_pfo_preactivations):
    """The clipped gradients of PPO-Clip's loss (equation 1) with value loss, entropy bonus and PFO
    on a minibatch, whose tensors all start with (B,). Also returns a dict of scalars or (B,)
    tensors, whose means are logged as losses/NAME, and the policies (B, ...)."""
    std, mean = torch.std_mean(advantages, correction=0)
    advantages = (advantages - mean) / std.clamp_min(1e-6)
    new = agent(obs)
    logratio = agent.log_prob(new.policy, actions) - logprobs
    ratio = logratio.clamp(math.log(1e-7), math.log(1e9)).exp()
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped_ratio * advantages).mean()
    value_loss = args.vf_coef * F.mse_loss(new.values, returns)
    pfo = pfo_loss(new.pfo_preactivations, old_pfo_preactivations, args.pfo_reduction)
    losses = {"policy_loss": policy_loss, "value_loss": value_loss, "pfo_loss": pfo}
    loss = policy_loss + value_loss
    if args.ent_coef:
        loss = loss - args.ent_coef * agent.entropy(new.policy).mean()
    if args.pfo_coef:  # 0 * inf would be NaN
        loss = loss + args.pfo_coef * pfo
    gradients, norms = clipped_gradient(agent, loss, args.max_grad_norm)
    losses |= {"actor_grad_norm": norms[0], "critic_grad_norm": norms[-1]}
    logratio = logratio.detach()  # Schulman, "Approximating KL Divergence"
    losses |= {"old_approx_kl": -logratio, "approx_kl": logratio.expm1() - logratio}
    losses["clipfrac"] = (ratio != clipped_ratio).float()
    return gradients, {name: x.detach() for name, x in losses.items()}, new.policy.detach()


def clipped_gradient(agent, loss, max_grad_norm):
    """The clipped gradient of `loss`, one vector per group, and the norms before clipping."""
    parameters = [p for group in agent.groups for p in group]
    gradient = flat_vector(torch.autograd.grad(loss, parameters))
    parts = gradient.split([sum(p.numel() for p in group) for group in agent.groups])
    norms = [part.norm() for part in parts]
    scales = [(max_grad_norm / (norm + 1e-6)).clamp_max(1) for norm in norms]
    return [part * scale for part, scale in zip(parts, scales)], norms


def make_optimizer(agent, args):
    """Returns Adam and its vectors, one per group of the agent. The agent's parameters become views
    of the vectors. Clipping and updating one tensor instead of many saves two fifths of a
    compiled gradient step on MuJoCo."""
    vectors = [nn.Parameter(flat_vector(group).detach()) for group in agent.groups]
    for group, vector in zip(agent.groups, vectors):
        for p, part in zip(group, vector.detach().split([p.numel() for p in group])):
            p.data = part.view_as(p)
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.Adam(vectors, args.learning_rate, betas, eps=1e-8, fused=True), vectors


def step(optimizer, vectors, gradients):
    """One step of Adam with one gradient per vector."""
    for vector, gradient in zip(vectors, gradients):
        vector.grad = gradient
    optimizer.step()


def learning_rate(args, global_step):
    """The learning rate of the iteration that starts at `global_step`."""
    progress = global_step / args.total_timesteps if args.anneal_lr else 0.0
    return args.learning_rate * (1 - progress)


def main():
    # Setup
    run = Run(tyro.cli(Args))  # a new run, a resumed run or a fork
    args = run.args
    batch_size = args.num_envs * args.num_steps
    steps_per_iteration = batch_size * args.frameskip
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.torch_threads or torch.get_num_threads())
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.tf32
    envs = Envs(args, args.num_envs, stream=0)
    torch.manual_seed(2**32 - 1 - args.seed)  # never equal to the agent's seed
    target = Agent(envs, args).to(device).eval()  # the random network that capacity fits imitate
    torch.manual_seed(args.seed)
    agent = Agent(envs, args).to(device).eval()
    initial_agent = copy.deepcopy(agent)  # run.start may load other weights into `agent`
    optimizer, vectors = make_optimizer(agent, args)
    gradient = compiled(ppo_gradient, device) if args.compile else ppo_gradient
    sample = compiled(agent.sample, device) if args.compile else agent.sample
    shape = (args.num_steps, args.num_envs)
    obs = torch.zeros(*shape, 4, 84, 84, dtype=torch.uint8, device=device)
    actions = torch.zeros(*shape, dtype=torch.int64, device=device)
    rewards = np.zeros(shape, np.float32)
    terminations = np.zeros_like(rewards, bool)
    truncations = np.zeros_like(rewards, bool)

    next_obs, global_step = run.start(agent, optimizer, envs)  # makes the run's folder
    if args.capacity_interval:
        collector = target if args.capacity_data == "target" else initial_agent
        capacity_data = collect_capacity_data(args, envs, collector, target)
        if global_step == 0:
            run.log({"capacity": capacity_loss(agent, args, *capacity_data)}, 0)
    iteration = log_iteration = global_step // steps_per_iteration
    log_time = time.perf_counter()
    num_iterations = iteration + (args.total_timesteps - global_step) // steps_per_iteration
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit=" frames", dynamic_ncols=True)
    while iteration < num_iterations:
        iteration += 1
        logging = due(args.log_interval, iteration, num_iterations)
        scalars = {}

        # Rollout: only the actor runs; one forward pass afterwards gives values and log-probs
        noise = agent.noise(args.num_steps, args.num_envs).to(device)
        final_obs = []  # in the order of `dones`
        for t in range(args.num_steps):
            obs[t].copy_(torch.from_numpy(next_obs), non_blocking=True)
            actions[t] = sample(obs[t], noise[t])
            action = actions[t].cpu().numpy()
            next_obs, rewards[t], terminations[t], truncations[t], ended = envs.step(action)
            final_obs += ended
        if args.reward_keep_prob < 1:
            rewards *= envs.mask_rng.random(rewards.shape) < args.reward_keep_prob
        b_obs = obs.flatten(0, 1)
        b_actions = actions.flatten()
        last_obs = torch.from_numpy(np.stack([*next_obs, *final_obs])).to(device)

        # Advantages
        old = evaluate(agent, b_obs)
        last_values = evaluate(agent, last_obs).values.cpu()
        b_logprobs = agent.log_prob(old.policy, b_actions)
        dones = torch.from_numpy(terminations | truncations)
        terminal = dones if args.time_limit == "terminate" else torch.from_numpy(terminations)
        values = old.values.view(dones.shape).cpu()
        next_values = torch.cat([values[1:], last_values[None, : args.num_envs]])
        next_values[dones] = last_values[args.num_envs :]
        gae_inputs = torch.from_numpy(rewards), values, next_values, terminal, dones
        advantages, returns = compute_gae(*gae_inputs, args.gamma, args.gae_lambda)
        b_advantages = advantages.flatten().to(device)
        b_returns = returns.flatten().to(device)

        # Representation: measured on the networks that collected the batch
        if logging:
            scalars["representation/actor"] = representation(agent, args, "actor", old)
            scalars["representation/critic"] = representation(agent, args, "critic", old)
            scalars["policy"] = agent.policy_stats(old.policy, b_actions)

        # PPO update
        optimizer.param_groups[0]["lr"] = learning_rate(args, global_step)
        batch = {"obs": b_obs, "actions": b_actions, "logprobs": b_logprobs}
        batch |= {"advantages": b_advantages, "returns": b_returns}
        batch["old_pfo_preactivations"] = old.pfo_preactivations
        assert are_views(agent, vectors), "parameters were replaced after make_optimizer"
        all_losses = []
        policies = []
        agent.train()
        for _ in range(args.update_epochs):
            for minibatch in minibatches(batch, args.minibatch_size):
                gradients, losses, policy = gradient(agent, args, **minibatch)
                step(optimizer, vectors, gradients)
                all_losses.append(losses)
                policies.append(policy)
            if args.target_kl and losses["approx_kl"].mean() > args.target_kl:
                break
        agent.eval()
        if args.reset_adam:
            optimizer.state.clear()
        global_step += steps_per_iteration

        # Trust region: the policy after the update against the one before
        if logging:
            new = evaluate(agent, b_obs)
            logratio = agent.log_prob(new.policy, b_actions) - b_logprobs
            drift = new.pfo_preactivations, old.pfo_preactivations, args.pfo_reduction
            scalars["trust_region"] = ratio_stats(logratio, args.clip_coef) | {
                "kl": agent.kl(old.policy, new.policy).mean(),
                "preactivation_drift": pfo_loss(*drift),
            }

        # Capacity loss
        if due(args.capacity_interval, iteration, num_iterations):
            scalars["capacity"] = capacity_loss(agent, args, *capacity_data)

        # Logging
        if logging:
            scalars["charts"] = {"learning_rate": optimizer.param_groups[0]["lr"]}
            if envs.finished:
                means = np.mean(envs.finished, 0)
                scalars["charts"] |= {"episodic_return": means[0], "episodic_length": means[1]}
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
        if not all(vector.isfinite().all() for vector in vectors):
            run.save(global_step, "checkpoints/diverged.pt")  # a run never resumes from this file
            what = "parameters" if b_obs.isfinite().all() else "observations and parameters"
            fail(f"{what} are not finite at step {global_step}: checkpoints/diverged.pt", code=1)
        if due(args.snapshot_interval, iteration, num_iterations):
            run.save(global_step, f"checkpoints/{global_step}.pt", "latest.pt")
        elif due(args.checkpoint_interval, iteration, num_iterations):
            run.save(global_step, "latest.pt")

    bar.close()
    run.close()


@torch.no_grad()
def feature_ranks(features):
    """The five rank measures of the paper's appendix E for `features` (N, D): a dict of floats.

    They use the singular values of the uncentred matrix: `effective_rank` (Roy &
    Vetterli 2007), `pca_rank` (Yang et al. 2020; the paper's figures), `srank` (Kumar et al. 2021),
    `feature_rank` (Lyle et al. 2022), `torch_rank` (torch.linalg.matrix_rank). All are 0 for a zero
    or empty matrix and NaN if an entry is not finite."""
    delta = 0.01
    eps = torch.finfo(features.dtype).eps
    rounding = max(10 * eps, 1e-9)  # tolerance for rounding in the sums, so that exact ties count
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
    """The number of dead neurons among the columns of `features` (N, D) (footnote 7). A dead neuron
    is 0 on all samples ("relu"), or its standard deviation is below 0.001 ("tanh"). NaN is not
    dead. Raises ValueError for another `activation`."""
    if activation not in ("relu", "tanh"):
        raise ValueError(f'activation must be "relu" or "tanh", not {activation!r}')
    dead = (features == 0).all(0) if activation == "relu" else features.std(0) < 0.001
    return int(dead.sum())


@torch.no_grad()
def ratio_stats(logratio, clip_coef):
    """How far the probability ratios leave the clipping limits (section 3.2): a dict of floats.

    `logratio` holds log pi_new(a|s) - log pi_old(a|s), in any shape. `ratio_mean_above` and
    `ratio_mean_below` are means over the samples beyond the limits, or NaN if there are none.
    `ratio_excess` is their quotient. `frac_above` and `frac_below` are the shares of these samples.
    Means and extremes are clamped to [1e-12, 1e12] (appendix B.3), so that a diverged policy still
    gives a number."""
    ratio = logratio.double().exp().flatten()
    above = ratio > 1 + clip_coef
    below = ratio < 1 - clip_coef
    smallest, largest = ratio.aminmax() if len(ratio) else (ratio.mean(), ratio.mean())
    stats = {"ratio_mean_above": ratio[above].mean(), "ratio_mean_below": ratio[below].mean()}
    stats |= {"ratio_max": largest, "ratio_min": smallest}
    stats = {name: x.clamp(1e-12, 1e12).item() for name, x in stats.items()}
    stats["ratio_excess"] = stats["ratio_mean_above"] / stats["ratio_mean_below"]
    shares = {"frac_above": above.double().mean(), "frac_below": below.double().mean()}
    return stats | {name: x.item() for name, x in shares.items()}


@torch.no_grad()
def representation(agent, args, network, outputs):
    """Ranks, dead neurons and L2 norms of the `network` ("actor" or "critic"): a dict of numbers.
    They describe its last hidden layer; `outputs` are the Outputs for N states. Norms are means
    over the states, but `weight_norm` is the norm of all weights and biases."""
    preactivations = getattr(outputs, f"{network}_preactivations")
    features = agent.activation(preactivations)
    trunk = getattr(agent, f"{network}_trunk")
    head = getattr(agent, f"{network}_head")
    weights = nn.utils.parameters_to_vector([*trunk.parameters(), *head.parameters()])
    return feature_ranks(features) | {
        "dead_neurons": dead_neurons(features, args.activation),
        "preactivation_norm": preactivations.norm(dim=1).mean().item(),
        "feature_norm": features.norm(dim=1).mean().item(),
        "weight_norm": weights.norm().item(),
    }


def quadrature():
    """Nodes and weights (2, 32) of Gauss-Hermite quadrature for the mean over a standard Normal,
    and of Gauss-Legendre quadrature from -9 to 9 with 16 nodes on each side of 0."""
    u, weights = np.polynomial.hermite_e.hermegauss(32)
    hermite = torch.tensor(np.array([u, weights / sum(weights)])).float()
    x, weights = np.polynomial.legendre.leggauss(16)
    u = 4.5 * np.concatenate([x - 1, x + 1])
    return hermite, torch.tensor(np.array([u, 4.5 * np.tile(weights, 2)])).float()


HERMITE, LEGENDRE = quadrature()


@torch.no_grad()
def capacity_target(target, frames, index):
    """The capacity data: the N states are frames[index]; target's policies (N, P), values (N,)."""
    device = next(target.parameters()).device
    outputs = [target(frames[chunk].to(device))[:2] for chunk in index.split(1024)]
    return frames, index, *(torch.cat(parts) for parts in zip(*outputs))


def collect_capacity_data(args, envs, collector, target):
    """The capacity data of a run: states that `collector` visits in separate environments, and
    the outputs of `target` for them. Does not change torch's random generator."""
    with torch.random.fork_rng(devices=[]):  # a task may draw from it
        capacity_envs = Envs(args, args.capacity_envs, stream=2, obs_stats=envs.obs_stats)
        states = capacity_envs.collect(collector, args.capacity_steps, seed=args.seed)
    return capacity_target(target, *states)


def capacity_loss(agent, args, frames, index, target_policies, target_values, adam_state=None):
    """The loss that remains after a copy of the agent was fitted to a random target (section 2).

    The actor's loss is the mean KL(target || copy); the critic's loss is the mean squared error.
    Adam has the run's settings, and starts fresh or from `adam_state`. A fit has `capacity_epochs`
    epochs and its own random generator, so that every fit uses the same shuffles. Returns floats:
    `actor` and `critic` are the losses on all data after the fit, `actor_last_minibatch` and
    `critic_last_minibatch` are those on its last minibatch, before the gradient step."""
    device = target_values.device
    copied = copy.deepcopy(agent).train()
    optimizer, vectors = make_optimizer(copied, args)
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
            loss = actor_last + critic_last
            gradients, _ = clipped_gradient(copied, loss, args.max_grad_norm)
            step(optimizer, vectors, gradients)
    copied.eval()
    with torch.no_grad():
        chunks = [losses(rows) for rows in torch.arange(len(index)).split(1024)]
    actor, critic = (torch.cat(parts).mean() for parts in zip(*chunks))
    names = ("actor", "critic", "actor_last_minibatch", "critic_last_minibatch")
    return {k: x.item() for k, x in zip(names, (actor, critic, actor_last, critic_last))}


# The rest is not part of PPO: compilation, messages, flags, environments, the folder of a run


def compiled(function, device):
    """Compile `function` as one graph. On CUDA it is a CUDA graph; its outputs are copied, because
    the next replay overwrites them."""
    torch._dynamo.config.trace_autograd_ops = True  # backward and clipping in the same graph
    torch._inductor.config.fallback_random = True  # the random numbers of the eager script
    torch._inductor.config.cpp_wrapper = device.type == "cpu"  # a tenth faster
    if device.type == "cpu":
        return torch.compile(function, fullgraph=True)
    graph = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    return lambda *args, **kwargs: tree_map(torch.clone, graph(*args, **kwargs))


def flat_vector(tensors):
    return torch.cat([x.flatten() for x in tensors])


def are_views(agent, vectors):
    """True if the agent's parameters are views of the vectors, so that a step trains the agent."""
    storages = {vector.untyped_storage().data_ptr() for vector in vectors}
    return storages == {p.untyped_storage().data_ptr() for p in agent.parameters()}


def say(message):
    """Print one line on stderr without breaking the progress bar."""
    tqdm.write(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)


def fail(message, code=2):
    """Print on one line of stderr what is wrong and exit with `code`."""
    say(f"error: {message}")
    raise SystemExit(code)


def due(interval, iteration, num_iterations):
    """True if this iteration is the last, or nearest to a multiple of `interval`; False for 0."""
    period = max(1.0, interval * num_iterations)
    nearest = round(round(iteration / period) * period) == iteration
    return interval > 0 and (nearest or iteration == num_iterations)


def check(args):
    """Exit with one line if a flag is out of its range or flags do not go together."""
    batch_size = args.num_envs * args.num_steps
    hints = get_type_hints(type(args), include_extras=True)
    limits = {k: x.__metadata__[0] for k, x in hints.items() if hasattr(x, "__metadata__")}
    limits["fork_step"] = (0, 10**12)
    limits["minibatch_size"] = (2, batch_size)
    limits["total_timesteps"] = (args.fork_step + batch_size * args.frameskip, 10**12)
    if args.capacity_interval:
        limits["capacity_steps"] = (max(args.minibatch_size, args.capacity_envs), 10**12)
    for field in fields(args):
        value = getattr(args, field.name)
        hint = hints[field.name]
        choices = get_args(hint) if get_origin(hint) is Literal else [value]
        if type(value) is not type(field.default) or value not in choices:  # of a saved run
            fail(f"{field.name} is {value!r}: it must be a value like {field.default!r}")
        if isinstance(value, str) and not value.isprintable():
            fail(f"{field.name} is {value!a}: it must be text that can be printed")
    for name, (smallest, largest) in limits.items():
        value = getattr(args, name)
        if not smallest <= value <= largest:
            flag = name.replace("_", "-")
            fail(f"--{flag} is {value}: it must be from {smallest} to {largest}")
    path = os.fsencode(Path(args.runs_dir, args.run_name))
    if re.search(r"[/\\]|^\.\.?$", args.run_name) or re.search(rb"[^/]{200}", path):
        fail("--run-name: use no slash, and under 200 bytes in it and in each part of --runs-dir")
    if args.track and not importlib.util.find_spec("wandb"):
        fail("--track needs Weights & Biases: pip install wandb")
    compiler = os.environ.get("CXX", "g++")
    preprocess = f'"{compiler}" -E -x c++ {os.devnull} > {os.devnull} 2>&1'
    if args.compile and os.system(preprocess):
        fail(f"--compile needs a C++ compiler, and {compiler} does not work: set CXX to another")


def default_name(args):
    """A run's name: task, script, changed flags (interventions first), seed and time."""
    silent = "env_id|seed|.*_dir|run_name|resume|fork_from|track|cuda|compile|torch_threads"
    silent += "|capacity_.*|.*_interval"
    changed = [
        f"{field.name}={getattr(args, field.name)}"
        for field in reversed(fields(args))
        if getattr(args, field.name) != field.default and not re.fullmatch(silent, field.name)
    ]
    parts = [args.env_id, Path(__file__).stem, ",".join(changed[:5]), args.seed, int(time.time())]
    return re.sub(r"[/\\:]", "-", "__".join(str(part) for part in parts if part != ""))


def read_state(path):
    """The state in a file. Raises BadZipFile if it is damaged or not a state of this script."""
    if not Path(path).is_file():
        raise zipfile.BadZipFile(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch.load would not notice a flipped bit
                raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        step = state["global_step"]
        if state["script"] != Path(__file__).stem or type(step) is not int or step < 0:
            raise ValueError(f"step {step!r} of {state['script']}.py")
        return state
    except Exception as error:  # a damaged file can raise almost anything
        reason = f"{path} is damaged or not a checkpoint of this script: {str(error)[:200]}"
        raise zipfile.BadZipFile(reason) from None


def write_file(path, content):
    """Write bytes to `path` atomically: the file is complete or as it was before."""
    unfinished = path.with_name(f"{path.name}.tmp")
    unfinished.unlink(missing_ok=True)
    with open(unfinished, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


class Envs:
    """`num_envs` games side by side in ALE's vector environment; when one ends, the next begins.
    A game is reproduced exactly from its seed and actions, so a state saves only these.
    Observations (E, 4, 84, 84) uint8 are the last four frames, zeros before a game's first."""

    opened = []  # all environments of this process; they are closed when it ends

    def __init__(self, args, num_envs, stream, obs_stats=None):
        self.obs_stats = {}
        self.simulator = "ale-py"
        gym.register_envs(ale_py)
        games = re.findall(r"ALE/(\w+)-v5", " ".join(gym.registry))
        if args.env_id not in (f"ALE/{game}-v5" for game in games):
            name = re.sub(r"^ALE/|(-ram)?(NoFrameskip|Deterministic)?-v\d+$", "", args.env_id)
            what = "for flat observations use ppo_toy.py train (discrete actions) or ppo_mujoco.py"
            for game in difflib.get_close_matches(name, games, 1, cutoff=0.7):
                what = f"the nearest name is ALE/{game}-v5"
            fail(f"--env-id {args.env_id} is not an Atari game with images; {what}")
        self.settings = {  # these decide the frames
            "frameskip": args.frameskip,
            "repeat_action_probability": args.sticky,
            "maxpool": args.maxpool,
            "noop_max": args.noop_max,
            "use_fire_reset": args.fire_reset,
        }
        # At a game's end ALE repeats the frame before. That is harmless after a termination, whose
        # value is not used, but not at a time limit: so time is counted here
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
        Envs.opened.append(self.envs)
        self.envs.reset(seed=0)  # games can be reset one by one only after all were reset once
        self.action_dim = int(self.envs.single_action_space.n)
        self.sign_reward = args.sign_reward
        self.episodic_life = args.episodic_life
        self.rng = np.random.default_rng([args.seed, stream])
        self.mask_rng = np.random.default_rng([args.seed, stream + 1])
        self.seeds = np.zeros(num_envs, np.int64)
        self.returns = np.zeros(num_envs)
        self.actions = [[] for _ in range(num_envs)]  # of the games in progress
        self.finished = []  # (return, length) of the games that ended since the last log

    def start(self, which):
        """Start the games of the mask `which` (E,) from their seeds. Returns the observations of
        all games."""
        self.obs, info = self.envs.reset(seed=self.seeds[which], options={"reset_mask": which})
        self.lives = info["lives"]
        return self.obs.copy()

    def start_next(self, which):
        """Start new games where the mask `which` (E,) is set. Returns the observations of all."""
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
        self.obs, rewards, terminations, _, info = self.envs.step(actions)
        self.returns += rewards
        for played, action in zip(self.actions, actions.tolist()):
            played.append(action)
        lengths = np.array([len(played) for played in self.actions])
        life_lost = (0 < info["lives"]) & (info["lives"] < self.lives)  # otherwise the game is over
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
        uint8, the first of zeros, and the index (num_steps, 4) of each state's four frames."""
        frames = torch.zeros(num_steps + 1, 84, 84, dtype=torch.uint8)
        index = torch.zeros(num_steps, 4, dtype=torch.int64)
        device = next(agent.parameters()).device
        generator = torch.Generator().manual_seed(seed)
        num_envs = len(self.seeds)
        next_obs = self.reset()
        n = 0
        for noise in agent.noise(-(-num_steps // num_envs), num_envs, generator):
            for i in range(min(num_envs, num_steps - n)):
                n += 1
                stack = [n - k * num_envs if k <= len(self.actions[i]) else 0 for k in (3, 2, 1, 0)]
                frames[n] = torch.from_numpy(next_obs[i, -1])
                index[n - 1] = torch.tensor(stack)
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
        """Replay the saved games, or start new ones if their number or a setting that decides the
        frames differs. All games step together, so shorter ones start later."""
        if not reseeded:
            self.rng.bit_generator.state, self.mask_rng.bit_generator.state = state["rngs"]
        if state["settings"] != self.settings or len(state["seeds"]) != len(self.seeds):
            say("the environments begin new episodes")
            return self.reset()
        self.seeds[:] = state["seeds"]
        self.returns[:] = 0
        self.actions = [actions.tolist() for actions in state["actions"]]
        lengths = np.array([len(actions) for actions in self.actions])
        waits = lengths.max() - lengths  # steps until a game starts
        for t in range(lengths.max() + 1):
            if (waits == t).any():
                self.start(waits == t)
            if t < lengths.max():
                actions = [x[t - wait] if t >= wait else 0 for x, wait in zip(self.actions, waits)]
                self.obs, rewards, *_, info = self.envs.step(np.array(actions))
                self.returns += rewards * (t >= waits)
                self.lives = info["lives"]
        same = np.array_equal(self.obs, state["obs"].numpy())
        if not same or self.returns.tolist() != state["returns"]:
            say("the task does not repeat its episodes, or has changed: the run will differ")
        self.finished = [tuple(episode) for episode in state["finished"]]
        return self.obs.copy()


EVENTS = "events.out.tfevents."  # event files of TensorBoard begin with this


class Run:
    """The folder of a run: a lock, args.json, the script, event files for TensorBoard, and states.
    A state (latest.pt, and those kept as checkpoints/STEP.pt) holds everything that a run needs to
    continue. The event files are on disk before the state that relies on them. A resumed run cuts
    them back to the sizes in its state, so that they show every point once."""

    started = False  # True if this process made or opened a run's folder
    advice = "nothing was started"  # the end of a message about a fault
    columns = {  # of the rows in the terminal
        "return": "charts/episodic_return",
        "rank": "representation/actor/pca_rank",
        "dead": "representation/actor/dead_neurons",
        "norm": "representation/actor/preactivation_norm",
        "low ratio": "trust_region/ratio_mean_below",
        "capacity": "capacity/actor",
    }

    def __init__(self, args):
        self.scalars = {}  # last value of each tag
        self.saved = None  # the state that the run continues from
        self.dir = Path(args.runs_dir, args.run_name)
        self.named = bool(args.run_name)
        if args.resume and not self.named:
            fail("--resume needs the --run-name of the run to continue")
        if self.named and self.dir.exists() and not self.dir.is_dir():
            fail(f"{self.dir} is not a folder: choose another --run-name")
        if self.named and self.dir.exists() and not args.resume:
            fail(f"{self.dir} exists: choose another --run-name, or --resume to continue it")
        self.resumed = args.resume and self.dir.exists()
        if self.resumed:
            self.saved = self.newest_state()
        self.continued = bool(self.saved)  # from a state in its own folder
        # Its flags are known: they are in its state, or in args.json if it has none yet
        self.begun = self.continued or self.resumed and (self.dir / "args.json").is_file()
        if args.fork_from and not self.begun:
            self.saved = read_state(args.fork_from)
        self.args = self.inherit(args) if self.resumed or self.saved else args
        check(self.args)
        self.args.run_name = self.args.run_name or default_name(self.args)
        if self.args.fork_from and not self.saved:  # a fork that ended before its first state
            self.saved = read_state(self.args.fork_from)

    def newest_state(self):
        """The newest state of the folder that can be read; None if there is no state."""
        kept = [path for path in self.dir.glob("checkpoints/*.pt") if path.stem.isdecimal()]
        kept.sort(key=lambda path: int(path.stem), reverse=True)
        states = [path for path in (self.dir / "latest.pt", *kept) if os.path.lexists(path)]
        for path in states:
            try:
                return read_state(path)
            except zipfile.BadZipFile as error:
                say(f"{error}; trying the state before it")
        if states:
            fail(f"no state of {self.dir} can be read: start again under another --run-name")
        say(f"{self.dir} has no state: the run starts from its beginning")

    def inherit(self, args):
        """The flags of the resumed run or of the fork's parent, except those given."""
        own = {"runs_dir": args.runs_dir, "run_name": args.run_name, "resume": args.resume}
        source = args.fork_from if self.saved and not self.begun else self.dir / "args.json"
        try:
            if self.saved:
                flags = self.saved["args"]
            elif source.is_file() and not source.is_symlink():
                flags = json.loads(source.read_text())
            else:
                say(f"{self.dir} has no args.json: the run starts with the flags given now")
                return args
            if not self.begun:
                own |= {"fork_from": args.fork_from, "fork_step": self.saved["global_step"]}
            before = Args(**flags | own)
        except (KeyError, TypeError, ValueError) as error:  # for example a flag that was removed
            fail(f"the flags of {source} do not fit this script: {error}")
        check(replace(before, fork_step=0))  # a run may be forked from its end
        args = tyro.cli(Args, default=before)
        then = asdict(before)
        changed = {k: f"{k} {then[k]} is now {x}" for k, x in asdict(args).items() if x != then[k]}
        fixed = {"env_id", "width", "share_trunk"}  # these decide the shapes of the weights
        if self.begun:  # only what affects no result may change
            free = {"cuda", "track"}
            end = self.saved["global_step"] if self.saved else 0
            steps = range(args.fork_step, end, args.num_envs * args.num_steps)
            longer = replace(before, total_timesteps=args.total_timesteps)
            if all(learning_rate(before, x) == learning_rate(longer, x) for x in steps):
                free.add("total_timesteps")
            fixed = {k for k in changed if k not in free and not k.endswith("_interval")}
        wrong = "; ".join(text for name, text in changed.items() if name in fixed)
        if wrong and self.begun:
            fail(f"a resumed run keeps its flags: {wrong}; leave these out, or use --fork-from")
        if wrong:
            fail(f"a fork keeps the shapes of its networks: {wrong}; leave these out")
        what = self.dir if self.begun else f"a fork of {args.fork_from}, step {args.fork_step}"
        if changed or not self.begun:
            say(f"{what}: {'; '.join(changed.values()) or 'no flag changes'}")
        return args

    def start(self, agent, optimizer, envs):
        """Restore or reset everything and make the folder. Returns next_obs and global_step."""
        self.agent = agent
        self.optimizer = optimizer
        self.envs = envs
        device = torch.cuda.get_device_name() if next(agent.parameters()).is_cuda else "CPU"
        versions = [f"{x} {version(x)}" for x in ("torch", "numpy", "gymnasium", envs.simulator)]
        self.versions = ", ".join([device, f"{torch.get_num_threads()} threads", *versions])
        step = self.saved["global_step"] if self.saved else 0
        batch_size = self.args.num_envs * self.args.num_steps
        if self.continued and (step - self.args.fork_step) % batch_size:
            fail(f"the step {step} of the state is not at the end of an iteration")
        try:
            next_obs = self.restore(**self.saved) if self.saved else None
        except Exception as error:  # a state that was edited can raise almost anything
            fail(f"the state of step {step} cannot be restored: {error!r}")
        if not self.saved:
            next_obs = envs.reset()
        if self.args.track:
            wandb = importlib.import_module("wandb")
            run_id = re.sub(r"[^a-zA-Z0-9_-]", "-", self.args.run_name)
            settings = {"id": run_id, "resume": "allow", "sync_tensorboard": True}
            wandb.init(name=self.args.run_name, config=asdict(self.args), **settings)
        self.make_folder()
        self.open_log()
        write_file(self.dir / "args.json", json.dumps(asdict(self.args), indent=2).encode())
        self.keep_script(step)
        (self.dir / "checkpoints").mkdir(exist_ok=True)
        if self.continued:
            self.save(step, "latest.pt")
        else:
            self.log_flags(step)
            self.save(step, f"checkpoints/{step}.pt", "latest.pt")
        command = [Path(sys.argv[0]).name, "--runs-dir", self.args.runs_dir]
        command += ["--run-name", self.args.run_name, "--resume"]
        Run.advice = f"python {shlex.join(command)} continues from the last state"
        tqdm.write(f"{self.dir} starts at step {step}")
        tqdm.write(f"{'step':>12}" + "".join(f"{name:>11}" for name in self.columns))
        return next_obs, step

    def restore(self, agent, optimizer, envs, obs_stats, rng, args, versions, scalars, logs, **_):
        """Restore the saved state; learning rate and betas are the flags'. Returns next_obs."""
        if versions != self.versions:
            before = f"the run was made with {versions}, this is {self.versions}"
            say(f"the run will not be bit-identical: {before}")
        self.scalars = dict(scalars)
        self.logs = {name: [int(size), int(crc)] for name, (size, crc) in logs.items()}
        reseeded = args["seed"] != self.args.seed
        try:
            self.agent.load_state_dict(agent)
        except RuntimeError:
            fail("the networks of the checkpoint differ from those of this script")
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": optimizer["state"]})
        next_obs = self.envs.load_state_dict(envs, obs_stats, reseeded)
        if not reseeded:
            torch.set_rng_state(rng)
        return next_obs

    def make_folder(self):
        """Make the folder of a new run, and lock it."""
        while not self.resumed:
            self.dir = Path(self.args.runs_dir, self.args.run_name)
            try:
                self.dir.mkdir(parents=True)
                break
            except FileExistsError:
                if self.named:
                    fail(f"{self.dir} was just made by another process")
                self.args.run_name += "-2"
        self.lock = filelock.FileLock(self.dir / ".lock", timeout=0, fallback_to_soft=False)
        try:
            self.lock.acquire()
        except filelock.Timeout:
            fail(f"another process works on this run: {self.lock.lock_file}")
        except (OSError, NotImplementedError) as error:
            if not self.resumed:
                shutil.rmtree(self.dir)
            fail(f"the disk cannot lock {self.lock.lock_file}: {error}")
        Run.started = True
        kept = "keeps its states" if self.continued else "holds no state"
        Run.advice = f"{self.dir} {kept}"

    def keep_script(self, step):
        """Copy this script into the folder, so that one can see which code made the run."""
        script = Path(__file__).read_bytes()
        path = self.dir / Path(__file__).name
        if path.is_file() and path.read_bytes() != script:
            say(f"{path.name} has changed since the run began: the folder keeps both")
            path = path.with_name(f"{path.stem}-from-{step}.py")
        write_file(path, script)

    def open_log(self):
        """Cut event files back to their sizes in the state, and begin a new one. Event files that
        the state does not name are renamed."""
        self.logs = self.logs if self.continued else {}  # {name: [size, crc]}
        paths = {self.dir / name for name in self.logs} | set(self.dir.glob(f"{EVENTS}*"))
        for path in paths:
            regular = path.parent == self.dir and path.is_file() and not path.is_symlink()
            if not regular or not path.name.startswith(EVENTS):
                fail(f"{path} is missing, or not a regular file of this run")
            size, crc = self.logs.get(path.name, (0, 0))
            if zlib.crc32(path.read_bytes()[:size]) != crc:
                fail(f"{path} is damaged or cut: restore it, or use another --run-name")
        for path in paths:
            if path.name in self.logs:
                os.truncate(path, self.logs[path.name][0])
            else:
                path.rename(self.dir / path.name.replace(EVENTS, "unsaved-events."))
        newest = max((int(name.split(".")[3]) for name in self.logs), default=0)
        # TensorBoard reads event files in the order of the times in their names
        with mock.patch("time.time", return_value=max(time.time(), newest + 1)):
            self.writer = SummaryWriter(self.dir)
        for path in self.dir.glob(f"{EVENTS}*"):
            self.logs.setdefault(path.name, [0, 0])

    def log_flags(self, step):
        """Write the flags as a table, those that differ from their defaults first, and for
        TensorBoard's HPARAMS tab."""
        flags = asdict(self.args)
        names = sorted(flags, key=lambda name: flags[name] == getattr(Args, name))
        rows = "".join(f"|{name}|{flags[name]}|\n" for name in names)
        self.writer.add_text("hyperparameters", "|flag|value|\n|-|-|\n" + rows, step)
        for summary in hparams(flags, dict.fromkeys(self.columns.values(), 0)):
            self.writer.file_writer.add_summary(summary)

    def log(self, scalars, step, row=False):
        """Log {"group": {"name": number}}, NaN if a number is not finite; print it if `row`."""
        flat = {f"{group}/{name}": x for group, part in scalars.items() for name, x in part.items()}
        for tag, value in flat.items():
            self.scalars[tag] = float(value) if math.isfinite(value) else math.nan
            self.writer.add_scalar(tag, self.scalars[tag], step)
        if row:
            cells = (f"{self.scalars.get(tag, math.nan):11.4g}" for tag in self.columns.values())
            tqdm.write(f"{step:12,}" + "".join(cells))

    def save(self, global_step, *names):
        """Write everything that the run needs to continue into the files `names` of its folder."""
        self.writer.flush()
        for name, (size, crc) in self.logs.items():
            path = self.dir / name
            content = path.read_bytes()
            if zlib.crc32(content[:size]) != crc:
                fail(f"{path} was changed by another program: start a new run", code=1)
            self.logs[name] = [len(content), zlib.crc32(content[size:], crc)]
            with open(path, "r+b") as file:  # Windows syncs only files open for writing
                os.fsync(file.fileno())
        state = {"script": Path(__file__).stem, "versions": self.versions}
        state |= {"args": asdict(self.args), "global_step": global_step, "scalars": self.scalars}
        state |= {"agent": self.agent.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"envs": self.envs.state_dict(), "obs_stats": self.envs.obs_stats}
        state |= {"logs": self.logs, "rng": torch.get_rng_state()}
        buffer = io.BytesIO()
        torch.save(state, buffer)
        for name in names:
            write_file(self.dir / name, buffer.getbuffer())

    def close(self):
        self.writer.close()
        self.lock.release()
        tqdm.write(f"{self.dir} is finished; its curves: tensorboard --logdir {self.args.runs_dir}")


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None if the stream is closed
    sys.stderr = sys.stderr or open(os.devnull, "w")
    try:
        main()
    except KeyboardInterrupt:
        fail(f"interrupted; {Run.advice}", code=130)
    except zipfile.BadZipFile as error:
        fail(error)
    except OSError as error:
        fail(f"{error}; {Run.advice}", code=2 - Run.started)
    except Exception as error:
        kinds = (MemoryError, torch.OutOfMemoryError)
        if isinstance(error, kinds) or "allocate memory" in str(error):
            smaller = "use a smaller --minibatch-size, --num-envs, --width, or --no-cuda"
            fail(f"out of memory: {smaller}; {Run.advice}", code=2 - Run.started)
        traceback.print_exc()
        fail(f"{error!r}; {Run.advice}", code=2 - Run.started)
    finally:
        for env in Envs.opened:  # some have threads that only end if they are closed
            with contextlib.suppress(Exception, SystemExit):
                env.close()

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "ale-py==0.12.1",
#     "filelock==4.3.1",
#     "gymnasium==1.4.0",
#     "numpy==2.4.6",
#     "opencv-python-headless==5.0.0.93",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///

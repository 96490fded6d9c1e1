"""PPO's trust region and how it breaks, from two states to a training run (arXiv 2405.00662).

    python ppo_toy.py           # section 3.2.1, Figure 5: tables for two states, in seconds
    python ppo_toy.py train     # PPO learns CartPole-v1 (return 500), in half a minute

The next command takes two to six minutes and shows the collapse after one: the rank of the features
falls, neurons die, and the return falls. With `--pfo-coef 1` (equation 2) the return does not fall.

    python ppo_toy.py train --env-id Acrobot-v1 --activation relu --width 32 --learning-rate 1e-2 \
        --max-grad-norm 10 --update-epochs 80 --total-timesteps 400000 --compile --seed 27

The first half of this file is the paper's example with two states. The second half is a complete
PPO for discrete actions, written as in a textbook. ppo_mujoco.py and ppo_atari.py are faster, and
can resume and fork a run. They have the same diagnostics and interventions. You can stop reading at
the end of `main`. Below are diagnostics, environments, and the code that saves a run.
"""

import contextlib
import copy
import json
import math
import os
import re
import shutil
import sys
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
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

# Flag types with their smallest and largest value
Fraction = Annotated[float, (0, 1)]
Decay = Annotated[float, (0, 1 - 1e-6)]
Coefficient = Annotated[float, (0, 1e6)]
Positive = Annotated[float, (1e-12, 1e6)]
Count = Annotated[int, (1, 10**12)]


@dataclass
class ToyArgs:
    """Two states (arXiv 2405.00662, Figure 5): a gradient step on one state changes the
    probability ratio of the other. The complete PPO is explained by: ppo_toy.py train --help"""

    # values of phi(y) / phi(x)
    alpha: Annotated[tuple[float, ...], (-1e3, 1e3)] = (3.0, -2.0, -1.0)
    # theta_1 and theta_2 before the first step
    theta: Annotated[tuple[float, float], (-1e3, 1e3)] = (0.51526, -0.44138)
    phi: Annotated[float, (-1e3, 1e3)] = 0.11631  # feature phi(x)
    epochs: Count = 10  # gradient steps on each state
    learning_rate: Positive = 1.5  # learning rate of SGD
    clip_coef: Positive = 0.1  # epsilon of PPO-Clip
    runs_dir: str = "runs"  # folder that holds all runs
    run_name: str = ""  # name of the run's folder; by default made from flags and time


def two_states(args, alpha, phi, theta):
    """PPO-Clip with SGD on the states x and y, with one sample per gradient step (Appendix C).
    The features are phi(x) = phi and phi(y) = alpha phi; the logits are theta_i phi(s). The sample
    of each of the T steps is x or y in turn, always with the action a1 and the advantage 1. Returns
    the ratios pi(a1|s) / pi_old(a1|s) of x and y, before each step and after the last (T + 1, 2),
    and a list of T booleans: True if the sample of the step was clipped and gave no gradient."""
    features = torch.tensor([phi, alpha * phi], dtype=torch.float64)
    theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([theta], args.learning_rate)

    def probs():  # pi(a1|x) and pi(a1|y)
        return features.outer(theta).softmax(1)[:, 0]

    old_probs = probs().detach()
    ratios, clipped = [], []
    for step in range(2 * args.epochs):
        ratio = probs() / old_probs
        ratios.append(ratio.detach())
        r = ratio[step % 2]
        clipped_r = r.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        loss = -torch.min(r, clipped_r)  # the advantage is 1
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clipped.append(bool(clipped_r < r))
    ratios.append((probs() / old_probs).detach())
    return torch.stack(ratios), clipped


def toy(args):
    """Print a table for each alpha, with a row per gradient step, and log the ratios."""
    check_ranges(args)
    run = Run(args)
    for alpha in args.alpha:
        ratios, clipped = two_states(args, alpha, args.phi, args.theta)
        print(f"alpha = {alpha:g}: ratios pi(a1|s) / pi_old(a1|s) of x and y, after each step")
        print("step  sample    ratio of x  ratio of y    change of x  change of y")
        for step, after in enumerate(ratios[1:]):
            change = after - ratios[step]
            cells = "{:14.4f}{:12.4f}{:+15.4f}{:+13.4f}".format(*after, *change)
            print(f"{step:4}  {'xy'[step % 2]}{cells}" + "  clipped" * clipped[step])
        print(f"final ratios: x {ratios[-1, 0]:.3f}, y {ratios[-1, 1]:.3f}\n")
        for step, (x, y) in enumerate(ratios.tolist()):
            run.log({f"toy/alpha={alpha:g}": {"ratio_x": x, "ratio_y": y}}, step)
    run.close()


# The second half: a complete PPO


@dataclass
class Args:
    """PPO-Clip on a small task with the diagnostics and interventions of arXiv 2405.00662.
    Intervals are fractions of the run, in whole iterations (rollout and update); 0 disables."""

    # Experiment

    env_id: str = "CartPole-v1"  # Gymnasium task with flat Box observations and Discrete actions
    seed: Annotated[int, (0, 2**32 - 1)] = 1  # seed of all random generators
    total_timesteps: Count = 100_000  # environment steps, rounded down to whole iterations
    torch_threads: Annotated[int, (0, 256)] = 1  # CPU threads; 1 is fastest; 0 lets torch choose
    compile: bool = False  # compile the gradient computation, which takes half a minute
    runs_dir: str = "runs"  # folder that holds all runs
    run_name: str = ""  # name of the run's folder; by default made from task, flags, seed and time

    # PPO

    learning_rate: Positive = 1e-3  # learning rate of Adam
    anneal_lr: bool = False  # lower the learning rate linearly to 0 over the run
    num_envs: Count = 8  # number of environments
    num_steps: Count = 128  # steps per environment and iteration
    gamma: Fraction = 0.99  # discount factor
    gae_lambda: Fraction = 0.95  # lambda of generalised advantage estimation (GAE)
    minibatch_size: Count = 128  # samples per gradient step; an epoch drops an incomplete minibatch
    update_epochs: Count = 10  # epochs per batch (the paper: 10, 15, 20; on Atari 4, 6, 8)
    clip_coef: Positive = 0.2  # epsilon of PPO-Clip
    ent_coef: Coefficient = 0.0  # coefficient of the entropy bonus; 0 disables it
    vf_coef: Coefficient = 0.5  # coefficient of the squared error of the values
    max_grad_norm: Positive = 0.5  # clip the gradient of each network to this norm
    target_kl: Coefficient = 0.0  # stop an update after an epoch with a larger KL; 0: never
    # at a time limit, end the return or bootstrap it with the value
    time_limit: Literal["terminate", "bootstrap"] = "bootstrap"
    activation: Literal["tanh", "relu"] = "tanh"  # activation of both networks
    width: Count = 64  # number of units in each hidden layer

    # Interventions

    # coefficient of PFO, Proximal Feature Optimization (the paper: 1; MuJoCo with relu: 10); 0: off
    pfo_coef: Coefficient = 0.0
    pfo_layers: Literal["last", "all"] = "last"  # hidden layers that PFO regularises
    pfo_reduction: Literal["mean", "sum"] = "mean"  # mean over units (authors' code) or sum (eq. 2)
    share_trunk: bool = False  # use one trunk for actor and critic
    reset_adam: bool = False  # reset Adam's moments after every batch
    adam_beta1: Decay = 0.9  # decay of Adam's first moment
    adam_beta2: Decay = 0.999  # decay of Adam's second moment (the paper's intervention: 0.9)
    reward_keep_prob: Fraction = 1.0  # probability of keeping a reward (Figure 35: 0.1); 1 disables

    # Diagnostics

    log_interval: Fraction = 0.001  # interval between two points of the curves
    capacity_interval: Fraction = 0.025  # interval between two fits of the capacity loss
    capacity_steps: Count = 2000  # number of states per fit of the capacity loss
    capacity_envs: Count = 8  # number of environments that collect these states
    capacity_epochs: Count = 4  # epochs per fit
    # the network that collects these states: the target, or the run's initial agent
    capacity_data: Literal["target", "initial"] = "target"
    snapshot_interval: Fraction = 0.025  # interval between two checkpoints


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
        self.pfo_all_layers = args.pfo_layers == "all"
        self.activation = nn.Tanh() if args.activation == "tanh" else nn.ReLU()

        def trunk():  # the last activation is left out, so that a trunk returns preactivations
            return nn.Sequential(
                nn.Linear(envs.obs_dim, args.width),
                self.activation,
                nn.Linear(args.width, args.width),
            )

        self.actor_trunk = trunk()
        self.actor_head = nn.Linear(args.width, envs.action_dim)
        self.critic_trunk = self.actor_trunk if args.share_trunk else trunk()
        self.critic_head = nn.Linear(args.width, 1)
        # Gradients are clipped per group: actor and critic separately, or both together
        actor = [p for name, p in self.named_parameters() if name.startswith("actor")]
        critic = [p for name, p in self.named_parameters() if not name.startswith("actor")]
        self.groups = [actor + critic] if args.share_trunk else [actor, critic]
        self.eval()  # only gradient steps use the training mode, for layers where it matters

    def preactivations(self, trunk, x):
        """The inputs of the trunk's activations and its output, in order."""
        outputs = []
        for layer in trunk:
            if layer.__module__ == nn.Tanh.__module__:  # any activation of torch.nn
                outputs.append(x)
            x = layer(x)
        return [*outputs, x]

    def forward(self, obs):
        """obs (B, D) -> Outputs."""
        actor = self.preactivations(self.actor_trunk, obs)
        critic = self.preactivations(self.critic_trunk, obs)
        policy = self.actor_head(self.activation(actor[-1])).log_softmax(-1)
        values = self.critic_head(self.activation(critic[-1])).squeeze(-1)
        pfo = torch.cat(actor, 1) if self.pfo_all_layers else actor[-1]
        return Outputs(policy, values, actor[-1], critic[-1], pfo)

    @torch.no_grad()
    def sample(self, obs):
        """Actions (E,) for obs (E, D), sampled from the policy."""
        return torch.multinomial(self(obs).policy.exp(), 1).squeeze(1)

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


def make_optimizer(agent, args):
    """Adam on the parameters in the agent's groups."""
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.Adam(sum(agent.groups, []), args.learning_rate, betas, fused=True)


def learning_rate(args, global_step):
    """The learning rate of the iteration that starts at `global_step`."""
    progress = global_step / args.total_timesteps if args.anneal_lr else 0.0
    return args.learning_rate * (1 - progress)


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


def ppo_loss(agent, args, obs, actions, logprobs, advantages, returns, old_pfo_preactivations):
    """The loss of PPO-Clip (equation 1) with value loss, entropy bonus and PFO for a minibatch,
    whose tensors all start with (B,). Also returns a dict of scalars for the tags losses/NAME."""
    std, mean = torch.std_mean(advantages, correction=0)
    advantages = (advantages - mean) / std.clamp_min(1e-6)
    new = agent(obs)
    logratio = agent.log_prob(new.policy, actions) - logprobs
    ratio = logratio.clamp(math.log(1e-7), math.log(1e9)).exp()
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped_ratio * advantages).mean()
    value_loss = args.vf_coef * F.mse_loss(new.values, returns)
    entropy = agent.entropy(new.policy).mean()
    pfo = pfo_loss(new.pfo_preactivations, old_pfo_preactivations, args.pfo_reduction)
    losses = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "pfo_loss": pfo,
        "entropy": entropy,
        "old_approx_kl": -logratio.mean(),  # Schulman, "Approximating KL Divergence"
        "approx_kl": (logratio.expm1() - logratio).mean(),
        "clipfrac": (ratio != clipped_ratio).float().mean(),
    }
    loss = policy_loss + value_loss
    if args.ent_coef:
        loss = loss - args.ent_coef * entropy
    if args.pfo_coef:  # 0 * inf would be NaN
        loss = loss + args.pfo_coef * pfo
    return loss, {name: x.detach() for name, x in losses.items()}


def compute_gradients(agent, args, **minibatch):
    """Compute the gradients for a minibatch and clip them per network. Returns the losses, to which
    the norms before clipping are added."""
    loss, losses = ppo_loss(agent, args, **minibatch)
    loss.backward()
    clip = nn.utils.clip_grad_norm_
    norms = [clip(group, args.max_grad_norm, foreach=False) for group in agent.groups]
    return losses | {"actor_grad_norm": norms[0], "critic_grad_norm": norms[-1]}


def train(args):
    # Setup
    check(args)
    batch_size = args.num_steps * args.num_envs
    num_iterations = args.total_timesteps // batch_size
    torch.set_num_threads(args.torch_threads or torch.get_num_threads())
    envs = Envs(args, args.num_envs, stream=0)
    capacity_envs = Envs(args, args.capacity_envs, stream=2)
    torch.manual_seed(2**32 - 1 - args.seed)  # never equal to the agent's seed
    target = Agent(envs, args)  # the random network that capacity fits imitate
    torch.manual_seed(args.seed)
    agent = Agent(envs, args)
    optimizer = make_optimizer(agent, args)
    gradients = compute_gradients
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # compile loss.backward() as well
        gradients = torch.compile(gradients, fullgraph=True, options={"cpp_wrapper": True})
    next_obs = envs.reset()
    global_step = 0
    run = Run(args)  # makes the run's folder
    if args.snapshot_interval:
        run.save(0, agent, optimizer)
    if args.capacity_interval:
        collector = target if args.capacity_data == "target" else agent
        states = capacity_envs.collect(collector, args.capacity_steps, seed=args.seed)
        capacity_data = capacity_target(target, *states)
        run.log({"capacity": capacity_loss(agent, args, *capacity_data)}, 0)
    titles = "".join(f"{name:>11}" for name in run.columns)
    tqdm.write(f"{run.dir} starts at step 0\n{'step':>12}{titles}")
    bar = tqdm(total=num_iterations * batch_size, unit=" steps", dynamic_ncols=True)
    for iteration in range(1, num_iterations + 1):
        logging = due(args.log_interval, iteration, num_iterations)
        start_time = time.perf_counter()
        scalars = {}

        # Rollout
        steps = []
        for _ in range(args.num_steps):
            obs = torch.from_numpy(next_obs)
            actions = agent.sample(obs)
            next_obs, *outcome = envs.step(actions)
            steps.append((obs, actions, *map(torch.tensor, outcome)))
        obs, actions, final_obs, rewards, terminations, truncations = map(torch.stack, zip(*steps))
        if args.reward_keep_prob < 1:
            random = torch.from_numpy(envs.mask_rng.random(rewards.shape))
            rewards *= random < args.reward_keep_prob
        b_obs = obs.flatten(0, 1)
        b_actions = actions.flatten()

        # Advantages
        old = evaluate(agent, b_obs)
        b_logprobs = agent.log_prob(old.policy, b_actions)
        values = old.values.view_as(rewards)
        next_values = evaluate(agent, final_obs.flatten(0, 1)).values.view_as(rewards)
        dones = terminations | truncations
        terminal = dones if args.time_limit == "terminate" else terminations
        gae_inputs = rewards, values, next_values, terminal, dones
        advantages, returns = compute_gae(*gae_inputs, args.gamma, args.gae_lambda)

        # Representation: measured on the networks that collected the batch
        if logging:
            scalars["representation/actor"] = representation(agent, args, "actor", old)
            scalars["representation/critic"] = representation(agent, args, "critic", old)
            scalars["policy"] = agent.policy_stats(old.policy, b_actions)

        # PPO update
        lr = learning_rate(args, global_step)
        optimizer.param_groups[0]["lr"] = lr
        batch = {"obs": b_obs, "actions": b_actions, "logprobs": b_logprobs}
        batch |= {"advantages": advantages.flatten(), "returns": returns.flatten()}
        batch["old_pfo_preactivations"] = old.pfo_preactivations
        all_losses = []
        agent.train()
        for _ in range(args.update_epochs):
            for minibatch in minibatches(batch, args.minibatch_size):
                optimizer.zero_grad()
                losses = gradients(agent, args, **minibatch)
                optimizer.step()
                all_losses.append(losses)
            if args.target_kl and losses["approx_kl"] > args.target_kl:
                break
        agent.eval()
        if args.reset_adam:
            optimizer.state.clear()
        global_step += batch_size

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
            speed = batch_size / (time.perf_counter() - start_time)
            scalars["charts"] = {"learning_rate": lr, "SPS": speed}
            if envs.finished:
                means = np.mean(envs.finished, 0)
                scalars["charts"] |= {"episodic_return": means[0], "episodic_length": means[1]}
                envs.finished.clear()
            scalars["losses"] = {k: torch.stack([x[k] for x in all_losses]).mean() for k in losses}
            scalars["losses"] |= {
                "policy_objective_last_minibatch": -losses["policy_loss"],
                "explained_variance": 1 - (returns - values).var() / returns.var(),
            }
        run.log(scalars, global_step, row=due(0.025, iteration, num_iterations))
        bar.update(batch_size)

        # Checkpoint
        if not all(p.isfinite().all() for p in agent.parameters()):
            fail(f"parameters are not finite at step {global_step}; {Run.advice}", code=1)
        if due(args.snapshot_interval, iteration, num_iterations):
            run.save(global_step, agent, optimizer)

    bar.close()
    run.close()


def main():
    words = sys.argv[1:]
    if "train" in words[:1]:
        train(tyro.cli(Args, prog="ppo_toy.py train", args=words[1:]))
    elif "--env-id" in words:
        fail(f"did you mean: ppo_toy.py train {' '.join(words)}")
    else:
        toy(tyro.cli(ToyArgs))


# Diagnostics and capacity loss: functions that `train` calls


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
def capacity_target(target, frames, index):
    """The capacity data: the N states are frames[index]; target's policies (N, P), values (N,)."""
    device = next(target.parameters()).device
    outputs = [target(frames[chunk].to(device))[:2] for chunk in index.split(1024)]
    return frames, index, *(torch.cat(parts) for parts in zip(*outputs))


def capacity_loss(agent, args, frames, index, target_policies, target_values, adam_state=None):
    """The loss that remains after a copy of the agent was fitted to a random target (section 2).

    The actor's loss is the mean KL(target || copy); the critic's loss is the mean squared error.
    Adam has the run's settings, and starts fresh or from `adam_state`. A fit has `capacity_epochs`
    epochs and its own random generator, so that every fit uses the same shuffles. Returns floats:
    `actor` and `critic` are the losses on all data after the fit, `actor_last_minibatch` and
    `critic_last_minibatch` are those on its last minibatch, before the gradient step."""
    copied = copy.deepcopy(agent)
    optimizer = make_optimizer(copied, args)
    if adam_state:
        optimizer.load_state_dict(optimizer.state_dict() | {"state": adam_state})
    generator = torch.Generator().manual_seed(args.seed)

    def losses(rows):
        policies, values = copied(frames[index[rows]])[:2]
        actor = copied.kl(target_policies[rows], policies).mean()
        return actor, F.mse_loss(values, target_values[rows])

    copied.train()
    for _ in range(args.capacity_epochs):
        for rows in torch.randperm(len(index), generator=generator).split(args.minibatch_size):
            if len(rows) == args.minibatch_size:
                actor_last, critic_last = losses(rows)
                optimizer.zero_grad()
                (actor_last + critic_last).backward()
                for group in copied.groups:
                    nn.utils.clip_grad_norm_(group, args.max_grad_norm)
                optimizer.step()
    copied.eval()
    with torch.no_grad():
        actor, critic = losses(torch.arange(len(index)))
    return {
        "actor": actor.item(),
        "critic": critic.item(),
        "actor_last_minibatch": actor_last.item(),
        "critic_last_minibatch": critic_last.item(),
    }


# The rest is not part of PPO: messages, checks of the flags, environments, the folder of a run


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


def check_ranges(args):
    """Exit with one line if a flag is out of its range or cannot be part of a file's name."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        value = getattr(args, name)
        flag = f"--{name.replace('_', '-')} is {value!a}"
        for low, high in getattr(hint, "__metadata__", ()):
            numbers = np.ravel(value)
            if not (numbers.size and low <= numbers.min() and numbers.max() <= high):
                fail(f"{flag}: it must be from {low} to {high}")
        if isinstance(value, str) and not value.isprintable():
            fail(f"{flag}: it must be text that can be printed")
    path = os.fsencode(Path(args.runs_dir, args.run_name))
    if re.search(r"[/\\]|^\.\.?$", args.run_name) or re.search(rb"[^/]{200}", path):
        fail("--run-name: use no slash, and under 200 bytes in it and in each part of --runs-dir")


def check(args):
    """Exit with one line if a flag is wrong or if flags contradict each other."""
    check_ranges(args)
    batch_size = args.num_envs * args.num_steps
    if not 2 <= args.minibatch_size <= batch_size:
        fail(f"--minibatch-size is {args.minibatch_size}: it must be from 2 to {batch_size}")
    if args.total_timesteps < batch_size:
        fail(f"--total-timesteps is {args.total_timesteps}: it must be {batch_size} or more")
    least = max(args.minibatch_size, args.capacity_envs)  # a minibatch, or a step per environment
    if args.capacity_interval and args.capacity_steps < least:
        fail(f"--capacity-steps is {args.capacity_steps}: it must be {least} or more")
    compiler = os.environ.get("CXX", "g++")
    if args.compile and os.system(f'"{compiler}" --version > {os.devnull} 2>&1'):
        fail(f"--compile needs a C++ compiler, and {compiler} does not work: set CXX to another")


class Envs:
    """`num_envs` copies of the task, stepped one after the other. When an episode ends, the next
    one starts. Observations (E, D) are used as they are."""

    opened = []  # all environments of this process; they are closed when it ends

    def __init__(self, args, num_envs, stream, obs_stats=None):
        gym.logger.min_level = gym.logger.ERROR  # hides the advice to use a newer task version
        self.task = f"--env-id {args.env_id}"
        self.envs = []
        try:
            for _ in range(num_envs):
                env = gym.make(args.env_id, disable_env_checker=True)
                self.envs.append(gym.wrappers.RecordEpisodeStatistics(env))
                Envs.opened.append(self.envs[-1])
        except (Exception, SystemExit) as error:  # the code of a task can raise anything
            fail(f"{self.task} cannot be made (for Atari games use ppo_atari.py): {error!r}")
        match env.observation_space, env.action_space:
            case gym.spaces.Box(shape=(obs_dim,)), gym.spaces.Discrete(n=num_actions, start=0):
                self.obs_dim = obs_dim
                self.action_dim = int(num_actions)
            case spaces:
                fail(
                    f"{self.task} has the spaces {spaces}: this script needs a flat Box and "
                    "Discrete actions from 0 on; Box actions: ppo_mujoco.py, Atari: ppo_atari.py"
                )
        self.rng = np.random.default_rng([args.seed, stream])
        self.mask_rng = np.random.default_rng([args.seed, stream + 1])
        self.obs = np.zeros((num_envs, self.obs_dim), np.float32)
        self.finished = []  # (return, length) of the episodes that ended since the last log

    def call(self, i, method, *args, **kwargs):
        """Call a method of environment i, store the observation, and return its other results."""
        try:
            obs, *rest = getattr(self.envs[i], method)(*args, **kwargs)
        except SystemExit as error:
            fail(f"{self.task} called sys.exit({error}); {Run.advice}", Run.code)
        if np.shape(obs) != (self.obs_dim,) or not np.isfinite(obs).all():
            fail(
                f"{self.task} returned the observation {obs}, which is not {self.obs_dim} finite "
                f"numbers; {Run.advice}",
                Run.code,
            )
        self.obs[i] = obs
        return rest

    def start(self, i):
        """Begin an episode of environment i."""
        self.call(i, "reset", seed=int(self.rng.integers(2**31)))

    def reset(self):
        for i in range(len(self.envs)):
            self.start(i)
        return self.obs.copy()

    def step(self, actions):
        """One step with the `actions` (E,). Returns the next observations (E, D), the same before
        any reset (E, D), and rewards, terminations and truncations (E,)."""
        outcomes, ended = [], []
        for i, action in enumerate(actions.tolist()):
            *outcome, info = self.call(i, "step", action)
            # some tasks return arrays with one element
            reward, terminated, truncated = (np.asarray(x).item() for x in outcome)
            outcomes.append((float(reward), terminated, truncated))
            if terminated or truncated:
                episode = info["episode"]
                self.finished.append((np.asarray(episode["r"]).item(), episode["l"]))
                ended.append(i)
        final_obs = self.obs.copy()
        for i in ended:
            self.start(i)
        return self.obs.copy(), final_obs, *zip(*outcomes)

    def collect(self, agent, num_steps, seed):
        """Returns states that the agent visits, and their index (num_steps,)."""
        states = []
        with torch.random.fork_rng(devices=[]):  # restores torch's generator afterwards
            torch.manual_seed(seed)
            next_obs = self.reset()
            while len(states) * len(self.envs) < num_steps:
                states.append(next_obs)
                next_obs, *_ = self.step(agent.sample(torch.from_numpy(next_obs)))
        return torch.from_numpy(np.concatenate(states)[:num_steps]), torch.arange(num_steps)


class Run:
    """The folder of a run: args.json, a copy of this script, an event file for TensorBoard, and
    checkpoints/STEP.pt."""

    advice = "nothing was created"  # ends each message about a fault
    code = 2  # exit code after a fault; it is 1 if the run has a folder
    columns = {  # of the rows in the terminal
        "return": "charts/episodic_return",
        "rank": "representation/actor/pca_rank",
        "dead": "representation/actor/dead_neurons",
        "norm": "representation/actor/preactivation_norm",
        "low ratio": "trust_region/ratio_mean_below",
        "capacity": "capacity/actor",
    }

    def __init__(self, args):
        self.args = args
        self.scalars = {}  # the last value of each tag
        defaults = asdict(type(args)())
        given = {name: x for name, x in asdict(args).items() if x != defaults[name]}
        stamp = int(time.time())
        while True:
            self.dir = Path(args.runs_dir, args.run_name or self.default_name(given, stamp))
            try:
                self.dir.mkdir(parents=True)
                break
            except FileExistsError:
                if args.run_name:
                    fail(f"{self.dir} exists: choose another --run-name")
                stamp += 1
            except OSError as error:
                fail(f"--runs-dir: {self.dir} cannot be made ({error.strerror})")
        args.run_name = self.dir.name
        Run.advice = f"{self.dir} keeps the curves and checkpoints so far"
        Run.code = 1
        shutil.copy(__file__, self.dir)
        (self.dir / "args.json").write_text(json.dumps(asdict(args), indent=2))
        self.writer = SummaryWriter(self.dir)
        flags = given | asdict(args)  # flags that differ from their defaults come first
        rows = "".join(f"|{name}|{value}|\n" for name, value in flags.items())
        self.writer.add_text("hyperparameters", "|flag|value|\n|-|-|\n" + rows, 0)
        if isinstance(args, Args):  # for TensorBoard's tab HPARAMS
            for summary in hparams(flags, {"charts/episodic_return": 0}):
                self.writer.file_writer.add_summary(summary)

    def default_name(self, given, stamp):
        """TASK__SCRIPT__FLAGS__SEED__TIME, where FLAGS are the last five of those `given`."""
        unnamed = "env_id|seed|runs_dir|compile|torch_threads|alpha|theta|capacity.*|.*interval"
        flags = [f"{k}={x}" for k, x in given.items() if not re.fullmatch(unnamed, k)]
        task = getattr(self.args, "env_id", "toy")
        seed = getattr(self.args, "seed", 1)
        parts = [task, Path(__file__).stem, *reversed(flags[-5:]), seed, stamp]
        return re.sub(r"[^\w.,=-]", "-", "__".join(map(str, parts)))

    def log(self, scalars, step, row=False):
        """Log {"group": {"name": number}}, NaN if a number is not finite; print it if `row`."""
        for group, part in scalars.items():
            for name, value in part.items():
                tag = f"{group}/{name}"
                self.scalars[tag] = float(value) if math.isfinite(value) else math.nan
                self.writer.add_scalar(tag, self.scalars[tag], step)
        if row:
            cells = (f"{self.scalars.get(tag, math.nan):11.4g}" for tag in self.columns.values())
            tqdm.write(f"{step:12,}" + "".join(cells))
        self.writer.flush()

    def save(self, global_step, agent, optimizer):
        """Write checkpoints/STEP.pt, which capacity.py reads, atomically."""
        state = {
            "script": Path(__file__).stem,
            "args": asdict(self.args),
            "global_step": global_step,
            "agent": agent.state_dict(),
            "optimizer": optimizer.state_dict(),
            "obs_stats": {},
        }
        path = self.dir / "checkpoints" / f"{global_step}.pt"
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        torch.save(state, unfinished)
        unfinished.replace(path)

    def close(self):
        self.writer.close()
        tqdm.write(f"{self.dir} is finished; its curves: tensorboard --logdir {self.args.runs_dir}")


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    try:
        main()
    except KeyboardInterrupt:
        fail(f"interrupted; {Run.advice}", code=130)
    except Exception as error:
        if isinstance(error, MemoryError) or "alloc" in str(error):
            smaller = "--width, --num-envs, --num-steps or --capacity-steps"
            fail(f"out of memory: use a smaller {smaller}; {Run.advice}", Run.code)
        traceback.print_exc()
        fail(f"{error!r}; {Run.advice}", Run.code)
    finally:
        for env in Envs.opened:  # some have threads that only end if they are closed
            with contextlib.suppress(Exception, SystemExit):
                env.close()


# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "gymnasium==1.4.0",
#   "numpy==2.4.6",
#   "tensorboard==2.21.0",
#   "torch==2.13.0",
#   "tqdm==4.70.1",
#   "tyro==1.0.17",
# ]
# ///

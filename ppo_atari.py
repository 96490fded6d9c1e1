"""PPO-Clip on the Arcade Learning Environment, watched while its representation collapses, after "No Representation, No
Trust" (Moalla et al., arXiv 2405.00662): the experiments of its section 3 and the interventions of its section 4.

    python ppo_atari.py --update-epochs 8                  # many epochs per batch: ranks fall, ratios leave the limits
    python ppo_atari.py --update-epochs 8 --pfo-coef 1     # the same with Proximal Feature Optimization, equation 2

`global_step` counts frames, as the paper does. What differs from CleanRL's ppo_atari.py: the paper's environment (sticky
actions, frameskip 3, no life loss, no no-ops, no FIRE), separate actor and critic clipped apart, no value clipping, no
learning-rate annealing, PyTorch's initialisation; and every number of the paper is logged (README, "Logged tags").
"""

import contextlib
import copy
import difflib
import fcntl
import io
import itertools
import json
import math
import os
import random
import re
import signal
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import ale_py
import gymnasium as gym
import imageio.v2 as imageio
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from ale_py.vector_env import AtariVectorEnv
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm


def fail(message, code=2):
    """Say on one line of stderr what is wrong and exit with `code`."""
    print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(code)


@dataclass
class Args:
    """PPO-Clip on Atari with the diagnostics and interventions of arXiv 2405.00662. Intervals are fractions of the
    whole run, rounded to whole iterations, at least one; 0 switches the thing off."""

    # Experiment
    env_id: str = "ALE/Phoenix-v5"
    """a game of the Arcade Learning Environment (the paper: Phoenix, NameThisGame, DoubleDunk, Qbert, Gravitar, BattleZone)"""
    seed: int = 1
    """seed of every random generator (the paper: 25, 7, 64, 27, 4)"""
    total_timesteps: int = 100_000_000
    """environment steps, on Atari frames, of the whole run (may change on --resume)"""
    torch_threads: int = 0
    """CPU threads of torch (small networks are fastest with one); 0: torch's own choice"""
    cuda: bool = True
    """use a CUDA device where there is one"""
    tf32: bool = False
    """let a CUDA device multiply in TF32: faster, with 10 bits of mantissa"""
    compile: bool = False
    """compile the gradient step with torch.compile: up to twice as fast after about a minute; same results up to rounding"""
    runs_dir: str = "runs"
    """folder that holds the runs"""
    run_name: str = ""
    """the run's folder within --runs-dir; empty: task, script, seed and time"""
    resume: bool = False
    """go on from the run's last checkpoint if it has one, else start"""
    stop_on_nonfinite: bool = False
    """stop at the first non-finite observation, loss or gradient instead of reporting it and going on"""
    capture_video: bool = False
    """write an mp4 of one episode beside every checkpoint kept later (where there is no screen: MUJOCO_GL=egl or osmesa)"""
    track: bool = False
    """log to Weights & Biases as well (pip install wandb)"""
    wandb_project: str = "no-representation-no-trust"
    """Weights & Biases project"""
    wandb_entity: str = ""
    """Weights & Biases team; empty: your default"""

    # PPO
    learning_rate: float = 2.5e-4
    """Adam's learning rate"""
    anneal_lr: bool = False
    """lower the learning rate linearly to 0 over the run"""
    num_envs: int = 8
    """environments"""
    num_steps: int = 128
    """steps per environment and iteration"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of generalised advantage estimation"""
    minibatch_size: int = 256
    """samples per gradient step; what is left of the batch after the last full minibatch of an epoch is dropped"""
    update_epochs: int = 4
    """epochs per batch (the paper: MuJoCo 10, 15, 20; Atari 4, 6, 8)"""
    clip_coef: float = 0.1
    """epsilon of PPO-Clip"""
    ent_coef: float = 0.01
    """coefficient of the entropy bonus; 0 disables"""
    vf_coef: float = 0.5
    """coefficient of the squared error of the values"""
    max_grad_norm: float = 0.5
    """largest gradient norm, actor and critic each on its own (together with --share-trunk)"""
    target_kl: float = 0.0
    """end the iteration's update after the epoch whose last minibatch has a larger approximate KL; 0 disables"""
    time_limit: Literal["terminate", "bootstrap"] = "terminate"
    """an episode cut by its time limit ends (finite horizon, the paper), or goes on in the value of its last observation"""
    frameskip: int = 3
    """frames per action"""
    sticky: float = 0.25
    """probability that a frame repeats the action before; 0 disables"""
    maxpool: bool = False
    """observe the maximum of the last two frames"""
    noop_max: int = 0
    """most no-operations that begin an episode; 0 disables"""
    fire_reset: bool = False
    """press FIRE at the start of an episode"""
    episodic_life: bool = False
    """the loss of a life ends the return that is learned, not the game"""
    max_episode_frames: int = 108_000
    """frames after which an episode is cut"""
    sign_reward: bool = True
    """learn from the sign of the reward; the raw return is logged"""
    env_threads: int = 0
    """threads of the emulators; 0: as many as environments, or CPUs if they are fewer"""
    activation: Literal["tanh", "relu"] = "relu"
    """activation function of both networks"""
    width: int = 512
    """units of the hidden linear layers"""

    # Interventions
    pfo_coef: float = 0.0
    """coefficient of Proximal Feature Optimization, equation 2 (the paper: 1; 10 with relu on MuJoCo); 0 disables"""
    pfo_layers: Literal["last", "all"] = "last"
    """PFO on the last hidden layer's preactivations or on those of all hidden layers"""
    pfo_reduction: Literal["mean", "sum"] = "mean"
    """over feature dimensions: mean (the authors' code and coefficients) or sum (equation 2 to the letter)"""
    share_trunk: bool = False
    """one trunk for actor and critic"""
    reset_adam: bool = False
    """forget Adam's moments after every batch"""
    adam_beta1: float = 0.9
    """decay of Adam's first moment"""
    adam_beta2: float = 0.999
    """decay of Adam's second moment (the paper's intervention: 0.9)"""
    reward_keep_prob: float = 1.0
    """probability that a reward is kept and not set to 0 (Figure 35: 0.1); 1 disables"""

    # Diagnostics
    log_interval: float = 0.001
    """between two points of the curves (may change on --resume)"""
    capacity_interval: float = 0.025
    """between two fits of the capacity loss (may change on --resume)"""
    capacity_steps: int = 36_000
    """states that the capacity loss is fitted to"""
    capacity_envs: int = 1
    """environments that collect them"""
    capacity_epochs: int = 1
    """epochs of a fit"""
    capacity_data: Literal["target", "initial"] = "target"
    """collected by the random target, or by the agent as it was before training (the authors' code)"""
    snapshot_interval: float = 0.025
    """between two kept checkpoints (may change on --resume)"""
    checkpoint_interval: float = 0.001
    """between two saves of the state that --resume goes on from (may change on --resume)"""
    save_patience: float = 600.0
    """seconds for which saving may fail (a full disk) before the run stops"""
    profile: bool = False
    """say at the end where the time went (synchronises a CUDA device at every part, which slows it down)"""

    def check(self):
        """Exit with one line if a value makes no sense."""
        for name, value in asdict(self).items():
            flag = "--" + name.replace("_", "-")
            if isinstance(value, float) and not math.isfinite(value):
                fail(f"{flag} is {value}: it must be a finite number")
            if name in ("learning_rate", "clip_coef", "max_grad_norm") and value <= 0:
                fail(f"{flag} is {value}: it must be greater than 0")
            if name.endswith(("_coef", "seed", "_kl", "_patience", "_threads", "_max")) and value < 0:
                fail(f"{flag} is {value}: it must be 0 or greater")
            if name.endswith(("_interval", "gamma", "_lambda", "_prob", "sticky")) and not 0 <= value <= 1:
                fail(f"{flag} is {value}: it must be between 0 and 1")
            if name.startswith("adam_") and not 0 <= value < 1:
                fail(f"{flag} is {value}: it must be at least 0 and less than 1")
            if type(value) is int and name not in ("seed", "total_timesteps") and value >= 2**31:
                fail(f"{flag} is {value}: it must be less than 2**31")
            if type(value) is int and name not in ("seed", "torch_threads", "env_threads", "noop_max") and value < 1:
                fail(f"{flag} is {value}: it must be 1 or greater")
        if self.seed >= 2**32:
            fail(f"--seed is {self.seed}: it must be less than 2**32")
        batch_size = self.num_envs * self.num_steps
        if self.minibatch_size > batch_size:
            fail(f"--minibatch-size {self.minibatch_size} is larger than the batch, --num-envs x --num-steps = {batch_size}")
        if self.minibatch_size < 2:
            fail("--minibatch-size is 1: advantages are normalised per minibatch, so it must be 2 or greater")
        if self.total_timesteps < batch_size * self.frameskip:
            fail(f"--total-timesteps {self.total_timesteps} is less than one batch of {batch_size * self.frameskip} frames")
        if self.capacity_interval and self.capacity_steps < max(self.minibatch_size, self.capacity_envs):
            fail(f"--capacity-steps {self.capacity_steps} is less than one minibatch or one step per environment")
        if len(os.fsencode(self.run_name)) > 200:
            fail("--run-name is longer than 200 bytes, too long for the name of a folder and of its files")
        if Path(self.run_name).name != self.run_name or self.run_name == "..":
            fail(f"--run-name {self.run_name} must be the name of a folder, not a path (--runs-dir says where it lies)")
        if self.resume and not self.run_name:
            fail("--resume needs the --run-name of the run to go on with")
        if self.track and find_spec("wandb") is None:
            fail("--track needs Weights & Biases: pip install wandb")


def say(message):
    """A line on stderr that leaves the progress bar whole."""
    tqdm.write(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)


def parse_args(cls):
    """The command line as an instance of the dataclass `cls`; tyro's box around an error becomes one line."""
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(cls)
    except SystemExit as stop:
        if not stop.code:
            raise
    title, *lines = (line.strip("│ ") for line in stderr.getvalue().splitlines())
    groups = itertools.groupby(lines, lambda line: set(line) <= set("─-╯╰"))  # the box's rules and what is between
    fail(" ".join(next(list(group) for rule, group in groups if not rule)) + " (--help lists every flag)")


class Envs:
    """`num_envs` games side by side in ALE's own vector environment; a game that ends is followed at once by the next one.

    Every game starts from a seed of its own. Seed and actions give the game back exactly, so they are all that a checkpoint
    needs to hold of it. Observations are (E, 4, 84, 84) uint8: the last four frames, zeros before a game's first.
    """

    obs_stats = {}

    def __init__(self, args, num_envs, stream, obs_stats=None, **emulator_flags):
        gym.register_envs(ale_py)
        games = [name for name in gym.registry if re.fullmatch(r"ALE/\w+-v5", name)]
        if args.env_id not in games:
            plain = re.sub(r"^ALE/|(-ram)?(NoFrameskip|Deterministic)?-v\d+$", "", args.env_id)
            close = difflib.get_close_matches(f"ALE/{plain}-v5", games, 1, 0.7)
            hint = f"use {close[0]}" if close else "use ALE/Phoenix-v5, for example"
            if "NoFrameskip" in args.env_id:
                hint += ", and --frameskip, --sticky, --maxpool, ... for its settings"
            fail(f"--env-id {args.env_id} is not a game with images: {hint}")
        self.game, self.episodic_life, self.frameskip = (
            gym.spec(args.env_id).kwargs["game"],
            args.episodic_life,
            args.frameskip,
        )
        self.settings = dict(
            num_threads=args.env_threads,
            frameskip=args.frameskip,
            repeat_action_probability=args.sticky,
            maxpool=args.maxpool,
            noop_max=args.noop_max,
            use_fire_reset=args.fire_reset,
            episodic_life=False,  # would begin a new game
            life_loss_info=args.episodic_life,
            reward_clipping=False,
            max_num_frames_per_episode=args.max_episode_frames,
        )
        self.envs = AtariVectorEnv(self.game, num_envs, **self.settings | emulator_flags)
        self.envs.reset(seed=0)  # all must be reset together once before one can be alone
        self.num_envs, self.action_dim, self.sign_reward = num_envs, int(self.envs.single_action_space.n), args.sign_reward
        self.rng = np.random.default_rng([args.seed, stream])
        self.seeds, self.actions, self.returns = [0] * num_envs, [[] for _ in range(num_envs)], [0.0] * num_envs
        self.finished = []  # (return, length) of the games that ended since the last log

    def start(self, which):
        """Begin new games where the mask `which` (E,) says so: the observations (E, 4, 84, 84) of all."""
        for i in np.flatnonzero(which):
            self.seeds[i], self.actions[i], self.returns[i] = int(self.rng.integers(2**31)), [], 0.0
        seeds = np.array([self.seeds[i] for i in np.flatnonzero(which)])
        obs, info = self.envs.reset(seed=seeds, options={"reset_mask": which})
        self.last_obs, self.lives = obs.copy(), info["lives"].copy()
        return self.last_obs

    def reset(self):
        return self.start(np.ones(self.num_envs, bool))

    def step(self, actions):
        """One step with the `actions` (E,): the next observations (E, 4, 84, 84), rewards, terminations and truncations
        (E,), and the last observations of the episodes that ended here."""
        try:
            next_obs, rewards, terminations, truncations, info = self.envs.step(actions)
        except Exception as error:
            traceback.print_exc()
            fail(f"{self.game} crashed: {error!r}; --resume goes on from the last checkpoint", code=1)
        truncations = truncations & ~terminations
        ended = terminations | truncations
        life_lost = terminations & (info["lives"] > 0) & (info["lives"] < self.lives)  # some games end with a life left
        over, self.lives = ended & ~life_lost if self.episodic_life else ended, info["lives"].copy()
        for i in range(self.num_envs):
            self.actions[i].append(int(actions[i]))
            self.returns[i] += float(rewards[i])
            if over[i]:
                self.finished.append((self.returns[i], len(self.actions[i])))
        final_obs = [next_obs[i].copy() for i in np.flatnonzero(ended)]
        self.last_obs = self.start(over) if over.any() else next_obs.copy()
        return self.last_obs, np.sign(rewards) if self.sign_reward else rewards, terminations, truncations, final_obs

    def collect(self, agent, num_steps, seed):
        """States that the agent's sampled actions lead to from a reset: every frame once, (num_steps + 1, 84, 84) uint8 with
        zeros first, and the index (num_steps, 4) of each state's four."""
        frames = torch.zeros(num_steps + 1, 84, 84, dtype=torch.uint8)
        index, n, next_obs = torch.zeros(num_steps, 4, dtype=torch.int64), 0, self.reset()
        stacks, device = [None] * self.num_envs, next(agent.parameters()).device
        for noise in agent.noise(-(-num_steps // self.num_envs), self.num_envs, generator=torch.Generator().manual_seed(seed)):
            for i in range(min(self.num_envs, num_steps - n)):
                n += 1
                stacks[i] = [*stacks[i][1:], n] if self.actions[i] else [0, 0, 0, n]
                frames[n], index[n - 1] = torch.from_numpy(next_obs[i, -1]), torch.tensor(stacks[i])
            actions = agent.sample(torch.from_numpy(next_obs).to(device), noise.to(device))
            next_obs, *_ = self.step(actions.cpu().numpy())
        return frames, index

    def video(self, agent, path, seed):
        """Write one game, or its first 5,000 steps, as an mp4: the same game is played on a second emulator in colour."""
        screen = AtariVectorEnv(
            self.game, 1, **self.settings | dict(grayscale=False, img_height=210, img_width=160, stack_num=1)
        )
        obs, device = self.reset(), next(agent.parameters()).device
        screen.reset(seed=np.array(self.seeds))
        path.parent.mkdir(exist_ok=True)
        with imageio.get_writer(path, fps=60 / self.frameskip, macro_block_size=2) as video:
            for noise in agent.noise(5000, 1, generator=torch.Generator().manual_seed(seed)):
                actions = agent.sample(torch.from_numpy(obs).to(device), noise.to(device)).cpu().numpy()
                video.append_data(screen.step(actions)[0][0, 0])
                obs, *_ = self.step(actions)
                if self.finished:
                    break
        self.finished.clear()

    def state_dict(self):
        return {
            "rng": self.rng.bit_generator.state,
            "seeds": list(self.seeds),
            "actions": [torch.tensor(actions, dtype=torch.uint8) for actions in self.actions],
            "returns": list(self.returns),
            "obs": torch.from_numpy(self.last_obs),
            "finished": list(self.finished),
        }

    def load_state_dict(self, state):
        """Bring every game back by playing it again, side by side, so that all arrive together."""
        self.seeds, self.returns = list(state["seeds"]), list(state["returns"])
        self.actions = [actions.tolist() for actions in state["actions"]]
        longest = max(map(len, self.actions))
        waits = np.array([longest - len(actions) for actions in self.actions])
        for t in range(longest + 1):
            if (waits == t).any():
                seeds = np.array(self.seeds)[waits == t]
                self.last_obs, info = self.envs.reset(seed=seeds, options={"reset_mask": waits == t})
            if t < longest:
                actions = [actions[t - wait] if t >= wait else 0 for actions, wait in zip(self.actions, waits)]
                self.last_obs, *_, info = self.envs.step(np.array(actions))
        self.last_obs, self.lives = self.last_obs.copy(), info["lives"].copy()
        if not np.array_equal(self.last_obs, state["obs"].numpy()):
            say("the replayed episodes end elsewhere than before: the simulator is another one; the run goes on, but differs")
        self.rng.bit_generator.state = state["rng"]
        self.finished = [tuple(episode) for episode in state["finished"]]
        return self.last_obs


def layer_outputs(trunk, x):
    """Preactivations of a trunk, first to last: the outputs of its Linear and Conv2d layers for the input `x` (B, ...)."""
    outputs = []
    for layer in trunk:
        x = layer(x)
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            outputs.append(x)
    return outputs


class Agent(nn.Module):
    """Actor and critic. A policy is the log-probabilities (B, A) of the actions."""

    def __init__(self, envs, args):
        super().__init__()
        self.action_dim, self.activation = envs.action_dim, nn.Tanh() if args.activation == "tanh" else nn.ReLU()

        def trunk():
            return nn.Sequential(
                nn.Conv2d(4, 32, 8, stride=4),
                self.activation,
                nn.Conv2d(32, 64, 4, stride=2),
                self.activation,
                nn.Conv2d(64, 64, 3),
                self.activation,
                nn.Flatten(),
                nn.Linear(64 * 7 * 7, args.width),
            )

        self.actor_trunk, self.actor_head = trunk(), nn.Linear(args.width, self.action_dim)
        self.critic_trunk = self.actor_trunk if args.share_trunk else trunk()
        self.critic_head = nn.Linear(args.width, 1)
        # Gradients are clipped per group: actor and critic each on its own, all as one if they share a trunk
        named = list(self.named_parameters())
        networks = ("",) if args.share_trunk else ("actor", "critic")
        self.groups = [[p for name, p in named if name.startswith(network)] for network in networks]

    def actor(self, obs):
        """obs (B, 4, 84, 84) uint8 -> policy (B, A), preactivations (list), and the scaled observations."""
        x = (obs / 255).contiguous(memory_format=torch.channels_last)  # up to a quarter off a gradient step on a CPU
        outputs = layer_outputs(self.actor_trunk, x)
        return self.actor_head(self.activation(outputs[-1])).log_softmax(-1), outputs, x

    def forward(self, obs):
        """obs (B, 4, 84, 84) uint8 -> policy (B, A), values (B,), preactivations of actor and critic, each a list: three
        convolutions' (B, 32, 20, 20), (B, 64, 9, 9), (B, 64, 7, 7) and the linear layer's (B, 512)."""
        policy, actor_outputs, x = self.actor(obs)
        critic_outputs = actor_outputs
        if self.critic_trunk is not self.actor_trunk:
            critic_outputs = layer_outputs(self.critic_trunk, x)
        values = self.critic_head(self.activation(critic_outputs[-1])).squeeze(-1)
        return policy, values, actor_outputs, critic_outputs

    def noise(self, num_steps, num_envs, generator=None):
        """(T, E, A) standard Gumbel numbers, what `sample` needs."""
        return -torch.empty(num_steps, num_envs, self.action_dim).exponential_(generator=generator).log()

    @torch.no_grad()
    def sample(self, obs, noise):
        """Actions (E,) for obs (E, 4, 84, 84) and noise (E, A)."""
        return (self.actor(obs)[0] + noise).argmax(-1)

    def log_prob(self, policy, actions):
        """(B,) log-probabilities of the actions (B,)."""
        return policy.gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def entropy(self, policy, actions=None):
        """(B,) entropies."""
        return -(policy.exp() * policy).sum(-1)

    def kl(self, policy, other):
        """(B,) KL(policy || other)."""
        return (policy.exp() * (policy - other)).sum(-1)

    def variance(self, policy):
        """Variance over the states (B,) of each action's probability, averaged."""
        return policy.exp().var(0).mean()


@torch.no_grad()
def feature_ranks(features):
    """The five rank measures of the paper's appendix E for `features` (N, D): a dict of floats.

    With sigma the singular values of the uncentred matrix and delta = 0.01: `effective_rank` (Roy & Vetterli 2007),
    `pca_rank` (Yang et al. 2020; the paper's figures), `srank` (Kumar et al. 2021), `feature_rank` (Lyle et al. 2022),
    `torch_rank` (torch.linalg.matrix_rank). All are 0 for a zero or empty matrix and NaN if an entry is not finite.
    """
    delta, eps = 0.01, torch.finfo(features.dtype).eps
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
        (variance.cumsum(0) <= 1 - delta).sum() + 1,
        (p.cumsum(0) <= 1 - delta).sum() + 1,
        (sigma / math.sqrt(len(features)) > delta).sum(),
        (sigma > sigma[0] * max(features.shape) * eps).sum(),
    )
    return {name: float(rank) for name, rank in zip(names, ranks)}


@torch.no_grad()
def dead_neurons(features, activation):
    """Columns of `features` (N, D) that do not vary (the paper's footnote 7): for "relu" 0 on all samples, for "tanh" with
    a standard deviation below 0.001. NaN is not dead."""
    if activation == "relu":
        return int((features == 0).all(0).sum())
    if activation == "tanh":
        return int((features.std(0) < 0.001).sum())
    raise ValueError(f'activation must be "relu" or "tanh", not {activation!r}')


@torch.no_grad()
def ratio_stats(logratio, clip_coef):
    """How far the probability ratios leave the clipping limits (sections 3.2 and 4): a dict of floats.

    `logratio` is any shape of log pi_new(a|s) - log pi_old(a|s). `ratio_mean_above` and `ratio_mean_below` are means over
    the samples beyond the limits, `ratio_excess` their quotient; NaN where there is no such sample. Ratios are clamped to
    [1e-12, 1e12], in float64, so that a diverged policy still gives a number.
    """
    ratio = logratio.double().exp().clamp(1e-12, 1e12)
    above, below = ratio > 1 + clip_coef, ratio < 1 - clip_coef
    mean_above, mean_below = ratio[above].mean().item(), ratio[below].mean().item()
    return {
        "ratio_mean_above": mean_above,
        "ratio_mean_below": mean_below,
        "ratio_excess": mean_above / mean_below,
        "ratio_max": ratio.max().item(),
        "ratio_min": ratio.min().item(),
        "frac_above": above.double().mean().item(),
        "frac_below": below.double().mean().item(),
    }


def compute_gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
    """Advantages and returns (T, E) of generalised advantage estimation (Schulman et al. 2015).

    All arguments are (T, E). `next_values` are those of the true next observations: at an episode's end of its last
    observation, which counts unless the episode terminated. Nothing passes from one episode to another (`dones`).
    """
    deltas = rewards + gamma * (1 - terminations.to(values.dtype)) * next_values - values
    decay = gamma * gae_lambda * (1 - dones.to(values.dtype))
    advantages = torch.empty_like(deltas)
    last = torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        advantages[t] = last = deltas[t] + decay[t] * last
    return advantages, advantages + values


def pfo_loss(preactivations, old_preactivations):
    """Proximal Feature Optimization (equation 2): mean squared change of the preactivations (B, K), a scalar. The mean over
    K, where the equation has a sum, is what the published coefficients belong to."""
    return (preactivations - old_preactivations).square().mean()


def pfo_inputs(outputs, layers):
    """The preactivations (B, K) that PFO holds: the "last" of a trunk's `outputs`, or "all" of them, flattened."""
    return outputs[-1] if layers == "last" else torch.cat([output.flatten(1) for output in outputs], 1)


def pfo_value(preactivations, old_preactivations, reduction):
    """PFO with the "mean" or the "sum" over feature dimensions, without its coefficient."""
    value = pfo_loss(preactivations, old_preactivations)
    return value if reduction == "mean" else value * preactivations.shape[1]


def approx_kl(logratio):
    """Mean of (r - 1) - log r, an unbiased estimate of KL(old || new) (Schulman, "Approximating KL Divergence")."""
    return (logratio.exp() - 1 - logratio).mean().item()


def ppo_loss(agent, args, obs, actions, logprobs, advantages, returns, old_preactivations):
    """PPO-Clip's loss (equation 1) with value loss, entropy bonus and PFO on a minibatch; all arguments start with (B,).

    Returns the scalar to minimise, and for the log policy loss, value loss and PFO (3,), log-ratios (B,), policies (B, P).
    """
    policy, values, actor_outputs, _ = agent(obs)
    logratio = agent.log_prob(policy, actions) - logprobs
    ratio = logratio.clamp(math.log(1e-7), math.log(1e9)).exp()
    clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.min(ratio * advantages, clipped_ratio * advantages).mean()
    value_loss = args.vf_coef * F.mse_loss(values, returns)
    loss = policy_loss + value_loss
    if args.ent_coef:
        loss = loss - args.ent_coef * agent.entropy(policy).mean()
    with torch.set_grad_enabled(args.pfo_coef != 0):  # the value is logged in any case, but 0 * inf would be NaN
        pfo = pfo_value(pfo_inputs(actor_outputs, args.pfo_layers), old_preactivations, args.pfo_reduction)
    if args.pfo_coef:
        loss = loss + args.pfo_coef * pfo
    return loss, torch.stack([policy_loss, value_loss, pfo]).detach(), logratio.detach(), policy.detach()


def shuffled_minibatches(batch, minibatch_size):
    """One epoch: the tensors (N, ...) of the dict `batch` cut alike into random full minibatches, dicts of (B, ...), with
    the advantages normalised within each; what is left over is dropped."""
    num_minibatches = len(batch["obs"]) // minibatch_size
    order = torch.randperm(len(batch["obs"]))[: num_minibatches * minibatch_size].to(batch["obs"].device)
    parts = {name: x[order].unflatten(0, (num_minibatches, minibatch_size)) for name, x in batch.items()}
    std, mean = torch.std_mean(parts["advantages"], 1, correction=0, keepdim=True)
    parts["advantages"] = (parts["advantages"] - mean) / std.clamp_min(1e-6)
    for minibatch in zip(*parts.values()):
        yield dict(zip(parts, minibatch))


def clipped_gradient(agent, loss, max_grad_norm):
    """The gradient of `loss` for all parameters as one vector, clipped per group of the agent, and the groups' norms
    before that."""
    gradients = iter(torch.autograd.grad(loss, [p for group in agent.groups for p in group]))
    parts = [torch.cat([next(gradients).flatten() for _ in group]) for group in agent.groups]
    norms = [part.norm() for part in parts]
    parts = [part * (max_grad_norm / (norm + 1e-6)).clamp_max(1) for part, norm in zip(parts, norms)]
    return torch.cat(parts), norms


def ppo_gradient(agent, args, **minibatch):
    """The clipped gradient of `ppo_loss` and what that returns for the log; behind its losses the gradient norms of actor
    and critic before clipping."""
    loss, losses, logratio, policy = ppo_loss(agent, args, **minibatch)
    gradient, norms = clipped_gradient(agent, loss, args.max_grad_norm)
    return gradient, torch.cat([losses, torch.stack([norms[0], norms[-1]])]), logratio, policy


def make_optimizer(agent, args):
    """Adam over one vector that holds all parameters of the agent, which become views of it: one clipping and one step
    instead of one per tensor, an eighth of the time of an eager gradient step and two fifths of a compiled one."""
    parameters = [p for group in agent.groups for p in group]
    vector = nn.Parameter(torch.cat([p.detach().flatten() for p in parameters]))
    for p, part in zip(parameters, vector.detach().split([p.numel() for p in parameters])):
        p.data = part.view_as(p)
    betas = (args.adam_beta1, args.adam_beta2)
    return torch.optim.Adam([vector], args.learning_rate, betas, eps=1e-8, fused=True), vector


@torch.no_grad()
def evaluate(agent, obs, pfo_layers):
    """The networks on `obs` (N, ...): policy (N, P), values (N,), what PFO holds (N, K), and the last preactivations (N, D)
    of actor and critic. In chunks, so that the conv maps of a whole batch never stand in memory at once."""
    chunks = []
    for chunk in obs.split(1024):
        policy, values, actor_outputs, critic_outputs = agent(chunk)
        held = pfo_inputs(actor_outputs, pfo_layers)
        chunks.append((policy, values, held, actor_outputs[-1], critic_outputs[-1]))
    return [torch.cat(parts) for parts in zip(*chunks)]


@torch.no_grad()
def capacity_target(target, frames, index):
    """What `target` puts out on the states frames[index]: the data (frames, index, policies (N, P), values (N,)) to fit."""
    device = next(target.parameters()).device
    outputs = [target(frames[chunk].to(device))[:2] for chunk in index.split(1024)]
    return frames, index, *(torch.cat(parts) for parts in zip(*outputs))


def capacity_loss(agent, args, frames, index, target_policies, target_values, adam_state=None):
    """What is left of the loss when a copy of the networks was fitted to a random target (section 2, "Capacity loss").

    The actor's loss is the mean KL(target || copy), the critic's the mean squared error. Adam with the run's settings, fresh
    or from `adam_state`, takes `capacity_epochs` over the data; each fit shuffles alike and touches no other random generator.
    Returns floats: `actor` and `critic` on all data after the fit, and the same `_last_minibatch` before the last step.
    """
    device = target_values.device
    copied = copy.deepcopy(agent)
    optimizer, vector = make_optimizer(copied, args)
    if adam_state:
        optimizer.load_state_dict(optimizer.state_dict() | {"state": adam_state})
    generator = torch.Generator().manual_seed(args.seed)

    def losses(rows):
        policies, values, *_ = copied(frames[index[rows]].to(device))
        rows = rows.to(device)
        return copied.kl(target_policies[rows], policies), (values - target_values[rows]).square()

    for _ in range(args.capacity_epochs):
        permutation = torch.randperm(len(index), generator=generator)
        for rows in permutation[: len(index) // args.minibatch_size * args.minibatch_size].split(args.minibatch_size):
            actor_last, critic_last = (loss.mean() for loss in losses(rows))
            vector.grad, _ = clipped_gradient(copied, actor_last + critic_last, args.max_grad_norm)
            optimizer.step()
    with torch.no_grad():
        chunks = [losses(rows) for rows in torch.arange(len(index)).split(1024)]
    actor, critic = (torch.cat(parts).mean() for parts in zip(*chunks))
    names = ("actor", "critic", "actor_last_minibatch", "critic_last_minibatch")
    return {name: loss.item() for name, loss in zip(names, (actor, critic, actor_last, critic_last))}


def network_norms(agent):
    """L2 norms of all weights and biases of the actor and of the critic."""
    modules = {"actor": (agent.actor_trunk, agent.actor_head), "critic": (agent.critic_trunk, agent.critic_head)}
    return {
        name: torch.cat([p.detach().flatten() for module in pair for p in module.parameters()]).norm().item()
        for name, pair in modules.items()
    }


def nonfinite_parts(agent, **tensors):
    """Names of the tensors that hold a NaN or an infinity, "parameters" for those of the agent."""
    tensors["parameters"] = torch.cat([p.detach().flatten() for p in agent.parameters()])
    return [name for name, x in tensors.items() if not x.isfinite().all()]


def due(interval, iteration, num_iterations):
    """Whether what happens every `interval` (fraction of the run) falls on this iteration.

    It falls on the whole iterations nearest to 0, 1, 2, ... intervals, at least one apart, and on the last; 0: never."""
    if interval == 0:
        return False
    period = max(1.0, interval * num_iterations)
    return iteration == num_iterations or round(round(iteration / period) * period) == iteration


class EventLog:
    """A TensorBoard event file that can be cut back to an earlier `size` in bytes, which is how a resumed run writes no
    point twice; what could not be written (a full disk) stays in `pending` for the next flush."""

    def __init__(self, path, size=0):
        self.path, self.size = path, size
        self.pending = [] if size else [Event(wall_time=time.time(), file_version="brain.Event:2")]

    def add(self, scalars, step):
        """Keep the dict `scalars` at `step` for the next flush. Numbers that are not finite are written as NaN."""
        values = [
            Summary.Value(tag=tag, simple_value=value if math.isfinite(value) else math.nan) for tag, value in scalars.items()
        ]
        self.pending.append(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def flush(self):
        """Write what is pending behind the first `size` bytes. Raises OSError, and then loses nothing."""
        with open(self.path, "r+b" if self.size else "wb") as file:
            file.truncate(self.size)
            file.seek(self.size)
            for event in self.pending:
                RecordWriter(file).write(event.SerializeToString())
            file.flush()
            os.fsync(file.fileno())
            self.size, self.pending = file.tell(), []


class Stopwatch(dict):
    """Seconds by name: `lap(name)` adds the time since the last lap."""

    def __init__(self, synchronize):
        self.last, self.synchronize = time.perf_counter(), synchronize

    def lap(self, name):
        if self.synchronize:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self[name] = self.get(name, 0.0) + now - self.last
        self.last = now


def save(state, path):
    """Write `state` (tensors and plain values) to `path` at once or not at all. Raises OSError."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if path.name == "latest.pt" and path.exists():
            os.replace(path, path.with_name("previous.pt"))
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def lock_run(run_dir):
    """The open lock file that keeps other processes out of the run's folder."""
    try:
        lock = open(run_dir / ".lock", "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is at work on {run_dir}")
    except OSError as error:
        fail(f"--runs-dir: {run_dir} cannot be written ({error.strerror}); name a folder that can")
    return lock


def open_run(run_dir, args, lock, first_states):
    """Make the run's folder with args.json and the dict `first_states` (path: state) in it. Returns its lock, which may be
    held already."""
    try:
        run_dir.mkdir(parents=True, exist_ok=lock is not None)
        lock = lock or lock_run(run_dir)
        temporary = run_dir / "args.json.tmp"
        temporary.write_text(json.dumps(asdict(args), indent=2) + "\n")
        os.replace(temporary, run_dir / "args.json")
        for name, state in first_states.items():
            save(state, run_dir / name)
    except OSError as error:
        fail(f"--runs-dir: {run_dir} cannot be written ({error.strerror}); name a folder that can")
    return lock


def start_tracking(args):
    """A Weights & Biases run that goes on if the run does."""
    import wandb

    name, entity = args.run_name, args.wandb_entity or None
    return wandb.init(project=args.wandb_project, entity=entity, name=name, id=name, resume="allow", config=asdict(args))


def load_latest(run_dir):
    """The state that a run can go on from: `latest.pt`, or the one before if that cannot be read; None if there is none."""
    paths = [path for path in (run_dir / "latest.pt", run_dir / "previous.pt") if path.exists()]
    for path in paths:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can raise almost anything
            say(f"{path} cannot be read ({type(error).__name__}); trying the one before")
            continue
        if path != paths[0]:  # the next save must not put the damaged one in the place of the good one
            paths[0].rename(run_dir / "latest.damaged")
        return state
    if paths:
        fail(f"no checkpoint of {run_dir} can be read: start again under another --run-name")
    if any(path.name != "0.pt" for path in run_dir.glob("checkpoints/*.pt")):
        fail(f"{run_dir} keeps no state to go on from (--checkpoint-interval was 0): use another --run-name")


def check_resumed(args, saved, versions):
    """Exit if the saved run had other arguments; warn if it had other versions."""
    free = ("total_timesteps", "runs_dir", "run_name", "resume", "track", "wandb_project", "wandb_entity", "capture_video")
    free += ("stop_on_nonfinite", "save_patience", "profile", "cuda")
    differ = [
        f"--{name.replace('_', '-')} was {saved['args'].get(name)} and is {value}"
        for name, value in asdict(args).items()
        if name not in free and not name.endswith("_interval") and saved["args"].get(name) != value
    ]
    if differ:
        fail(f"--resume with other arguments: {'; '.join(differ)}. Use the run's own, or another --run-name")
    for name, value in versions.items():
        if saved["versions"].get(name) != value:
            say(f"{name} was {saved['versions'].get(name)} and is {value}: the run goes on, but not bit for bit")


def snapshot(args, iteration, global_step, agent, optimizer, envs):
    """What a kept checkpoint holds: weights, optimizer, arguments, counters and observation statistics."""
    return {
        "script": Path(__file__).stem,
        "args": asdict(args),
        "iteration": iteration,
        "global_step": global_step,
        "agent": agent.state_dict(),
        "optimizer": optimizer.state_dict(),
        "obs_stats": envs.obs_stats,
    }


def rng_state(generator):
    """The states of Python's, NumPy's and torch's random generators and of the NumPy `generator`, as plain values."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "generator": generator.bit_generator.state,
    }


def resume_state(envs, mask_rng, versions, log_size=0, first_scalars=None, last_scalars=None):
    """What the state that a run goes on from holds besides a checkpoint."""
    return {
        "envs": envs.state_dict(),
        "rng": rng_state(mask_rng),
        "versions": versions,
        "log_size": log_size,
        "first_scalars": first_scalars or {},
        "last_scalars": last_scalars or {},
    }


def set_rng_state(state, generator):
    """Undo everything that was drawn since `rng_state`."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    generator.bit_generator.state = state["generator"]


def catch_signals():
    """A list that SIGINT and SIGTERM are put into; the second of a kind ends the process at once."""
    received = []

    def handler(number, frame):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)
    return received


def print_summary(run_dir, first_scalars, last_scalars, seconds):
    """The diagnostics at the start and at the end of the run, and where the time went."""
    print(f"{run_dir}\n{'':40}{'first':>12}{'last':>12}")
    for tag in (
        "charts/episodic_return",
        "representation/actor/pca_rank",
        "representation/actor/dead_neurons",
        "representation/actor/preactivation_norm",
        "representation/critic/pca_rank",
        "trust_region/ratio_mean_above",
        "trust_region/ratio_mean_below",
        "policy/entropy",
        "policy/variance",
        "capacity/actor",
        "capacity/critic",
    ):
        print(f"{tag:40}{first_scalars.get(tag, math.nan):12.4g}{last_scalars.get(tag, math.nan):12.4g}")
    for name, part in seconds.items():
        print(f"time in {name:12}{part:10.2f} s {part / sum(seconds.values()):6.1%}")


def main():
    # Setup
    args = parse_args(Args)
    args.check()
    default_name = f"{args.env_id}__{Path(__file__).stem}__{args.seed}__{int(time.time())}"
    args.run_name = args.run_name or default_name.replace("/", "-")
    run_dir = Path(args.runs_dir) / args.run_name
    if run_dir.exists() and not args.resume:
        fail(f"{run_dir} exists: choose another --run-name, or --resume to go on with it")
    batch_size = args.num_envs * args.num_steps
    steps_per_iteration = batch_size * args.frameskip
    num_iterations = args.total_timesteps // steps_per_iteration
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    versions = {name: version(name) for name in ("torch", "numpy", "gymnasium", "ale-py")}
    versions["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    lock = lock_run(run_dir) if args.resume and run_dir.exists() else None
    saved = load_latest(run_dir) if args.resume else None
    if saved:
        check_resumed(args, saved, versions)
        if saved["iteration"] >= num_iterations:
            say(f"{run_dir} is finished: {saved['global_step']} steps. A larger --total-timesteps would go on")
            return
    if batch_size % args.minibatch_size:
        say(f"{batch_size % args.minibatch_size} of the batch's {batch_size} samples are dropped in every epoch")

    random.seed(args.seed)
    np.random.seed(args.seed)
    if args.torch_threads:
        torch.set_num_threads(args.torch_threads)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = args.tf32
    envs = Envs(args, args.num_envs, stream=0)
    torch.manual_seed(2**32 - 1 - args.seed)  # an odd sum: never the agent's own seed
    target = Agent(envs, args).to(device)
    torch.manual_seed(args.seed)
    agent = Agent(envs, args).to(device)
    optimizer, vector = make_optimizer(agent, args)
    mask_rng = np.random.default_rng([args.seed, 1])
    gradient = ppo_gradient
    if args.compile:
        torch._dynamo.config.trace_autograd_ops = True  # backward and clipping in the same graph: half the time
        torch._inductor.config.fallback_random = True  # the eager script's random numbers
        torch._inductor.config.cpp_wrapper = device.type == "cpu"  # a tenth faster
        gradient = torch.compile(ppo_gradient, fullgraph=True)
    if args.capture_video:
        video_envs = Envs(args, 1, stream=4)
    next_obs, first_states = envs.reset(), {}
    if not saved:
        first = snapshot(args, 0, 0, agent, optimizer, envs)
        if args.snapshot_interval:
            first_states["checkpoints/0.pt"] = first
        if args.checkpoint_interval:  # from here on the run can be resumed
            first_states["latest.pt"] = first | resume_state(envs, mask_rng, versions)
    lock = open_run(run_dir, args, lock, first_states)
    stop_signals = catch_signals()
    tracker = start_tracking(args) if args.track else None

    if args.capacity_interval:
        capacity_envs = Envs(args, args.capacity_envs, stream=2)
        collector = target if args.capacity_data == "target" else agent
        states = capacity_envs.collect(collector, args.capacity_steps, seed=args.seed)
        capacity_data = capacity_target(target, *states)
    first_iteration, global_step, first_scalars, last_scalars = 0, 0, {}, {}
    log = EventLog(run_dir / f"events.out.tfevents.{args.run_name}", size=saved["log_size"] if saved else 0)
    if saved:
        if log.size > (log.path.stat().st_size if log.path.exists() else 0):
            fail(f"{log.path} is shorter than it was: bring it back, or start again under another --run-name")
        first_iteration, global_step = saved["iteration"], saved["global_step"]
        first_scalars, last_scalars = saved["first_scalars"], saved["last_scalars"]
        agent.load_state_dict(saved["agent"])
        optimizer.load_state_dict(saved["optimizer"])
        next_obs = envs.load_state_dict(saved["envs"])
        set_rng_state(saved["rng"], mask_rng)
        say(f"{run_dir} goes on at step {global_step}")

    obs = torch.zeros(args.num_steps, args.num_envs, 4, 84, 84, dtype=torch.uint8, device=device)
    actions = torch.zeros(args.num_steps, args.num_envs, dtype=torch.int64, device=device)
    pinned = torch.zeros(args.num_envs, 4, 84, 84, dtype=torch.uint8, pin_memory=device.type == "cuda")
    rewards = np.zeros((args.num_steps, args.num_envs), np.float32)
    terminations, truncations = np.zeros_like(rewards, bool), np.zeros_like(rewards, bool)
    if args.capacity_interval and first_iteration == 0:
        capacity = capacity_loss(agent, args, *capacity_data)
        log.add({f"capacity/{name}": value for name, value in capacity.items()}, 0)

    nonfinite_said, failing_since, unsaved = set(), None, {}
    loss_names = ("policy_loss", "value_loss", "pfo_loss", "actor_grad_norm", "critic_grad_norm")
    log_time, log_iteration = time.perf_counter(), first_iteration
    watch = Stopwatch(synchronize=args.profile and device.type == "cuda")
    bar = tqdm(
        total=num_iterations * steps_per_iteration, initial=global_step, unit=" steps", mininterval=1, dynamic_ncols=True
    )
    for iteration in range(first_iteration + 1, num_iterations + 1):
        # Rollout: with the actor alone; values and log-probabilities of the whole batch come from one forward afterwards
        noise = agent.noise(args.num_steps, args.num_envs).to(device)
        final_obs = []
        for step in range(args.num_steps):
            pinned.copy_(torch.from_numpy(next_obs))
            obs[step].copy_(pinned, non_blocking=True)
            actions[step] = agent.sample(obs[step], noise[step])
            env_actions = actions[step].cpu().numpy()
            watch.lap("inference")
            next_obs, rewards[step], terminations[step], truncations[step], ended = envs.step(env_actions)
            final_obs += ended
            watch.lap("environment")
        global_step += steps_per_iteration
        if args.reward_keep_prob < 1:
            rewards *= mask_rng.random(rewards.shape) < args.reward_keep_prob
        b_obs, b_actions = obs.flatten(0, 1), actions.flatten()
        last_obs = torch.from_numpy(np.stack([*next_obs, *final_obs])).to(device)

        # Advantages
        b_policies, b_values, b_held, actor_preactivations, critic_preactivations = evaluate(agent, b_obs, args.pfo_layers)
        b_logprobs = agent.log_prob(b_policies, b_actions)
        dones = terminations | truncations
        values, last_values = b_values.view(dones.shape).cpu(), evaluate(agent, last_obs, args.pfo_layers)[1].cpu()
        next_values = torch.cat([values[1:], last_values[None, : args.num_envs]])
        next_values[torch.from_numpy(dones)] = last_values[args.num_envs :]
        advantages, returns = compute_gae(
            torch.from_numpy(rewards),
            values,
            next_values,
            torch.from_numpy(dones if args.time_limit == "terminate" else terminations),
            torch.from_numpy(dones),
            args.gamma,
            args.gae_lambda,
        )
        b_advantages, b_returns = advantages.flatten().to(device), returns.flatten().to(device)
        weight_norms = network_norms(agent)

        # PPO update
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = (1 - (iteration - 1) / num_iterations) * args.learning_rate
        batch = {"obs": b_obs, "actions": b_actions, "logprobs": b_logprobs}
        batch |= {"advantages": b_advantages, "returns": b_returns, "old_preactivations": b_held}
        outputs = []
        for _ in range(args.update_epochs):
            for minibatch in shuffled_minibatches(batch, args.minibatch_size):
                vector.grad, *step_outputs = gradient(agent, args, **minibatch)
                optimizer.step()
                outputs.append((*step_outputs, minibatch["actions"]))
            if args.target_kl and approx_kl(outputs[-1][1]) > args.target_kl:
                break
        if args.reset_adam:
            optimizer.state.clear()
        losses, *outputs = (torch.stack(x) for x in zip(*outputs))
        nonfinite = nonfinite_parts(agent, observations=b_obs, **dict(zip(loss_names, losses.T)))
        nonfinite = [name for name in nonfinite if name not in nonfinite_said]
        nonfinite_said.update(nonfinite)
        if nonfinite:
            say(f"not finite, first in iteration {iteration} (up to step {global_step}): {', '.join(nonfinite)}")
        broken = "parameters" in nonfinite or bool(nonfinite and args.stop_on_nonfinite)
        watch.lap("update")

        # Representation
        logging, scalars = due(args.log_interval, iteration, num_iterations) or broken, {}
        if logging:
            for name, x in (("actor", actor_preactivations), ("critic", critic_preactivations)):
                features = agent.activation(x)
                measured = feature_ranks(features)
                measured["dead_neurons"] = dead_neurons(features, args.activation)
                measured["preactivation_norm"] = x.norm(dim=1).mean().item()
                measured["feature_norm"] = features.norm(dim=1).mean().item()
                measured["weight_norm"] = weight_norms[name]
                scalars |= {f"representation/{name}/{key}": value for key, value in measured.items()}
            scalars["policy/variance"] = agent.variance(b_policies).item()
            scalars["policy/entropy"] = agent.entropy(b_policies, b_actions).mean().item()

        # Trust region
        if logging:
            new_policies, _, new_held, *_ = evaluate(agent, b_obs, args.pfo_layers)
            stats = ratio_stats(agent.log_prob(new_policies, b_actions) - b_logprobs, args.clip_coef)
            stats["kl"] = agent.kl(b_policies, new_policies).mean().item()
            stats["preactivation_drift"] = pfo_value(new_held, b_held, args.pfo_reduction).item()
            scalars |= {f"trust_region/{key}": value for key, value in stats.items()}
        watch.lap("diagnostics")

        # Capacity loss
        if due(args.capacity_interval, iteration, num_iterations):
            capacity = capacity_loss(agent, args, *capacity_data)
            scalars |= {f"capacity/{name}": value for name, value in capacity.items()}
        watch.lap("capacity")

        # Logging
        if logging:
            if envs.finished:
                scalars["charts/episodic_return"], scalars["charts/episodic_length"] = np.mean(envs.finished, 0).tolist()
                envs.finished.clear()
            scalars["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
            scalars["charts/SPS"] = (iteration - log_iteration) * batch_size / (time.perf_counter() - log_time)
            scalars |= {f"losses/{name}": mean for name, mean in zip(loss_names, losses.mean(0).tolist())}
            logratio, policies, taken = outputs
            scalars["losses/entropy"] = agent.entropy(policies, taken).mean().item()
            scalars["losses/approx_kl"], scalars["losses/old_approx_kl"] = approx_kl(logratio), -logratio.mean().item()
            scalars["losses/clipfrac"] = ((logratio.exp() - 1).abs() > args.clip_coef).float().mean().item()
            scalars["losses/policy_objective_last_minibatch"] = -losses[-1, 0].item()
            scalars["losses/explained_variance"] = (1 - (b_returns - b_values).var() / b_returns.var()).item()
            log_time, log_iteration = time.perf_counter(), iteration
        if scalars:
            log.add(scalars, global_step)
            if tracker:
                tracker.log(scalars, step=global_step)
            first_scalars, last_scalars = scalars | first_scalars, last_scalars | scalars
            bar.set_postfix_str(
                f"return {last_scalars.get('charts/episodic_return', math.nan):.0f}, "
                f"rank {last_scalars.get('representation/actor/pca_rank', math.nan):.0f}, "
                f"dead {last_scalars.get('representation/actor/dead_neurons', math.nan):.0f}",
                refresh=False,
            )
        bar.update(steps_per_iteration)
        watch.lap("logging")

        # Checkpoint
        stopping = bool(stop_signals)  # looked at once: a signal that comes while saving waits for the next iteration
        keep = due(args.snapshot_interval, iteration, num_iterations) or broken
        resumable = due(args.checkpoint_interval, iteration, num_iterations) or stopping or failing_since
        resumable = resumable and args.checkpoint_interval > 0 and not broken
        if log.pending or keep or resumable or unsaved:
            state = snapshot(args, iteration, global_step, agent, optimizer, envs)
            if keep:
                unsaved[f"{global_step}.pt"] = state
            try:
                log.flush()
                for name in list(unsaved):
                    save(unsaved[name], run_dir / "checkpoints" / name)
                    del unsaved[name]
                if resumable:
                    extra = resume_state(envs, mask_rng, versions, log.size, first_scalars, last_scalars)
                    save(state | extra, run_dir / "latest.pt")
                if failing_since:
                    say(f"{run_dir} can be written again")
                failing_since = None
            except OSError as error:
                unsaved = copy.deepcopy(unsaved)  # the weights of now, for the next try
                if not failing_since:
                    say(f"step {global_step}: {run_dir} cannot be written ({error.strerror}); the run goes on and tries again")
                failing_since = failing_since or time.monotonic()
                if time.monotonic() - failing_since >= args.save_patience or iteration == num_iterations:
                    fail(f"step {global_step}: {run_dir} could not be written ({error.strerror}), the run stops", code=1)
        if keep and args.capture_video:
            try:
                video_envs.video(agent, run_dir / "videos" / f"{global_step}.mp4", seed=args.seed)
            except Exception as error:  # a full disk, a renderer that fails: training does not depend on it
                say(f"step {global_step}: no video ({error!r})")
        watch.lap("checkpoint")
        if broken:
            fail(
                f"stopped at step {global_step} by non-finite {', '.join(nonfinite)}; kept as checkpoints/{global_step}.pt",
                code=1,
            )
        if stopping:
            say(f"stopped by {signal.Signals(stop_signals[0]).name} after step {global_step}; --resume goes on")
            raise SystemExit(128 + stop_signals[0])

    bar.close()
    lock.close()
    print_summary(run_dir, first_scalars, last_scalars, watch if args.profile else {})


if __name__ == "__main__":
    try:
        main()
    except torch.OutOfMemoryError:
        fail("CUDA is out of memory: use a smaller --minibatch-size or --num-envs, or --no-cuda", code=1)

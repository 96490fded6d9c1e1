"""The tables of .results/speed.md: the scripts against Stable-Baselines3 or another checkout.

    pip install stable-baselines3==2.9.2
    python tests/benchmark.py                  # about an hour on two cores that are idle
    python tests/benchmark.py --repeats 1      # a first look
    python tests/benchmark.py --against PATH   # the scripts of another checkout instead of SB3

Ours and theirs run in turn, in processes of their own, with the same hyperparameters. Each pair
gives a ratio. Speeds are agent steps per second after start and compilation, from the event files.
"""

import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]

SB3_START = """
import gymnasium as gym, sys, time, torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback

class Clock(BaseCallback):
    starts = []
    def _on_step(self): return True
    def _on_rollout_start(self): self.starts.append(time.perf_counter())
"""
SB3_MUJOCO = """
from stable_baselines3.common.env_util import make_vec_env
gym.logger.min_level = gym.logger.ERROR
torch.set_num_threads(1)
env_id, epochs, iterations, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), 2048
net = dict(net_arch=dict(pi=[64, 64], vf=[64, 64]), optimizer_kwargs=dict(eps=1e-8))
envs = make_vec_env(env_id, n_envs=2, seed=1)
model = PPO("MlpPolicy", envs, n_steps=1024, batch_size=64, n_epochs=epochs, device="cpu",
            policy_kwargs=net, learning_rate=3e-4, gamma=0.99, gae_lambda=0.95, clip_range=0.2,
            ent_coef=0.0, vf_coef=0.5)
"""
SB3_ATARI = """
import ale_py
from stable_baselines3.common.atari_wrappers import ClipRewardEnv, WarpFrame
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack
gym.register_envs(ale_py)
torch.set_num_threads(2)

def make():
    env = gym.make("ALE/Phoenix-v5", frameskip=3, repeat_action_probability=0.25)
    return ClipRewardEnv(WarpFrame(env))

iterations, steps = int(sys.argv[1]), 1024
envs = VecFrameStack(DummyVecEnv([make] * 8), 4)
model = PPO("CnnPolicy", envs, n_steps=128, batch_size=256, n_epochs=4, device="cpu",
            policy_kwargs=dict(share_features_extractor=False), learning_rate=2.5e-4,
            clip_range=0.1, ent_coef=0.01)
"""
SB3_END = """
clock = Clock()
model.learn(steps * iterations, callback=clock)
ends = clock.starts[1:] + [time.perf_counter()]
print(steps * (iterations - 1) / (ends[-1] - ends[0]))
"""


@dataclass
class Args:
    """Measure the tables of .results/speed.md."""

    repeats: int = 5  # pairs of runs
    iterations: int = 25  # iterations of a MuJoCo run; Atari takes a fifth
    only: str = ""  # measure only the rows whose name contains this text
    against: str = ""  # compare with the scripts of another checkout instead of SB3


def measure(root, script, flags, iterations, log_every=2.44, steps=2048, warm_up=4):
    """Agent steps per second of a script of the checkout `root` after `warm_up` iterations. By
    default a full run logs at every 2.44th of its 2,441 iterations, so this does too."""
    frames = steps * (3 if script == "ppo_atari" else 1)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, Path(root, f"{script}.py")]
        command += ["train"] if script == "ppo_toy" else ["--no-cuda", "--checkpoint-interval", 0.5]
        command += ["--runs-dir", folder, "--run-name", "run", "--snapshot-interval", 1]
        command += ["--total-timesteps", frames * iterations]  # saving is measured apart
        command += ["--log-interval", min(1.0, log_every / iterations), *flags.split()]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
        events = EventAccumulator(f"{folder}/run", size_guidance={"scalars": 0})
        events.Reload()
        points = [(x.step / frames, x.wall_time) for x in events.Scalars("charts/SPS")]
    first = next(point for point in points if point[0] >= warm_up)
    return (points[-1][0] - first[0]) * steps / (points[-1][1] - first[1])


def seconds(iterations, mode, **changed):
    """How long a run on Hopper-v4 takes after its fourth iteration, without the parts that are not
    training. `changed` are the intervals of those that it has."""
    intervals = {"capacity": 0, "checkpoint": 1, "snapshot": 1, "log": 4 / iterations} | changed
    flags = " ".join(f"--{name}-interval {x}" for name, x in intervals.items())
    return 2048 * (iterations - 4) / measure(ROOT, "ppo_mujoco", f"{flags} {mode}", iterations)


def theirs(code, *arguments):
    """The steps per second that Stable-Baselines3 code prints."""
    code = SB3_START + code + SB3_END
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(process.stdout.split()[-1])


def start_up(script, flags=""):
    """Seconds from the start of a script to its first iteration, beyond importing torch."""
    started = time.time()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    torch_seconds = time.time() - started
    with tempfile.TemporaryDirectory() as folder:
        started = time.time()
        command = [sys.executable, ROOT / f"{script}.py", *flags.split(), "--runs-dir", folder]
        subprocess.run([*command, "--run-name", "run"], check=True, capture_output=True)
        events = EventAccumulator(f"{folder}/run")
        events.Reload()
        return events.Scalars("capacity/actor")[0].wall_time - started - torch_seconds


def spread(values, form):
    middle, *ends = (form.format(f(values)) for f in (statistics.median, min, max))
    return f"{middle} ({ends[0]} to {ends[1]})"


ACROBOT = "--env-id Acrobot-v1 --activation relu --width 32 --update-epochs 80"


def speeds(args):
    print(f"| | ours, steps/s | {args.against or 'SB3'}, steps/s | ratio |\n|---|---|---|---|")
    n = args.iterations
    rows = {}
    for env_id, epochs, mode in (
        ("HalfCheetah-v4", 10, ""),
        ("Hopper-v4", 10, ""),
        ("HalfCheetah-v4", 10, "--compile"),
        ("Hopper-v4", 10, "--compile"),
        ("HalfCheetah-v4", 20, "--compile"),
    ):
        flags = f"--env-id {env_id} --update-epochs {epochs} --capacity-interval 0 {mode}"
        sb3 = SB3_MUJOCO, env_id, epochs, max(3, n // 3)
        name = f"{env_id}, {epochs} epochs, {mode or 'eager'}"
        rows[name] = ("ppo_mujoco", flags, n), sb3
    # on Atari a log point falls on every 33rd iteration: here on the last
    flags = "--torch-threads 2 --env-threads 2 --capacity-interval 0"
    few = max(4, n // 5)
    rows["Phoenix, 4 epochs, 2 threads"] = ("ppo_atari", flags, few, 1, 1024, 1), (SB3_ATARI, few)
    if args.against:
        for mode in ("", "--compile"):
            flags = f"{ACROBOT} --capacity-interval 0 {mode}"
            rows[f"Acrobot-v1, {mode or 'eager'}"] = ("ppo_toy", flags, n, 2.44, 1024), None
    for name, (ours, sb3) in rows.items():
        if args.only not in name:
            continue
        pairs = []
        for _ in range(args.repeats):
            speed = measure(ROOT, *ours)
            other = measure(args.against, *ours) if args.against else theirs(*sb3)
            pairs.append((speed, other))
        speeds_of_both = " | ".join(spread(column, "{:.0f}") for column in zip(*pairs))
        ratios = spread([ours / other for ours, other in pairs], "{:.3f}")
        print(f"| {name} | {speeds_of_both} | {ratios} |", flush=True)


def costs(args):
    """The shares of a full Hopper-v4 run of 2,441 iterations that are not training: the time of
    runs with a part, minus that of runs without it, scaled to the part's default interval. The
    capacity loss is fitted 41 times in a full run."""
    print("\n| share of a full-length Hopper-v4 run | diagnostics | capacity loss | saving |")
    print("|---|---|---|---|")
    n = args.iterations
    for mode in ("", "--compile"):
        shares = []
        for _ in range(args.repeats):
            plain = seconds(n, mode)
            points = (seconds(n, mode, log=1 / n) - plain) / (n * 3 / 4)  # seconds a log point
            fit = (seconds(n, mode, capacity=4 / n) - plain) / (n / 4 - 1)
            save = (seconds(n, mode, checkpoint=1 / n) - plain) / (n - 4)
            full = plain / (n - 4) * 2441
            shares.append([points * 1000 / full, fit * 41 / full, save * 541 / full])
        cells = [spread(column, "{:.1%}") for column in zip(*shares)]
        print(f"| {mode or 'eager'} | {' | '.join(cells)} |", flush=True)


def main():
    args = tyro.cli(Args)
    machine = platform.processor() or platform.machine()
    print(f"{date.today()}, {machine}, torch {torch.__version__},", end=" ")
    print(f"median (range) of {args.repeats} pairs\n")
    speeds(args)
    if args.only in "diagnostics" and not args.against:
        costs(args)
    if args.only in "start" and not args.against:
        print("\n| start to first iteration beyond importing torch | s |\n|---|---|")
        toy = "ppo_toy", "train --total-timesteps 1024"
        for script, flags in (("ppo_mujoco", "--total-timesteps 2048"), toy):
            values = [start_up(script, flags) for _ in range(args.repeats)]
            print(f"| {script}.py | {spread(values, '{:.1f}')} |", flush=True)


if __name__ == "__main__":
    main()

"""Speed of the training scripts against Stable-Baselines3, and the cost of the diagnostics: the tables of the README.

    pip install stable-baselines3==2.9.2
    python tests/benchmark.py                # about half an hour on two cores that do nothing else
    python tests/benchmark.py --repeats 1    # a first look

Ours and theirs run in turn, in processes of their own, with the same hyperparameters; a ratio is taken within each pair,
since the speed of a shared machine drifts. Speeds are agent steps per second after warm-up (start and compilation left out).
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

SB3_MUJOCO = """
import gymnasium as gym, sys, time, torch
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
gym.logger.min_level = gym.logger.ERROR
torch.set_num_threads(1)

class Clock(BaseCallback):
    starts = []
    def _on_step(self): return True
    def _on_rollout_start(self): self.starts.append(time.perf_counter())

env_id, epochs, iterations = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
net = dict(net_arch=dict(pi=[64, 64], vf=[64, 64]), optimizer_kwargs=dict(eps=1e-8))
model = PPO("MlpPolicy", make_vec_env(env_id, n_envs=2, seed=1), n_steps=1024, batch_size=64, n_epochs=epochs, device="cpu",
            policy_kwargs=net, learning_rate=3e-4, gamma=0.99, gae_lambda=0.95, clip_range=0.2, ent_coef=0.0, vf_coef=0.5)
clock = Clock()
model.learn(2048 * iterations, callback=clock)
ends = clock.starts[1:] + [time.perf_counter()]
print(2048 * (iterations - 1) / (ends[-1] - ends[0]))
"""

SB3_ATARI = """
import ale_py, gymnasium as gym, sys, time, torch
from stable_baselines3 import PPO
from stable_baselines3.common.atari_wrappers import ClipRewardEnv, WarpFrame
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack
gym.register_envs(ale_py)
torch.set_num_threads(2)

class Clock(BaseCallback):
    starts = []
    def _on_step(self): return True
    def _on_rollout_start(self): self.starts.append(time.perf_counter())

def make(): return ClipRewardEnv(WarpFrame(gym.make("ALE/Phoenix-v5", frameskip=3, repeat_action_probability=0.25)))

iterations = int(sys.argv[1])
model = PPO("CnnPolicy", VecFrameStack(DummyVecEnv([make] * 8), 4), n_steps=128, batch_size=256, n_epochs=4, device="cpu",
            policy_kwargs=dict(share_features_extractor=False), learning_rate=2.5e-4, clip_range=0.1, ent_coef=0.01)
clock = Clock()
model.learn(1024 * iterations, callback=clock)
ends = clock.starts[1:] + [time.perf_counter()]
print(1024 * (iterations - 1) / (ends[-1] - ends[0]))
"""


@dataclass
class Args:
    """Measure the speed tables of the README."""

    repeats: int = 5
    """pairs of runs"""
    iterations: int = 25
    """iterations of a MuJoCo run; Atari takes a fifth"""
    only: str = ""
    """measure only the rows whose name contains this"""


def ours(script, flags, iterations, log_every, steps_per_iteration=2048, warm_up=4):
    """Agent steps per second of a training script after `warm_up` iterations, measured by the times in its event file."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / f"{script}.py", *flags.split(), "--runs-dir", folder, "--run-name", "run"]
        frames = steps_per_iteration * (3 if script == "ppo_atari" else 1)
        command += ["--total-timesteps", str(frames * iterations), "--log-interval", str(min(1.0, log_every / iterations))]
        command += ["--checkpoint-interval", "0.5", "--capacity-interval", "0", "--no-cuda"]
        subprocess.run(list(map(str, command)), check=True, capture_output=True)
        events = EventAccumulator(f"{folder}/run", size_guidance={"scalars": 0})
        events.Reload()
        points = [(event.step / frames, event.wall_time) for event in events.Scalars("charts/SPS")]
    first = next(point for point in points if point[0] >= warm_up)
    return (points[-1][0] - first[0]) * steps_per_iteration / (points[-1][1] - first[1])


def theirs(code, *arguments):
    """What Stable-Baselines3 code prints."""
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def profile(script, flags, iterations, steps):
    """Seconds by part of a profiled run, from what it prints."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / f"{script}.py", *flags.split(), "--runs-dir", folder, "--profile", "--no-cuda"]
        command += ["--total-timesteps", str(iterations * steps), "--checkpoint-interval", "1", "--snapshot-interval", "1"]
        output = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout
    return {line.split()[2]: float(line.split()[3]) for line in output.splitlines() if line.startswith("time in ")}


def start_up(script, flags=""):
    """Seconds from the start of a script to its first iteration, beyond importing torch."""
    started = time.time()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    torch_seconds = time.time() - started
    with tempfile.TemporaryDirectory() as folder:
        started = time.time()
        command = [sys.executable, str(ROOT / f"{script}.py"), *flags.split(), "--runs-dir", folder, "--run-name", "run"]
        subprocess.run(command, check=True, capture_output=True)
        events = EventAccumulator(f"{folder}/run")
        events.Reload()
        return events.Scalars("capacity/actor")[0].wall_time - started - torch_seconds


def spread(values, form):
    return f"{form.format(statistics.median(values))} ({form.format(min(values))} to {form.format(max(values))})"


def main():
    args = tyro.cli(Args)
    print(
        f"{date.today()}, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads of torch at most,",
        end=" ",
    )
    print(f"torch {torch.__version__}, median (range) of {args.repeats} pairs\n")
    print("| | ours, steps/s | SB3, steps/s | ratio |\n|---|---|---|---|")
    rows = [
        (f"{env_id}, {epochs} epochs, {mode or 'eager'}", env_id, epochs, mode)
        for env_id, epochs, mode in (
            ("HalfCheetah-v4", 10, ""),
            ("Hopper-v4", 10, ""),
            ("HalfCheetah-v4", 10, "--compile"),
            ("Hopper-v4", 10, "--compile"),
            ("HalfCheetah-v4", 20, "--compile"),
        )
    ]
    for name, env_id, epochs, mode in rows:
        if args.only not in name:
            continue
        pairs = []
        for _ in range(args.repeats):
            flags = f"--env-id {env_id} --update-epochs {epochs} {mode}"
            # by default a log point falls on every 2.44th of 2,441 iterations
            ours_speed = ours("ppo_mujoco", flags, args.iterations, log_every=2.44)
            pairs.append((ours_speed, theirs(SB3_MUJOCO, env_id, epochs, max(3, args.iterations // 3))))
        ratios = [a / b for a, b in pairs]
        a, b = zip(*pairs)
        print(f"| {name} | {spread(a, '{:.0f}')} | {spread(b, '{:.0f}')} | {spread(ratios, '{:.2f}')} |", flush=True)
    if args.only in "Phoenix, 4 epochs, eager, 2 threads":
        pairs, iterations = [], max(4, args.iterations // 5)
        for _ in range(args.repeats):
            # by default a log point falls on every 33rd iteration: here on the last
            ours_speed = ours("ppo_atari", "--torch-threads 2 --env-threads 2", iterations, 1, 1024, warm_up=1)
            pairs.append((ours_speed, theirs(SB3_ATARI, iterations)))
        ratios = [a / b for a, b in pairs]
        a, b = zip(*pairs)
        print(f"| Phoenix, 4 epochs, 2 threads | {spread(a, '{:.0f}')} | {spread(b, '{:.0f}')} | {spread(ratios, '{:.2f}')} |")
    if args.only in "diagnostics":
        print("\n| share of a full-length Hopper-v4 run | diagnostics | capacity loss | logging | saving | together |")
        print("|---|---|---|---|---|---|")
        for mode in ("", "--compile"):
            # 30 iterations with a log point each, less 5 in which --compile compiles; one fit after the last
            flags = f"--log-interval 0.001 --capacity-interval 1 {mode}"
            long, short = profile("ppo_mujoco", flags, 35, 2048), profile("ppo_mujoco", flags, 5, 2048)
            part = {name: (long[name] - short[name]) / 30 for name in long}  # seconds an iteration
            full = {name: part[name] * 2441 for name in ("inference", "environment", "update")}
            full |= {name: part[name] * 1000 for name in ("diagnostics", "logging")}
            full |= {"capacity": long["capacity"] * 41, "checkpoint": long["checkpoint"] / 2 * (500 + 41)}
            total = sum(full.values())
            shares = [full[name] / total for name in ("diagnostics", "capacity", "logging", "checkpoint")]
            cells = [f"{share:.1%}" for share in (*shares, sum(shares))]
            print(f"| {mode or 'eager'}, {total / 60:.0f} minutes | {' | '.join(cells)} |", flush=True)
    if args.only in "start":
        print("\n| start to first iteration beyond importing torch | s |\n|---|---|")
        for script, flags in (("ppo_mujoco", "--total-timesteps 2048"), ("ppo_toy", "train --total-timesteps 1024")):
            values = [start_up(script, flags) for _ in range(args.repeats)]
            print(f"| {script}.py | {spread(values, '{:.1f}')} |", flush=True)


if __name__ == "__main__":
    main()

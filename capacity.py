"""The capacity loss of saved checkpoints (arXiv 2405.00662, section 2), measured after training.

    python capacity.py runs/NAME                          # the run's own curve, value for value
    python capacity.py runs/* --num-targets 5 --controls  # five random targets and two controls
    ls -d runs/* | xargs -n 1 -P 4 python capacity.py     # four runs side by side

Results go to runs/NAME/capacity-SETTINGS/: results.json, and an event file that TensorBoard shows
beside the run's own curve. Both are whole at any moment and written after every fit; what is done
is skipped, so an interrupted call can be repeated. Files that cannot be used are named at the end
with the reason, all the rest is done, and the exit code is 2.
"""

import contextlib
import importlib
import io
import json
import math
import os
import re
import sys
import time
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, get_type_hints

import filelock
import numpy as np
import torch
import tyro
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

# Types of flags with their least and greatest value
Coefficient = Annotated[float, (0, 1e6)]
Count = Annotated[int, (1, 1_000_000)]

SCRIPTS = ("ppo_mujoco", "ppo_atari", "ppo_toy")
THREADS = torch.get_num_threads()  # torch's choice, before a run's own number is set


@dataclass
class Args:
    """Capacity loss of the kept checkpoints of one or many runs. The defaults are the run's own."""

    runs: tyro.conf.Positional[tuple[Path, ...]]  # folders of runs
    num_targets: Count = 1  # random targets, the first is the run's own; several: mean and std
    epochs: Annotated[int, (0, 4096)] = 0  # epochs of a fit; 0: the run's --capacity-epochs
    learning_rate: Coefficient = 0.0  # Adam's; 0: the run's
    # Who collects the states: the target, the run's first agent or each checkpoint; run: as it did
    data: Literal["run", "target", "initial", "checkpoint"] = "run"
    # Adam's moments: none, or the checkpoint's (the paper calls both valid)
    optimizer: Literal["fresh", "loaded"] = "fresh"
    # Fit also a freshly initialised network (to the first checkpoint's data, where each has its
    # own), and the heads alone on the checkpoint's frozen features; both with a fresh Adam
    controls: bool = False
    cuda: bool = False  # use a CUDA device; the run's own values need the kind of device it had
    allow_module: str = ""  # module that may be imported for a task whose name is module:task

    def __post_init__(self):
        """Raises ValueError, which tyro shows, if a value makes no sense."""
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            bounds, value = getattr(hint, "__metadata__", [None])[0], getattr(self, name)
            if isinstance(bounds, tuple) and not bounds[0] <= value <= bounds[1]:
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} is {value}: it must be from {bounds[0]} to {bounds[1]}")
        if 0 < self.learning_rate < 1e-12:
            raise ValueError(f"--learning-rate is {self.learning_rate}: it must be 0, or 1e-12 up")
        if not self.runs:
            raise ValueError("name at least one folder of a run, runs/NAME")
        if self.cuda and not torch.cuda.is_available():
            raise ValueError("--cuda: there is no CUDA device")

    def settings(self):
        """What differs from the run's own fit; results of different settings lie side by side."""
        given = {
            f"targets{self.num_targets}": self.num_targets > 1,
            f"epochs{self.epochs}": self.epochs,
            f"lr{self.learning_rate}": self.learning_rate,
            self.data: self.data != "run",
            self.optimizer: self.optimizer == "loaded",
            "controls": self.controls,
            "cuda": self.cuda,
        }
        return "-".join(part for part in given if given[part]) or "default"


def say(message):
    """A line on stderr that leaves the progress bar whole."""
    tqdm.write(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)


def fail(message, code=2):
    """Say on one line of stderr what is wrong and exit with `code`."""
    say(f"error: {message}")
    raise SystemExit(code)


class Unusable(Exception):
    """A run or a file that cannot be measured; the message says why."""


def is_step(name):
    """Whether a file is named after a step: plain digits, which int and TensorBoard can hold."""
    return re.fullmatch(r"0|[1-9][0-9]{0,17}", name) is not None


def load_checkpoint(path, allow_module):
    """A checkpoint's state, its training script as a module, and its flags. Nothing in the file is
    executed: it holds tensors and plain values, and only the three training scripts are imported.
    Raises Unusable for what they did not write, and what Args raises for flags it does not take."""
    if not path.is_file():  # a folder, a broken link, or a fifo, which would never answer
        raise Unusable("it is not a file")
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch.load would not notice a flipped bit
                raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise almost anything
        raise Unusable(f"it is damaged or no checkpoint: {error!r}") from None
    parts = {"script", "args", "agent", "optimizer", "obs_stats", "global_step"}
    if not isinstance(state, dict) or parts - {*state} or state["script"] not in SCRIPTS:
        raise Unusable(f"it is no state of {', '.join(SCRIPTS)}")
    if state["global_step"] != int(path.stem):
        raise Unusable(f"it holds step {state['global_step']}, another than its name says")
    script = importlib.import_module(state["script"])
    run_args = script.Args(**state["args"])
    module = run_args.env_id.rpartition(":")[0]
    if module not in ("", allow_module):
        raise Unusable(f"its task would import {module}; if you trust it: --allow-module {module}")
    if run_args.capacity_steps < max(run_args.minibatch_size, run_args.capacity_envs):
        raise Unusable(f"--capacity-steps {run_args.capacity_steps} is less than a minibatch")
    return state, script, run_args


def new_agent(script, envs, run_args, device, seed):
    torch.manual_seed(seed)
    return script.Agent(envs, run_args).to(device)


def finite(losses):
    """Losses as JSON can hold them: None in place of what is not finite."""
    return {name: loss if math.isfinite(loss) else None for name, loss in losses.items()}


class Fits:
    """Fits of one run's checkpoints. The states that one is fitted to are kept for the next."""

    def __init__(self, args):
        self.args, self.data, self.data_of = args, None, None
        self.device = torch.device("cuda" if args.cuda else "cpu")

    def fit(self, path, i, known):
        """Add to the dict `known` of target `i` what it lacks of the checkpoint at `path`, and of
        the fresh network, {step or "fresh": {name: loss}}. Target 0 is the run's own."""
        state, script, run_args = load_checkpoint(path, self.args.allow_module)
        torch.set_num_threads(run_args.torch_threads or THREADS)
        envs = script.Envs(run_args, run_args.capacity_envs, 2 + 16 * i, state["obs_stats"])
        agent = new_agent(script, envs, run_args, self.device, 0)
        agent.load_state_dict(state["agent"])
        collector = run_args.capacity_data if self.args.data == "run" else self.args.data
        data_of = (i, run_args, path if collector == "checkpoint" else None)
        if self.data_of != data_of:
            self.data = self.data_of = None  # before there are others: Atari's take 250 MB
            self.data = self.collect(i, script, run_args, envs, agent, collector)
            self.data_of = data_of
        epochs = self.args.epochs or run_args.capacity_epochs
        learning_rate = self.args.learning_rate or run_args.learning_rate
        fit_args = replace(run_args, capacity_epochs=epochs, learning_rate=learning_rate)
        if path.stem not in known:
            adam_state = state["optimizer"]["state"] if self.args.optimizer == "loaded" else None
            losses = script.capacity_loss(agent, fit_args, *self.data, adam_state=adam_state)
            if self.args.controls:
                trunks = {*agent.actor_trunk.parameters(), *agent.critic_trunk.parameters()}
                agent.groups = [[p for p in group if p not in trunks] for group in agent.groups]
                heads = script.capacity_loss(agent, fit_args, *self.data)
                losses |= {f"heads_only_{name}": heads[name] for name in ("actor", "critic")}
            known[path.stem] = finite(losses)
        if self.args.controls and "fresh" not in known:
            seed = (2**31 + run_args.seed) % 2**32
            fresh = new_agent(script, envs, run_args, self.device, seed)
            known["fresh"] = finite(script.capacity_loss(fresh, fit_args, *self.data))

    def collect(self, i, script, run_args, envs, agent, collector):
        """States and what the i-th target says of them, as `capacity_loss` takes them."""
        own_seed = 2**32 - 1 - run_args.seed
        other_seed = int(np.random.SeedSequence([run_args.seed, i]).generate_state(1)[0])
        target = new_agent(script, envs, run_args, self.device, other_seed if i else own_seed)
        if collector == "target":
            agent = target
        elif collector == "initial":
            agent = new_agent(script, envs, run_args, self.device, run_args.seed)
        states = envs.collect(agent, run_args.capacity_steps, seed=run_args.seed + i)
        return script.capacity_target(target, *states)


def check_losses(losses, targets):
    """Raises an error of any kind if `losses` does not have the form that Results describes."""
    for target, fits in losses.items():
        for step, by_name in fits.items():
            names, numbers = by_name.keys(), {*by_name.values()} - {None}
            fine = target in targets and (is_step(step) or step == "fresh")
            fine &= names >= {"actor", "critic"} and all(map(str.isidentifier, names))
            fine &= all(isinstance(x, float) and math.isfinite(x) for x in numbers)
            if not fine:
                raise ValueError(f"target {target}, step {step}")


class Results:
    """What was measured of a run with some settings, in a folder of its own:
    {target: {step or "fresh": {name: loss, None where it was not finite}}}."""

    def __init__(self, folder, num_targets):
        self.folder, self.several = folder, num_targets > 1
        self.losses = {str(i): {} for i in range(num_targets)}
        path = folder / "results.json"
        if not os.path.lexists(path):
            return
        try:
            if not path.is_file():  # a fifo would never answer
                raise ValueError("it is not a file")
            losses = json.loads(path.read_bytes())
            check_losses(losses, self.losses.keys())
        except Exception as error:  # as with checkpoints
            raise Unusable(f"{path} cannot be used, move it away: {error!r}") from None
        self.losses |= losses

    def rows(self):
        """(step, {name: mean over targets, name_std: standard deviation}), "fresh" last."""
        steps = {step for fits in self.losses.values() for step in fits}
        for step in sorted(steps, key=lambda step: int(step) if is_step(step) else math.inf):
            fits = [fits[step] for fits in self.losses.values() if step in fits]
            values = {name: np.array([fit.get(name) for fit in fits], float) for name in fits[0]}
            scalars = {name: x.mean() for name, x in values.items()}
            if self.several:
                scalars |= {f"{name}_std": x.std(ddof=len(x) > 1) for name, x in values.items()}
            yield step, scalars

    def write(self):
        buffer, now = io.BytesIO(), time.time()
        writer = RecordWriter(buffer)
        writer.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
        for name, scalars in self.rows():
            prefix, step = ("capacity/", int(name)) if is_step(name) else ("capacity/fresh_", 0)
            values = [Summary.Value(tag=prefix + k, simple_value=x) for k, x in scalars.items()]
            event = Event(wall_time=now, step=step, summary=Summary(value=values))
            writer.write(event.SerializeToString())
        self.write_file("events.out.tfevents.capacity", buffer.getvalue())
        text = json.dumps(self.losses, indent=1, allow_nan=False) + "\n"
        self.write_file("results.json", text.encode())  # the last: what it holds is done

    def write_file(self, name, content):
        """At once or not at all, under a name that TensorBoard does not read until then."""
        unfinished = self.folder / "unfinished"
        unfinished.unlink(missing_ok=True)
        unfinished.write_bytes(content)
        os.replace(unfinished, self.folder / name)

    def table(self):
        rows, width = list(self.rows()), 24 if self.several else 18
        names = [name for name in rows[0][1] if not name.endswith("_std")]
        titles = (f"{name.replace('_last_minibatch', ' last'):>{width}}" for name in names)
        lines = [f"{self.folder}: capacity loss", f"{'step':>12}" + "".join(titles)]
        for step, row in rows:
            cells = {name: f"{row[name]:.5g}" for name in names if name in row}
            if self.several:
                cells = {name: f"{cells[name]} +- {row[name + '_std']:.2g}" for name in cells}
            lines.append(f"{step:>12}" + "".join(f"{cells.get(k, ''):>{width}}" for k in names))
        return "\n".join(lines)


def measure(run_dir, args, problems):
    """Fit what is missing of one run, write it after every fit, and print the run's table.
    What cannot be used is added to the dict `problems`, {path: reason}. Raises Unusable."""
    if not run_dir.is_dir():
        raise Unusable("it is not the folder of a run")
    paths = [path for path in run_dir.glob("checkpoints/*.pt") if path.stem != "diverged"]
    problems |= {path: "its name is not a step" for path in paths if not is_step(path.stem)}
    named = sorted({*paths} - {*problems}, key=lambda path: int(path.stem))
    if not named:
        raise Unusable("it has no checkpoints, checkpoints/STEP.pt")
    folder = run_dir / f"capacity-{args.settings()}"
    folder.mkdir(exist_ok=True)
    with filelock.FileLock(folder / ".lock", timeout=0, fallback_to_soft=False):
        results, fits = Results(folder, args.num_targets), Fits(args)
        pairs = [(*target, path) for target in enumerate(results.losses.values()) for path in named]
        for i, known, path in tqdm(pairs, run_dir.name, unit=" fits", leave=False):
            done = path.stem in known and ("fresh" in known or not args.controls)
            if done or path in problems:
                continue
            said = io.StringIO()  # what the training script says before it exits
            try:
                with contextlib.redirect_stderr(said):
                    fits.fit(path, i, known)
            except Unusable as problem:
                problems[path] = problem
            except SystemExit:
                problems[path] = said.getvalue().rpartition("error: ")[2] or "its task exits"
            except Exception as error:  # values of a foreign file can break anything
                problems[path] = f"{type(error).__name__}: {error}"
            else:
                results.write()
        if any(results.losses.values()):
            tqdm.write(results.table())


def main():
    args, problems = tyro.cli(Args), {}
    torch.backends.cudnn.deterministic = True  # as in training
    for run_dir in dict.fromkeys(args.runs):
        try:
            measure(run_dir, args, problems)
        except filelock.Timeout:
            problems[run_dir] = "another process is at work on it"
        except (Unusable, OSError) as problem:
            problems[run_dir] = problem
    for path, problem in problems.items():
        say(f"error: {path}: {str(problem)[:400]}")
    if problems:
        raise SystemExit(2)


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
    tqdm.get_lock()  # takes a moment, in which Ctrl-C would break tqdm
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; the same command goes on", code=130)

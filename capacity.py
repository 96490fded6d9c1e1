"""The capacity loss of saved checkpoints (arXiv 2405.00662, section 2), measured after training.

    python capacity.py runs/NAME                          # repeats the run's own curve exactly
    python capacity.py runs/* --num-targets 5 --controls  # five random targets and two controls
    ls -d runs/* | xargs -n 1 -P 4 python capacity.py     # four runs side by side

Results go to runs/NAME/capacity-SETTINGS/: results.json, and an event file that TensorBoard shows
beside the run's own curve. Both are complete at any time and updated after every fit. Finished fits
are skipped, so an interrupted command can be repeated. A file that cannot be used is named at the
end with the reason; everything else is done, and the exit code is 2.

A run that was made with a changed script is measured with that script. Every run keeps its own:

    python capacity.py runs/NAME --script runs/NAME/ppo_mujoco.py
"""

import contextlib
import functools
import importlib.util
import io
import json
import math
import os
import re
import sys
import time
import traceback
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

SCRIPTS = ("ppo_mujoco", "ppo_atari", "ppo_toy")
THREADS = torch.get_num_threads()  # torch's choice, before a run's own number is set


@dataclass
class Args:
    """Capacity loss of the kept checkpoints of runs. By default each fit is as in the run."""

    runs: tyro.conf.Positional[tuple[Path, ...]]  # folders of runs: runs/NAME
    # number of random targets; the first is the run's own; if several, the table has mean and std
    num_targets: Annotated[int, (1, 10**6)] = 1
    epochs: Annotated[int, (0, 10**6)] = 0  # epochs of a fit; 0: the run's --capacity-epochs
    learning_rate: Annotated[float, (0, 1e6)] = 0.0  # learning rate of Adam; 0: the run's
    # who collects the states: the target network, the run's initial agent, or each checkpoint;
    # `run`: whatever the run itself used
    data: Literal["run", "target", "initial", "checkpoint"] = "run"
    # Adam starts without moments or with the checkpoint's (the paper calls both valid)
    optimizer: Literal["fresh", "loaded"] = "fresh"
    # two more fits with a fresh Adam: one of a new network (with --data checkpoint, to the states
    # of the first checkpoint), and one of only the heads, on the checkpoint's frozen features
    controls: bool = False
    cuda: bool = False  # use a GPU; a run's own values are repeated on the device that it used
    script: Path | None = None  # script that made the runs; by default the one beside capacity.py
    allow_module: str = ""  # module that may be imported for a task whose name is module:task

    def settings(self):
        """The settings that differ from the run's own fit, as a name for the folder of results."""
        given = {
            f"targets{self.num_targets}": self.num_targets > 1,
            f"epochs{self.epochs}": self.epochs,
            f"lr{self.learning_rate}": self.learning_rate,
            self.data: self.data != "run",
            self.optimizer: self.optimizer == "loaded",
            "controls": self.controls,
            "cuda": self.cuda,
            "script": self.script,
        }
        return "-".join(part for part in given if given[part]) or "default"


def say(message):
    """Print one line on stderr without breaking the progress bar."""
    tqdm.write(f"{Path(sys.argv[0]).name}: {' '.join(str(message).split())}", file=sys.stderr)


def fail(message, code=2):
    """Print on one line of stderr what is wrong and exit with `code`."""
    say(f"error: {message}")
    raise SystemExit(code)


def check(args):
    """Exit with one line if a flag is out of its range or cannot be used."""
    for name, hint in get_type_hints(Args, include_extras=True).items():
        limits = getattr(hint, "__metadata__", [None])[0]
        value = getattr(args, name)
        if isinstance(limits, tuple) and not limits[0] <= value <= limits[1]:
            flag = name.replace("_", "-")
            fail(f"--{flag} is {value}: it must be from {limits[0]} to {limits[1]}")
    if not args.runs:
        fail("name at least one run: runs/NAME")
    if args.cuda and not torch.cuda.is_available():
        fail("--cuda: there is no CUDA device")
    if args.script:
        try:
            import_script(args.script)
        except (Exception, SystemExit) as error:  # the script can do anything
            fail(f"--script {args.script} cannot be imported: {error!r}")


class Unusable(Exception):
    """A run or a file that cannot be measured; the message says why."""


def is_step(name):
    """True if `name` is a step: at most 18 digits, without a leading 0."""
    return re.fullmatch(r"0|[1-9][0-9]{0,17}", name) is not None


@functools.cache
def import_script(path):
    """The script at `path` as a module, under a unique name."""
    spec = importlib.util.spec_from_file_location(f"--script {path}", path)
    if spec is None:
        raise ImportError("it is not a .py file")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    return script


def load_checkpoint(path, args):
    """A checkpoint's state, its training script as a module, and its flags. Nothing in the file is
    executed: it holds tensors and plain values, and only the three training scripts or --script
    are imported. Raises Unusable if none of them wrote the file. Exits if the script's `check`
    refuses the flags."""
    if not path.is_file():  # a folder, a broken link, or a fifo, which would never answer
        raise Unusable("it is not a file")
    scripts = [args.script.stem.partition("-from-")[0]] if args.script else SCRIPTS
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip():  # torch.load would not notice a flipped bit
                raise ValueError("a checksum is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["script"] not in scripts or state["global_step"] != int(path.stem):
            raise ValueError(f"step {state['global_step']} of {state['script']}.py")
    except Exception as error:  # a damaged file can raise almost anything
        reason = f"it is damaged or not a checkpoint of {', '.join(scripts)}: {error!r}"
        raise Unusable(reason) from None
    script = import_script(args.script) if args.script else importlib.import_module(state["script"])
    # A fit needs no compiler and no wandb; an interval above 0 makes `check` test the fit's flags
    here = {"compile": False, "track": False, "capacity_interval": 1.0}
    here = {name: value for name, value in here.items() if name in state["args"]}
    run_args = script.Args(**state["args"] | here)
    script.check(run_args)
    module = run_args.env_id.rpartition(":")[0]
    if module not in ("", args.allow_module):
        raise Unusable(f"its task would import {module}; if you trust it: --allow-module {module}")
    return state, script, run_args


def new_agent(script, envs, run_args, device, seed):
    torch.manual_seed(seed)
    return script.Agent(envs, run_args).to(device).eval()


def close_envs(script):
    """Close the environments that the script has opened: some have threads that only this ends."""
    while script.Envs.opened:
        with contextlib.suppress(Exception, SystemExit):
            script.Envs.opened.pop().close()


def finite(losses):
    """The losses for JSON: None for a loss that is not finite."""
    return {name: loss if math.isfinite(loss) else None for name, loss in losses.items()}


class Fits:
    """Fits of one run's checkpoints. The states of one fit are kept for the next."""

    def __init__(self, args):
        self.args = args
        self.data = self.data_of = None
        self.device = torch.device("cuda" if args.cuda else "cpu")

    def fit(self, path, i, known):
        """Fit the checkpoint at `path`, and with --controls a new network, to target `i`. Add the
        losses that are missing to `known`, {step or "fresh": {name: loss}}. Target 0 is the run's
        own."""
        state, script, run_args = load_checkpoint(path, self.args)
        try:
            self.fit_state(state, script, run_args, path, i, known)
        finally:
            close_envs(script)

    def fit_state(self, state, script, run_args, path, i, known):
        torch.set_num_threads(run_args.torch_threads or THREADS)
        envs = script.Envs(run_args, run_args.capacity_envs, 2 + 16 * i, state["obs_stats"])
        agent = new_agent(script, envs, run_args, self.device, 0)
        try:
            agent.load_state_dict(state["agent"])
        except RuntimeError:
            hint = f"--script {path.parents[1] / state['script']}.py"
            raise Unusable(f"its networks differ from those of the script: try {hint}") from None
        collector = run_args.capacity_data if self.args.data == "run" else self.args.data
        data_of = (i, run_args, path if collector == "checkpoint" else None)
        if self.data_of != data_of:
            self.data = self.data_of = None  # frees memory first: Atari's states take 250 MB
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
        """The states and the outputs of the i-th target, as `capacity_loss` takes them."""
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
            numbers = {*by_name.values()} - {None}
            fine = target in targets and (is_step(step) or step == "fresh")
            fine &= by_name.keys() >= {"actor", "critic"} and all(map(str.isidentifier, by_name))
            fine &= all(isinstance(x, float) and math.isfinite(x) for x in numbers)
            if not fine:
                raise ValueError(f"target {target}, step {step}")


class Results:
    """The losses of one run with one choice of settings, in a folder of its own:
    {target: {step or "fresh": {name: loss, or None if it was not finite}}}."""

    def __init__(self, folder, num_targets):
        self.folder = folder
        self.several = num_targets > 1
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
        now = time.time()
        buffer = io.BytesIO()
        writer = RecordWriter(buffer)
        writer.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
        for name, scalars in self.rows():
            prefix = "capacity/" if is_step(name) else "capacity/fresh_"
            step = int(name) if is_step(name) else 0
            values = [Summary.Value(tag=prefix + k, simple_value=x) for k, x in scalars.items()]
            event = Event(wall_time=now, step=step, summary=Summary(value=values))
            writer.write(event.SerializeToString())
        self.write_file("events.out.tfevents.capacity", buffer.getvalue())
        text = json.dumps(self.losses, indent=1, allow_nan=False) + "\n"
        self.write_file("results.json", text.encode())  # comes last: its fits are not repeated

    def write_file(self, name, content):
        """Write bytes atomically, first under a name that TensorBoard does not read."""
        unfinished = self.folder / "unfinished"
        unfinished.unlink(missing_ok=True)
        unfinished.write_bytes(content)
        os.replace(unfinished, self.folder / name)

    def table(self):
        rows = list(self.rows())
        width = 24 if self.several else 18
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
    """Make the missing fits of one run, save after every fit, and print the run's table. Files that
    cannot be used are added to the dict `problems`, {path: reason}. Raises Unusable."""
    if not (run_dir / "checkpoints").is_dir():
        raise Unusable("this is not a run's folder: name runs/NAME")
    paths = [path for path in run_dir.glob("checkpoints/*.pt") if path.stem != "diverged"]
    problems |= {path: "its name is not a step" for path in paths if not is_step(path.stem)}
    named = sorted({*paths} - {*problems}, key=lambda path: int(path.stem))
    if not named:
        raise Unusable("it has no checkpoints/STEP.pt")
    folder = run_dir / f"capacity-{args.settings()}"
    folder.mkdir(exist_ok=True)
    with filelock.FileLock(folder / ".lock", timeout=0, fallback_to_soft=False):
        results = Results(folder, args.num_targets)
        fits = Fits(args)
        pairs = [(*target, path) for target in enumerate(results.losses.values()) for path in named]
        for i, known, path in tqdm(pairs, run_dir.name, unit=" fits", leave=False):
            done = path.stem in known and ("fresh" in known or not args.controls)
            if done or path in problems:
                continue
            output = io.StringIO()  # what the training script prints before it exits
            try:
                with contextlib.redirect_stderr(output):
                    fits.fit(path, i, known)
            except Unusable as problem:
                problems[path] = problem
            except SystemExit as error:
                message = output.getvalue().rpartition("error: ")[2]
                problems[path] = message or f"its task exited the process: {error!r}"
            except Exception as error:  # the values of a foreign file can raise anything
                problems[path] = f"{type(error).__name__}: {error}"
            else:
                results.write()
        if any(results.losses.values()):
            tqdm.write(results.table())


def main():
    args = tyro.cli(Args)
    check(args)
    problems = {}
    torch.backends.cudnn.deterministic = True  # as in training
    for run_dir in dict.fromkeys(args.runs):
        try:
            measure(run_dir, args, problems)
        except filelock.Timeout:
            problems[run_dir] = "another process measures it"
        except (Unusable, OSError) as problem:
            problems[run_dir] = problem
    for path, problem in problems.items():
        say(f"error: {path}: {str(problem)[:400]}")
    if problems:
        raise SystemExit(2)


if __name__ == "__main__":
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None if the stream is closed
    sys.stderr = sys.stderr or open(os.devnull, "w")
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; the same command continues", code=130)
    except Exception as error:
        traceback.print_exc()
        fail(f"{error!r}; the same command continues")

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "ale-py==0.12.1",
#     "filelock==4.3.1",
#     "gymnasium==1.4.0",
#     "imageio==2.38.1",
#     "mujoco==3.14.0",
#     "numpy==2.4.6",
#     "opencv-python-headless==5.0.0.93",
#     "tensorboard==2.21.0",
#     "torch==2.13.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///

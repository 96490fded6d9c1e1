"""The capacity loss of saved checkpoints (section 2 of arXiv 2405.00662, "Capacity loss"), measured after training.

    python capacity.py runs/NAME                                    # the curve that the run logged itself, value for value
    python capacity.py runs/* --num-targets 5 --controls --jobs 2   # five random targets, and what the numbers are worth

Each run's results go to runs/NAME/capacity-SETTINGS/: results.json, and an event file that TensorBoard shows beside the
run's own curve. What is done already is skipped, so an interrupted call can simply be repeated.
"""

import concurrent.futures
import contextlib
import fcntl
import functools
import importlib
import io
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
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
    """Capacity loss of the kept checkpoints of one or many runs. The defaults are those of the run."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs"""
    num_targets: int = 1
    """random targets; the first is the run's own, with several the mean and the standard deviation are given"""
    epochs: int = 0
    """epochs of a fit; 0: the run's --capacity-epochs"""
    learning_rate: float = 0.0
    """Adam's learning rate; 0: the run's"""
    data: Literal["run", "target", "initial", "checkpoint"] = "run"
    """who collects the states: the target, the run's first checkpoint or each checkpoint; run: what the run used"""
    optimizer: Literal["fresh", "loaded"] = "fresh"
    """Adam's moments: none, or the checkpoint's (the paper calls both valid)"""
    controls: bool = False
    """fit also a freshly initialised network (on the first checkpoint's data, where each has its own), and the heads alone
    on the checkpoint's frozen features; both with a fresh Adam"""
    jobs: int = 1
    """runs side by side"""
    cuda: bool = False
    """use a CUDA device; the run's own values come back exactly on the kind of device that it used"""
    allow_module: str = ""
    """Python module that may be imported for a task whose name is module:task"""

    def check(self):
        """Exit with one line if a value makes no sense."""
        if not self.runs:
            fail("name at least one folder of a run, runs/NAME")
        for name, least in (("num_targets", 1), ("epochs", 0), ("jobs", 1)):
            if getattr(self, name) < least:
                fail(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be {least} or greater")
        if not 0 <= self.learning_rate < math.inf:
            fail(f"--learning-rate is {self.learning_rate}: it must be a finite number, 0 or greater")
        if self.cuda and not torch.cuda.is_available():
            fail("--cuda: there is no CUDA device")

    def settings(self):
        """The name of what differs from the run's own fit: results with different names lie side by side."""
        parts = (
            f"targets{self.num_targets}" if self.num_targets > 1 else "",
            f"epochs{self.epochs}" if self.epochs else "",
            f"lr{self.learning_rate:g}" if self.learning_rate else "",
            self.data if self.data != "run" else "",
            "loaded" if self.optimizer == "loaded" else "",
            "controls" if self.controls else "",
            "cuda" if self.cuda else "",
        )
        return "-".join(part for part in parts if part) or "default"


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


class Unusable(Exception):
    """A run or a checkpoint that cannot be measured; the message says why."""


def load_checkpoint(path, allow_module):
    """The checkpoint at `path`, its training script's module and its arguments. Raises Unusable.

    Nothing in the file is executed: it holds tensors and plain values, and only the three training scripts are imported.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise almost anything
        raise Unusable(f"{path} cannot be read as a checkpoint ({type(error).__name__})") from None
    if not isinstance(state, dict) or state.get("script") not in ("ppo_mujoco", "ppo_atari", "ppo_toy"):
        raise Unusable(f"{path} was not written by ppo_mujoco.py, ppo_atari.py or ppo_toy.py")
    script = importlib.import_module(state["script"])
    try:
        args = script.Args(**state["args"])
        module = args.env_id.rpartition(":")[0]
    except (TypeError, KeyError, AttributeError):
        raise Unusable(f"{path} holds other arguments than this {state['script']}.py has") from None
    if module and module != allow_module:
        raise Unusable(f"{path}: its task would import the module {module}; if you trust it, say --allow-module {module}")
    return state, script, args


@functools.cache
def default_threads():
    """Torch's own number of threads, as it was when this was first called."""
    return torch.get_num_threads()


class Run:
    """A run's folder, its checkpoints and what was measured of them before. Raises Unusable."""

    def __init__(self, path, args):
        self.path, self.args, self.problems = path, args, []
        self.threads = max(1, default_threads() // args.jobs)
        if not path.is_dir():
            raise Unusable(f"{path} is not the folder of a run")
        names = [name for name in path.glob("checkpoints/*.pt") if name.stem.isdigit()]
        self.checkpoints = sorted(names, key=lambda name: int(name.stem))
        if not self.checkpoints:
            raise Unusable(f"{path} has no checkpoints (checkpoints/STEP.pt)")
        self.folder = path / f"capacity-{args.settings()}"
        self.results = self.read()

    def read(self):
        """What was measured before: {target: {step or "fresh": {name: loss}}}."""
        try:
            results = json.loads((self.folder / "results.json").read_text())
            assert all(isinstance(by_step, dict) for by_step in results.values())
        except (OSError, ValueError, AssertionError, AttributeError):
            return {}
        return results

    def missing(self):
        """How many fits are to be done."""
        steps, results = [path.stem for path in self.checkpoints] + ["fresh"] * self.args.controls, self.read()
        return sum(step not in results.get(str(i), {}) for i in range(self.args.num_targets) for step in steps)

    @contextlib.contextmanager
    def alone(self):
        """Keeps other processes out of the results' folder, which is gone again if nothing was written. Raises Unusable."""
        self.folder.mkdir(exist_ok=True)
        lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.results = self.read()
            yield
        except BlockingIOError:
            raise Unusable(f"another process is at work on {self.folder}") from None
        finally:
            os.close(lock)
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def load(self, path):
        """A checkpoint with its agent. Raises Unusable."""
        state, script, run_args = load_checkpoint(path, self.args.allow_module)
        if run_args.capacity_steps < max(run_args.minibatch_size, run_args.capacity_envs):
            raise Unusable(f"{path}: --capacity-steps {run_args.capacity_steps} is less than one minibatch")
        torch.set_num_threads(run_args.torch_threads or self.threads)
        try:
            envs = script.Envs(run_args, run_args.capacity_envs, stream=2, obs_stats=state.get("obs_stats"))
        except SystemExit:  # it has said why
            raise Unusable(f"{path}: its task cannot be made") from None
        agent = script.Agent(envs, run_args).to("cuda" if self.args.cuda else "cpu")
        try:
            agent.load_state_dict(state["agent"])
        except (KeyError, RuntimeError) as error:
            raise Unusable(f"{path}: its weights do not fit its arguments ({type(error).__name__})") from None
        return state, script, run_args, agent

    def measure(self, advance):
        """Fit whatever is missing, and call `advance()` after every fit. What went wrong is in `problems`."""
        for i in range(self.args.num_targets):
            known, data, data_of = self.results.setdefault(str(i), {}), None, None
            for path in self.checkpoints:
                if path.stem in known and not (self.args.controls and "fresh" not in known):
                    continue
                try:
                    state, script, run_args, agent = self.load(path)
                    kind = run_args.capacity_data if self.args.data == "run" else self.args.data
                    collector_path = {"target": None, "initial": self.checkpoints[0], "checkpoint": path}[kind]
                    if data is None or data_of != collector_path:
                        data, data_of = self.target_data(i, script, run_args, state, agent, collector_path), collector_path
                    fit_args = replace(
                        run_args,
                        capacity_epochs=self.args.epochs or run_args.capacity_epochs,
                        learning_rate=self.args.learning_rate or run_args.learning_rate,
                    )
                    if path.stem not in known:
                        adam_state = state["optimizer"]["state"] if self.args.optimizer == "loaded" else None
                        losses = script.capacity_loss(agent, fit_args, *data, adam_state=adam_state)
                        if self.args.controls:
                            heads = [(name, p) for name, p in agent.named_parameters() if "trunk" not in name]
                            agent.groups = [[p for name, p in heads if name.startswith(x)] for x in ("actor", "critic")]
                            on_frozen = script.capacity_loss(agent, fit_args, *data)
                            losses |= {f"heads_only_{name}": on_frozen[name] for name in ("actor", "critic")}
                        known[path.stem] = losses
                        advance()
                    if self.args.controls and "fresh" not in known:
                        torch.manual_seed((2**31 + run_args.seed) % 2**32)
                        envs = script.Envs(run_args, 1, stream=2, obs_stats=state.get("obs_stats"))
                        fresh = script.Agent(envs, run_args).to(next(agent.parameters()).device)
                        known["fresh"] = script.capacity_loss(fresh, fit_args, *data)
                        advance()
                except Unusable as problem:
                    self.problems.append(str(problem))
                except (Exception, SystemExit) as error:  # values of a foreign file can break anything
                    self.problems.append(f"{path} cannot be measured ({type(error).__name__}: {error})")
                else:
                    self.write()
        self.problems = list(dict.fromkeys(self.problems))  # one line each, not one per target
        return self

    def target_data(self, i, script, run_args, state, agent, collector_path):
        """The i-th random target's outputs on the states to fit; target 0 and its states are those of the run itself."""
        envs = script.Envs(run_args, run_args.capacity_envs, stream=2 + 16 * i, obs_stats=state.get("obs_stats"))
        other_seed = int(np.random.SeedSequence([run_args.seed, i]).generate_state(1)[0])
        torch.manual_seed(other_seed if i else 2**32 - 1 - run_args.seed)
        target = script.Agent(envs, run_args).to(next(agent.parameters()).device)
        collector = self.load(collector_path)[3] if collector_path else target
        return script.capacity_target(target, *envs.collect(collector, run_args.capacity_steps, seed=run_args.seed + i))

    def table(self):
        """Rows (step, {name: mean over targets}, {name: standard deviation}), the fresh network last."""
        steps = sorted(
            {step for known in self.results.values() for step in known}, key=lambda s: (not s.isdigit(), s.zfill(20))
        )
        for step in steps:
            fits = [known[step] for known in self.results.values() if step in known]
            values = {name: np.array([fit[name] for fit in fits], float) for name in fits[0]}
            yield step, {k: v.mean() for k, v in values.items()}, {k: v.std(ddof=len(v) > 1) for k, v in values.items()}

    def write(self):
        """results.json and the event file, each at once or not at all."""
        self.folder.mkdir(exist_ok=True)
        for name in ("results.json", "events.out.tfevents.capacity"):
            temporary = self.folder / (name + ".tmp")
            if name == "results.json":
                temporary.write_text(json.dumps(self.results, indent=1) + "\n")
            else:
                log = EventLog(temporary)
                for step, means, spreads in self.table():
                    prefix = "capacity/" if step.isdigit() else "capacity/fresh_"
                    scalars = {prefix + key: value for key, value in means.items()}
                    if self.args.num_targets > 1:
                        scalars |= {f"{prefix}{key}_std": value for key, value in spreads.items()}
                    log.add(scalars, int(step) if step.isdigit() else 0)
                log.flush()
            os.replace(temporary, self.folder / name)

    def print(self):
        rows = list(self.table())
        names = list(rows[0][1]) if rows else []
        width = 24 if self.args.num_targets > 1 else 12
        print(f"{self.path}: capacity loss, {self.args.settings()}")
        print(f"{'step':>12}" + "".join(f"{name.replace('_last_minibatch', ' last'):>{width + 6}}" for name in names))
        for step, means, spreads in rows:
            cells = (
                f"{means[name]:.5g}" + (f" +- {spreads[name]:.2g}" if width > 12 else "") for name in names if name in means
            )
            print(f"{step:>12}" + "".join(f"{cell:>{width + 6}}" for cell in cells))


def measure_run(path, args, advance=lambda: None):
    """Measure one run: the Run, or the Unusable that says why not."""
    try:
        run = Run(path, args)
        with run.alone():
            return run.measure(advance)
    except Unusable as problem:
        return problem
    except OSError as error:
        return Unusable(f"{path} cannot be written ({error.strerror})")


def start_worker(parent):
    """A worker ends at Ctrl-C without a word, and with the process `parent` that started it."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=watch, daemon=True).start()


def missing_fits(args):
    """How many fits are to be done in all runs."""
    total = 0
    for path in args.runs:
        with contextlib.suppress(Unusable):
            total += Run(path, args).missing()
    return total


def measure_side_by_side(args, bar):
    """What `measure_run` returns for every run, in the order in which they are done."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(args.jobs, context, start_worker, (os.getpid(),)) as pool:
        waiting = {pool.submit(measure_run, path, args) for path in args.runs}
        try:
            while waiting:
                done, waiting = concurrent.futures.wait(waiting, 1, concurrent.futures.FIRST_COMPLETED)
                bar.update(bar.total - missing_fits(args) - bar.n)
                yield from (future.result() for future in done)
        except concurrent.futures.process.BrokenProcessPool:
            fail("a process ended before it was done (out of memory?): the same call with fewer --jobs goes on", code=1)
        except KeyboardInterrupt:
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def main():
    args = parse_args(Args)
    args.check()
    args.runs = tuple(dict.fromkeys(args.runs))
    bar = tqdm(total=missing_fits(args), unit=" fits", dynamic_ncols=True)
    if args.jobs == 1:
        outcomes = (measure_run(path, args, bar.update) for path in args.runs)
    else:
        outcomes = measure_side_by_side(args, bar)
    problems = []
    try:
        for outcome in outcomes:
            if isinstance(outcome, Run):
                bar.clear()
                if any(outcome.results.values()):
                    outcome.print()
                problems += outcome.problems
            else:
                problems.append(str(outcome))
    except KeyboardInterrupt:
        bar.close()
        fail("interrupted: the same call goes on", code=130)
    bar.close()
    for problem in problems[:-1]:
        say(f"error: {problem}")
    if problems:
        fail(problems[-1])


if __name__ == "__main__":
    main()

import contextlib
import errno
import functools
import importlib
import itertools
import multiprocessing
import os
import pkgutil
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# The smallest run that still has several iterations, log points, capacity fits and checkpoints
SMALL = {
    script: flags
    + " --minibatch-size 16 --update-epochs 2 --capacity-epochs 1 --capacity-interval 0.25"
    + " --snapshot-interval 0.25 --log-interval 0.1"
    for script, flags in {
        "ppo_mujoco": "--total-timesteps 512 --num-steps 32 --obs-norm-steps 50 --capacity-steps 64"
        " --checkpoint-interval 0.25",
        "ppo_atari": "--total-timesteps 768 --num-envs 2 --num-steps 16 --frameskip 3"
        " --capacity-steps 32 --env-threads 1 --torch-threads 1 --checkpoint-interval 0.25",
        "ppo_toy": "train --total-timesteps 512 --num-envs 4 --num-steps 16 --capacity-steps 64",
    }.items()
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run("ppo_mujoco", "--seed 3", name="a"): a small run in this process and its folder."""
    threads = torch.get_num_threads()

    def run(script, flags="", name="run"):
        command = f"{script}.py {SMALL[script]} --runs-dir {tmp_path} --run-name {name} {flags}"
        monkeypatch.setattr(sys, "argv", command.split())
        importlib.import_module(script).main()
        return tmp_path / name

    yield run
    torch.set_num_threads(threads)


FORKS = multiprocessing.get_context("forkserver")
SLOW_IMPORTS = ["torch._dynamo", "tyro._backends", "gymnasium.envs.mujoco"]
FORKS.set_forkserver_preload(["ppo_mujoco", "ppo_atari", "ppo_toy", *SLOW_IMPORTS])


class Process:
    """`python SCRIPT.py FLAGS` as a process of its own, and what it says. It is forked from one
    that has imported torch already, which saves three seconds. `prepare` is called in it first."""

    def __init__(self, script, flags="", cwd=None, prepare=None):
        self.folder = tempfile.TemporaryDirectory()
        words = flags.split() if isinstance(flags, str) else list(map(str, flags))
        arguments = self.folder.name, ROOT / f"{script}.py", words, cwd, prepare
        self.process = FORKS.Process(target=run_script, args=arguments)
        self.process.start()
        self.running = self.process.is_alive

    def send(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def kill(self):
        self.send(signal.SIGKILL)
        return self.wait()

    def wait(self, timeout=120):
        """Wait for its end; sets returncode (-n: ended by signal n), stdout and stderr."""
        self.process.join(timeout)
        if self.running():
            self.process.kill()
            raise TimeoutError(f"still running after {timeout} s: {self.read('stderr')}")
        self.returncode = self.process.exitcode
        self.stdout, self.stderr = self.read("stdout"), self.read("stderr")
        return self

    def wait_until(self, condition, timeout=60):
        """Wait until `condition()` holds while it is running."""
        end = time.monotonic() + timeout
        while self.running() and not condition():
            assert time.monotonic() < end, self.read("stderr")
            time.sleep(0.002)
        return self

    def read(self, name):
        return Path(self.folder.name, name).read_text()


def run_script(folder, path, flags, cwd, prepare):
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test in the background ignores it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.chdir(cwd or folder)
    sys.argv = [str(path), *flags]
    if prepare:
        prepare()
    runpy.run_path(str(path), run_name="__main__")


FAULTS = {
    "disk full": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "input/output": OSError(errno.EIO, os.strerror(errno.EIO)),
    "out of memory": torch.OutOfMemoryError("CUDA out of memory"),
}


def fault_at(name, call, fault="SIGKILL"):
    """A `prepare`: from the given call of a function (as "module:name") on it raises, or its
    process gets a signal at that call."""
    return functools.partial(replace_function, name, call, fault)


def replace_function(name, call, fault):
    owner, _, attribute = name.replace(":", ".").rpartition(".")
    owner = pkgutil.resolve_name(owner)
    function, calls = getattr(owner, attribute), itertools.count(1)

    @functools.wraps(function)
    def replaced(*args, **kwargs):
        number = next(calls)
        if fault in FAULTS and number >= call:
            raise FAULTS[fault]
        if number == call:
            os.kill(os.getpid(), getattr(signal, fault))
        return function(*args, **kwargs)

    setattr(owner, attribute, replaced)


def call(script, flags="", **kwargs):
    """Run a script to its end: an object with returncode, stdout and stderr."""
    return Process(script, flags, **kwargs).wait()


def read_scalars(run_dir):
    """{tag: [(step, value), ...]} of a run's event files."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def same_scalars(a, b, *but):
    """Whether two runs logged the same, the speed and the tags that start with `but` aside."""
    a, b = (
        sorted(
            x for x in read_scalars(run_dir).items() if not x[0].startswith(("charts/SPS", *but))
        )
        for run_dir in (a, b)
    )
    return repr(a) == repr(b)  # repr, since NaN is not equal to itself


def checkpoints(run_dir):
    """{step: path} of the kept checkpoints, first to last."""
    paths = (run_dir / "checkpoints").glob("[0-9]*.pt")
    return dict(sorted((int(path.stem), path) for path in paths))


def final_weights(run_dir):
    """The state dict in the last kept checkpoint."""
    *_, last = checkpoints(run_dir).values()
    return torch.load(last, weights_only=True)["agent"]


def same_weights(a, b):
    a, b = final_weights(a), final_weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

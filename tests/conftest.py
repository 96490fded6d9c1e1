import contextlib
import errno
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import pkgutil
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import ppo_mujoco  # noqa: E402

# The smallest run that still has several iterations, log points, capacity fits and checkpoints
SMALL = {
    script: flags
    + " --minibatch-size 16 --update-epochs 2 --capacity-epochs 1 --capacity-interval 0.25"
    + " --snapshot-interval 0.25 --log-interval 0.1"
    for script, flags in {
        "ppo_mujoco": "--total-timesteps 512 --num-steps 32 --obs-norm-steps 50 --capacity-steps 64"
        " --checkpoint-interval 0.125",
        "ppo_atari": "--total-timesteps 768 --num-envs 2 --num-steps 16 --frameskip 3"
        " --capacity-steps 32 --env-threads 1 --torch-threads 1 --checkpoint-interval 0.125",
        "ppo_toy": "train --total-timesteps 512 --num-envs 4 --num-steps 16 --capacity-steps 64",
    }.items()
}


def run_here(script, flags, folder, name):
    """A small run in this process; returns its folder."""
    command = f"{script}.py {SMALL[script]} --runs-dir {folder} --run-name {name} {flags}"
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", command.split())
        importlib.import_module(script).main()
    torch.set_num_threads(threads)
    return folder / name


@pytest.fixture
def run(tmp_path):
    """run("ppo_mujoco", "--seed 3", name="a"): a small run in this process and its folder."""
    return lambda script, flags="", name="run": run_here(script, flags, tmp_path, name)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """finished("ppo_mujoco", flags): a small run that is made once. No test may change it."""

    @functools.cache
    def finished(script="ppo_mujoco", flags=""):
        return run_here(script, flags, tmp_path_factory.mktemp("finished"), "run")

    return finished


def make_agent(obs_dim=2, action_dim=1, **flags):
    """An agent of ppo_mujoco.py for a task with these dimensions and actions from -1 to 1."""
    bounds = np.ones(action_dim, np.float32)
    envs = SimpleNamespace(obs_dim=obs_dim, action_dim=action_dim, low=-bounds, high=bounds)
    torch.manual_seed(0)
    return ppo_mujoco.Agent(envs, ppo_mujoco.Args(**flags))


def make_envs(env_id, num_envs=2, stream=0, obs_stats=None, **flags):
    """Environments of ppo_mujoco.py."""
    args = ppo_mujoco.Args(env_id=env_id, **{"obs_norm_steps": 100, **flags})
    return ppo_mujoco.Envs(args, num_envs, stream, obs_stats)


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
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w", errors="backslashreplace")
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
    "out of CPU memory": RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    "no locks": OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)),
    "no function": OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)),
}


def fault_at(name, call, fault="SIGKILL"):
    """A `prepare`: from the given call of a function (as "module:name") on it raises, or at that
    call its process gets a signal, or another function gets the call's arguments first."""
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
        if number == call and callable(fault):
            fault(*args)
        elif number == call:
            os.kill(os.getpid(), getattr(signal, fault))
        return function(*args, **kwargs)

    setattr(owner, attribute, replaced)


def call(script, flags="", **kwargs):
    """Run a script to its end: an object with returncode, stdout and stderr."""
    return Process(script, flags, **kwargs).wait()


def fine(process):
    """The process, which ended without an error."""
    assert process.returncode == 0, process.stderr
    return process


def contents(folder):
    """{path: bytes} of all that is in a folder, except its lock, and args.json, which tells a
    renamed run its name."""
    paths = (path for path in folder.rglob("*") if path.name not in (".lock", "args.json"))
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def message(process, code):
    """The line in which a process said why it ended with `code`; a traceback may stand before."""
    assert process.returncode == code, (process.returncode, process.stderr)
    lines = process.stderr.replace("\r", "\n").splitlines()
    (line,) = (line for line in lines if ".py: error: " in line)
    return line


def one_line(process, code):
    """The same, and no traceback."""
    assert "Traceback" not in process.stderr, process.stderr
    return message(process, code)


class Malicious:
    """Whoever loads it exits."""

    def __reduce__(self):
        return os._exit, (0,)


def read_args(run_dir):
    return json.loads((run_dir / "args.json").read_text())


def read_scalars(run_dir):
    """{tag: [(step, value), ...]} of a run's event files."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def same_scalars(a, b, *but):
    """Whether two runs logged the same, except the speed and the tags that start with `but`."""
    a, b = read_scalars(a), read_scalars(b)
    tags = [tag for tag in {*a, *b} if not tag.startswith(("charts/SPS", *but))]
    # repr, since NaN is not equal to itself
    different = {x: (a.get(x), b.get(x)) for x in tags if repr(a.get(x)) != repr(b.get(x))}
    print("different:", different)
    return not different


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

import importlib
import signal
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# The smallest run that still has several iterations, log points, capacity fits and checkpoints
SMALL = {
    script: flags + " --minibatch-size 16 --update-epochs 2 --capacity-epochs 1 --capacity-interval 0.25 "
    "--snapshot-interval 0.25 --checkpoint-interval 0.25 --log-interval 0.1 --torch-threads 1"
    for script, flags in {
        "ppo_mujoco": "--total-timesteps 512 --num-steps 32 --obs-norm-steps 50 --capacity-steps 64",
        "ppo_atari": "--total-timesteps 768 --num-envs 2 --num-steps 16 --frameskip 3 --capacity-steps 32 --env-threads 1",
        "ppo_toy": "train --total-timesteps 512 --num-envs 4 --num-steps 16 --capacity-steps 64",
    }.items()
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run("ppo_mujoco", "--seed 3", name="a"): a small run in this process and its folder."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = torch.get_num_threads()

    def run(script, flags="", name="run"):
        command = f"{script}.py {SMALL[script]} --runs-dir {tmp_path} --run-name {name} {flags}"
        monkeypatch.setattr(sys, "argv", command.split())
        importlib.import_module(script).main()
        return tmp_path / name

    yield run
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def read_scalars(run_dir):
    """{tag: [(step, value), ...]} of a run's event files."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def same_scalars(a, b, *but):
    """Whether two runs logged the same, the speed and the tags that start with `but` aside."""
    a, b = (
        sorted((tag, points) for tag, points in read_scalars(run_dir).items() if not tag.startswith(("charts/SPS", *but)))
        for run_dir in (a, b)
    )
    return repr(a) == repr(b)  # repr, since NaN is not equal to itself


def final_weights(run_dir):
    """The state dict in the last kept checkpoint."""
    last = max((run_dir / "checkpoints").glob("*.pt"), key=lambda path: int(path.stem))
    return torch.load(last, weights_only=True)["agent"]


def same_weights(a, b):
    a, b = final_weights(a), final_weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)

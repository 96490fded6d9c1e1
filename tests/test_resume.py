"""A run that is killed and resumed is, bit for bit, the run that was never killed; forks; and
damaged files."""

import collections
import functools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import struct
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    SMALL,
    Process,
    call,
    checkpoints,
    contents,
    fault_at,
    message,
    one_line,
    read_scalars,
    same_scalars,
    same_weights,
)
from tensorboard.compat.proto.event_pb2 import Event

import ppo_mujoco

SCRIPTS = ("ppo_mujoco", "ppo_atari")


def flags(folder, name, more=""):
    return f"--runs-dir {folder} --run-name {name} {more}"


def start(script, folder, name, more="", **kwargs):
    """A small run from its beginning to its end."""
    return call(script, f"{SMALL[script]} {flags(folder, name, more)}", **kwargs)


def resume(script, folder, name, more="", **kwargs):
    """The same run continues: its name is enough."""
    return call(script, flags(folder, name, f"--resume {more}"), **kwargs)


def cut_back(run_dir, step):
    """Leave a run as if it had been killed just after it saved at `step`."""
    for kept, path in checkpoints(run_dir).items():
        if kept > step:
            path.unlink()
    shutil.copy(run_dir / "checkpoints" / f"{step}.pt", run_dir / "latest.pt")


def edit(path, change):
    """Write a state again, changed by `change(state)`."""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def raw_events(run_dir):
    """Every record of a run's event files, read without TensorBoard's help: length, its checksum,
    data, their checksum."""
    for path in sorted(run_dir.glob("events*")):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            record = content[place + 12 : place + 12 + length]
            assert len(record) == length, f"{path} ends within a record"
            yield Event.FromString(record)
            place += length + 16


def assert_every_point_is_there_once(run_dir, whole):
    counts = [
        collections.Counter(
            (value.tag, event.step) for event in raw_events(x) for value in event.summary.value
        )
        for x in (run_dir, whole)
    ]
    assert set(counts[0].values()) == {1} and counts[0] == counts[1]
    assert same_scalars(run_dir, whole)  # TensorBoard's reader


def assert_same(run_dir, whole):
    """Two runs are the same bit for bit: checkpoints, generators, moments, curves."""
    assert checkpoints(run_dir).keys() == checkpoints(whole).keys()
    for ours, theirs in zip(checkpoints(run_dir).values(), checkpoints(whole).values()):
        a, b = (torch.load(path, weights_only=True) for path in (ours, theirs))
        assert all(torch.equal(a["agent"][name], b["agent"][name]) for name in b["agent"])
        assert torch.equal(a["rng"], b["rng"]) and str(a["optimizer"]) == str(b["optimizer"])
        assert str(a["envs"]) == str(b["envs"])
    assert_every_point_is_there_once(run_dir, whole)
    assert not list(run_dir.rglob("*.tmp"))


@pytest.fixture
def half(finished, tmp_path):
    """half(): a copy of a finished run as it was in the middle."""

    def half(script="ppo_mujoco", name="run"):
        run_dir = tmp_path / name
        shutil.copytree(finished(script), run_dir)
        cut_back(run_dir, sorted(checkpoints(run_dir))[2])
        return run_dir

    return half


# Where to kill: the n-th call of a function, n up to what two iterations and the start take
PLACES = {
    "in the rollout": ("ppo_mujoco", "gymnasium.wrappers:TimeLimit.step", 200),
    "on Atari in the rollout": ("ppo_atari", "ale_py.vector_env:AtariVectorEnv.step", 40),
    "in the replay of its episodes": ("ppo_mujoco", "gymnasium.wrappers:TimeLimit.step", 20),
    "in the update or a capacity fit": ("", "torch.optim:Adam.step", 16),
    "in saving, before the disk has it": ("", "os:fsync", 9),
    "in saving, before the new name": ("", "os:replace", 6),
    "in logging": ("", "torch.utils.tensorboard:SummaryWriter.add_scalar", 60),
    "after the replay": ("", "torch:set_rng_state", 1),
}
KILLS = int(os.environ.get("KILLS", 9))


@pytest.mark.parametrize(
    "script, more",
    [
        ("ppo_mujoco", ""),
        ("ppo_mujoco", "--share-trunk --pfo-coef 1 --pfo-layers all --reset-adam --anneal-lr"),
        ("ppo_mujoco", "--reward-keep-prob 0.5 --policy gaussian --ent-coef 0.01"),
        ("ppo_atari", "--pfo-coef 1 --pfo-layers all --reward-keep-prob 0.5"),
    ],
)
def test_killed_and_resumed_is_never_killed(finished, tmp_path, script, more):
    """kill -9 in every part of a run, and in its first save."""
    rng, killed = random.Random(more), 0
    places = [place[1:] for place in PLACES.values() if place[0] in ("", script)]
    first = start(script, tmp_path, "run", more, prepare=fault_at("os:replace", 1))
    assert first.returncode == -signal.SIGKILL
    for kill in range(KILLS if not more else KILLS // 2):
        name, most = places[kill % len(places)] if kill < len(places) else rng.choice(places)
        # killed before it kept its flags: they are given again
        words = "" if (tmp_path / "run/args.json").exists() else f"{SMALL[script]} {more}"
        prepare = fault_at(name, rng.randint(1, most))
        process = resume(script, tmp_path, "run", words, prepare=prepare)
        assert process.returncode in (0, -signal.SIGKILL), process.stderr
        killed += process.returncode != 0
    assert killed >= 3
    last = resume(script, tmp_path, "run")
    assert last.returncode == 0, last.stderr
    assert_same(tmp_path / "run", finished(script, more))
    again = resume(script, tmp_path, "run")  # it stays as it is
    assert again.returncode == 0, again.stderr
    assert_same(tmp_path / "run", finished(script, more))


@pytest.mark.parametrize("call", [2, 3, 4])
def test_a_start_that_was_killed_before_its_first_state_is_resumed(finished, tmp_path, call):
    """By its name alone, whether it is a new run or a fork; its flags are in args.json."""
    parent = checkpoints(finished())[256]
    kill = fault_at("os:replace", call)
    assert start("ppo_mujoco", tmp_path, "new", prepare=kill).returncode == -signal.SIGKILL
    assert fork("ppo_mujoco", tmp_path, "fork", parent, prepare=kill).returncode == -signal.SIGKILL
    for name in ("new", "fork"):
        process = resume("ppo_mujoco", tmp_path, name)
        assert process.returncode == 0, process.stderr
        assert same_weights(tmp_path / name, finished())
    assert_same(tmp_path / "new", finished())
    assert min(checkpoints(tmp_path / "fork")) == 256


def test_nothing_is_promised_before_the_first_state(finished, tmp_path):
    """And without args.json the flags must be given again, which is said."""
    for number in (1, 2, 3):
        fault = fault_at("os:replace", number, "disk full")
        line = one_line(start("ppo_mujoco", tmp_path, f"run{number}", prepare=fault), 1)
        assert "No space left" in line and "--resume" not in line
    (tmp_path / "run1" / "args.json").unlink(missing_ok=True)
    process = start("ppo_mujoco", tmp_path, "run1", "--resume")
    assert process.returncode == 0 and "has no args.json" in process.stderr
    assert_same(tmp_path / "run1", finished())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_copied_or_renamed_run_continues(half, finished, script):
    run_dir = half(script, "renamed")
    process = resume(script, run_dir.parent, "renamed")
    assert process.returncode == 0, process.stderr
    assert_same(run_dir, finished(script))
    args = json.loads((run_dir / "args.json").read_text())
    assert args["run_name"] == "renamed" and args["runs_dir"] == str(run_dir.parent)


@pytest.mark.parametrize("other", ["--seed 5 --pfo-coef 1", "--clip-coef 0.1", "--width 32"])
def test_only_flags_that_may_not_change_are_refused_and_listed(half, other):
    run_dir = half()
    before = contents(run_dir)
    may = "--log-interval 0.5 --total-timesteps 384"
    line = one_line(resume("ppo_mujoco", run_dir.parent, "run", f"{other} {may}"), 2)
    named = re.findall(r"(\w+) \S+ is now", line)
    assert named == [flag.strip("-").replace("-", "_") for flag in other.split()[::2]]
    assert contents(run_dir) == before
    process = resume("ppo_mujoco", run_dir.parent, "run", may)
    assert process.returncode == 0 and "total_timesteps 512 is now 384" in process.stderr


def test_resume_starts_a_run_that_does_not_exist_and_says_so(finished, tmp_path):
    process = start("ppo_mujoco", tmp_path, "new", "--resume")
    assert process.returncode == 0 and "new starts at step 0" in process.stdout
    assert_same(tmp_path / "new", finished())


def test_a_longer_run_continues_a_finished_one(finished, tmp_path):
    assert start("ppo_mujoco", tmp_path, "run", "--total-timesteps 256").returncode == 0
    process = resume("ppo_mujoco", tmp_path, "run", "--total-timesteps 512")
    assert process.returncode == 0, process.stderr
    assert same_weights(tmp_path / "run", finished())


def cosine(args, global_step):
    return args.learning_rate * (1 + math.cos(math.pi * global_step / args.total_timesteps)) / 2


@pytest.mark.parametrize("schedule", ["--anneal-lr", "cosine"])
def test_a_longer_run_is_refused_if_its_learning_rates_would_have_been_others(
    run, monkeypatch, capsys, schedule
):
    """Also for a schedule that somebody writes into `learning_rate`."""
    more = schedule if "-" in schedule else ""
    if not more:
        monkeypatch.setattr(ppo_mujoco, "learning_rate", cosine)
    run_dir = run("ppo_mujoco", f"{more} --total-timesteps 256")
    before = contents(run_dir)
    with pytest.raises(SystemExit) as stop:
        run("ppo_mujoco", f"{more} --resume")
    assert stop.value.code == 2 and "total_timesteps 256 is now 512" in capsys.readouterr().err
    assert contents(run_dir) == before


def test_a_script_that_changed_is_said_and_both_are_kept(half, finished):
    run_dir = half()
    with open(run_dir / "ppo_mujoco.py", "a") as file:
        file.write("# changed\n")
    changed = (run_dir / "ppo_mujoco.py").read_text()
    process = resume("ppo_mujoco", run_dir.parent, "run")
    assert process.returncode == 0 and "ppo_mujoco.py has changed" in process.stderr
    texts = {path.read_text() for path in run_dir.glob("*.py")}
    assert texts == {changed, (ROOT / "ppo_mujoco.py").read_text()}
    assert_same(run_dir, finished())


# Files of the user, and an event log that is lost


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_file_of_the_user_is_touched(half, finished, tmp_path, script):
    """Only the event files that the state knows are cut; no link is followed."""
    run_dir = half(script)
    user = tmp_path / "user.txt"
    user.write_text("mine")
    (run_dir / "events.md").write_text("mine")
    (run_dir / "events.out.tfevents.9.other").write_text("mine")
    for name in ("events.link", "latest.pt.tmp", "args.json", f"{script}.py"):
        (run_dir / name).unlink(missing_ok=True)
        (run_dir / name).symlink_to(user)
    os.mkfifo(run_dir / "args.json.tmp")
    process = resume(script, tmp_path, "run")
    assert process.returncode == 0, process.stderr
    assert user.read_text() == (run_dir / "events.md").read_text() == "mine"
    (renamed,) = run_dir.glob("unsaved-events.*")
    assert renamed.read_text() == "mine" and not (run_dir / "args.json").is_symlink()
    (run_dir / "events.md").unlink()
    (run_dir / "events.link").unlink()
    assert_same(run_dir, finished(script))


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_an_event_file_that_is_no_file_is_refused(half, tmp_path, kind):
    run_dir, path = half(), tmp_path / "run" / "events.out.tfevents.9.x"
    (tmp_path / "user.txt").write_text("mine")
    if kind == "link":
        path.symlink_to(tmp_path / "user.txt")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    states = {x: x.read_bytes() for x in run_dir.rglob("*.pt")}
    assert path.name in one_line(resume("ppo_mujoco", tmp_path, "run"), 2)
    assert (tmp_path / "user.txt").read_text() == "mine" and os.path.lexists(path)
    assert states == {x: x.read_bytes() for x in run_dir.rglob("*.pt")}


def lose_the_log(how, call):
    """At a call of add_scalar something happens to the event file."""
    from torch.utils.tensorboard import SummaryWriter

    add_scalar, calls = SummaryWriter.add_scalar, iter(range(10**9))

    def losing(self, *args, **kwargs):
        if next(calls) == call:
            self.flush()
            (path,) = Path(self.log_dir).glob("events*")
            path.unlink() if how == "removed" else os.truncate(path, 0 if how == "emptied" else 999)
        return add_scalar(self, *args, **kwargs)

    SummaryWriter.add_scalar = losing


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("how", ["removed", "emptied", "cut"])
@pytest.mark.parametrize("interval", ["0.125", "1"])  # save soon, or when it has grown again
def test_a_log_that_is_lost_ends_the_run(tmp_path, script, how, interval):
    words = f"--checkpoint-interval {interval} --snapshot-interval {interval} --capacity-interval 0"
    lose = functools.partial(lose_the_log, how, 50)
    line = one_line(start(script, tmp_path, "run", words, prepare=lose), 1)
    assert "events.out.tfevents" in line and "--resume" not in line


def clock_behind():
    now = time.time
    time.time = lambda: now() - 10**6


def test_a_clock_that_is_behind_does_not_hide_the_new_curves(half, finished):
    """tensorboard#1011: it reads event files in the order of the times in their names."""
    run_dir = half()
    (before,) = run_dir.glob("events*")
    assert resume("ppo_mujoco", run_dir.parent, "run", prepare=clock_behind).returncode == 0
    first, second = sorted(run_dir.glob("events*"))
    assert first == before
    assert same_scalars(run_dir, finished())


def fsync_of_windows():
    import fcntl

    fsync = os.fsync

    def strict(number):
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        fsync(number)

    os.fsync = strict


@pytest.mark.parametrize("script", SCRIPTS)
def test_only_files_that_can_be_written_are_synced(tmp_path, script):
    """Windows refuses another fsync."""
    process = start(script, tmp_path, "run", "--capacity-interval 0", prepare=fsync_of_windows)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("fault", ["no locks", "no function", "not supported"])
def test_a_disk_that_cannot_lock_is_named(half, tmp_path, script, fault):
    """filelock#67, poetry#8825: network file systems."""
    run_dir = half(script, "old")
    before = contents(tmp_path)
    no_lock = fault_at("fcntl:flock", 1, fault)
    for process in (
        start(script, tmp_path, "new", "--capacity-interval 0", prepare=no_lock),
        resume(script, tmp_path, "old", prepare=no_lock),
    ):
        line = one_line(process, 2)
        assert "lock" in line and "disk" in line
    assert contents(tmp_path) == before and run_dir.exists()


# Damaged files: each is refused, and nothing changed, or costs nothing


def put(content, pattern="latest.pt"):
    """Replace files of a run by bytes, by what a function makes of theirs, by "nothing", a "pipe"
    or a "link" to nowhere, or by another state."""

    def damage(run_dir):
        for path in list(run_dir.glob(pattern)):
            before = path.read_bytes()
            path.unlink()
            if content == "pipe":
                os.mkfifo(path)
            elif content == "link":
                path.symlink_to(run_dir / "nowhere")
            elif callable(content) or isinstance(content, bytes):
                path.write_bytes(content(before) if callable(content) else content)
            elif content != "nothing":
                torch.save(content, path)

    return damage


def flip(place):
    """A single bit at this share of the length."""

    def flipped(content):
        content = bytearray(content)
        content[int(place * (len(content) - 1))] ^= 1 << int(place * 997) % 8
        return bytes(content)

    return flipped


def cut(share):
    return lambda content: content[: int(share * len(content))]


def with_value(value, *keys):
    """Another value at state[key][key]... in latest.pt; None: that key is gone."""

    def change(state):
        for key in keys[:-1]:
            state = state[key]
        state.pop(keys[-1], None)
        if value is not None:
            state[keys[-1]] = value

    return lambda run_dir: edit(run_dir / "latest.pt", change)


class Malicious:
    """Its reader would exit."""

    def __reduce__(self):
        return os._exit, (0,)


def both(*damages):
    return lambda run_dir: [damage(run_dir) for damage in damages]


# name, or name: what is said of it -> damage
KEPT, OLDER = "checkpoints/256.pt", "checkpoints/128.pt"  # the newest ones behind latest.pt
COSTS_NOTHING = {
    **{f"bit {x}: latest.pt is damaged": put(flip(x)) for x in (0, 0.1, 0.6, 0.9)},
    **{f"cut {x}: trying the state before it": put(cut(x)) for x in (0.0, 0.5, 0.9999)},
    "without a new flag": with_value(None, "args", "adam_beta2"),
    "another version: torch 1.0": with_value("CPU, 9 threads, torch 1.0", "versions"),
    "text": put(b"not a checkpoint"),
    "half a zip": put(b"PK\x03\x04 half a zip"),
    "missing": put("nothing"),
    "a pipe": put("pipe"),
    "a link to nowhere": put("link"),
    "three damaged states": both(put(flip(0.3)), put(cut(0.5), KEPT), put("pipe", OLDER)),
    "a name that is no step": both(put(cut(0.5)), lambda x: (x / "checkpoints/²x.pt").touch()),
    "a list": put([1, 2]),
    "a foreign dict": put({"state_dict": {}, "epoch": 3}),
    "of the other script": with_value("ppo_atari", "script"),
    "a negative step": with_value(-16, "global_step"),
    "without a step": with_value(None, "global_step"),
    "garbage after the events": put(lambda content: content + b"xyz" * 99, "events*"),
    "args.json damaged": put(b'{"seed', "args.json"),
    "args.json missing": put("nothing", "args.json"),
    "args.json of another run": put(b'{"seed": 9}', "args.json"),
    "diverged.pt": lambda x: (x / "latest.pt").rename(x / "checkpoints" / "diverged.pt"),
}
OTHER_KEYS = "args agent optimizer envs obs_stats rng versions logs scalars"
REFUSED = {
    "every state is damaged": put(cut(0.5), "**/*.pt"),
    "code in every state": put(Malicious(), "**/*.pt"),
    **{f"without {key}": with_value(None, key) for key in OTHER_KEYS.split()},
    "args of no dict": with_value(3, "args"),
    "a task that is none": with_value("NoTask-v0", "args", "env_id"),
    "a flag that is gone: save_patience": with_value(30.0, "args", "save_patience"),
    "another width: networks": with_value(7, "args", "width"),
    "another layer: networks": with_value(torch.zeros(2), "agent", "norm"),
    "a width that is none": with_value(8.0, "args", "width"),
    "a policy that is none": with_value("x", "args", "policy"),
    "moments of no dict": with_value([1], "optimizer"),
    "a generator that is none": with_value(torch.zeros(3), "rng"),
    "environments without seeds": with_value({"rngs": []}, "envs"),
    "statistics without a mean": with_value({}, "obs_stats"),
    "a step within an iteration": with_value(7, "global_step"),
    "a log of another folder": with_value({"../user.txt": [0, 0]}, "logs"),
    "bit flipped in the events": put(flip(0.4), "events*"),
    "events cut": put(cut(0.5), "events*"),
    "events missing": put("nothing", "events*"),
}


@pytest.mark.parametrize("name", COSTS_NOTHING)
def test_what_is_damaged_costs_nothing(half, finished, name):
    """The run continues from the newest good state to the identical end."""
    run_dir = half()
    COSTS_NOTHING[name](run_dir)
    process = resume("ppo_mujoco", run_dir.parent, "run")
    assert process.returncode == 0 and "Traceback" not in process.stderr, process.stderr
    assert name.partition(": ")[2] in process.stderr
    assert same_weights(run_dir, finished()) and same_scalars(run_dir, finished())


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_continued_is_refused_and_nothing_changed(half, name):
    run_dir = half()
    (run_dir.parent / "user.txt").write_text("mine")
    REFUSED[name](run_dir)
    before = contents(run_dir.parent)
    line = one_line(resume("ppo_mujoco", run_dir.parent, "run"), 2)
    assert name.partition(": ")[2] in line
    assert contents(run_dir.parent) == before


# Forks


def fork(script, folder, name, parent, more="", **kwargs):
    return call(script, flags(folder, name, f"--fork-from {parent} {more}"), **kwargs)


def later(run_dir, step):
    """The points of a run after a step, its speed aside; those since the last log are a mean."""
    scalars = {k: [x for x in points if x[0] > step] for k, points in read_scalars(run_dir).items()}
    return repr(sorted((k, x) for k, x in scalars.items() if k != "charts/SPS" and x))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_fork_with_nothing_changed_is_the_continuation(finished, tmp_path, script):
    """Of every kept checkpoint: each is a whole state."""
    parent = finished(script)
    steps = checkpoints(parent)
    for step in list(steps)[:-1] if script == "ppo_mujoco" else list(steps)[2:3]:
        process = fork(script, tmp_path, f"fork{step}", steps[step])
        assert process.returncode == 0, process.stderr
        run_dir = tmp_path / f"fork{step}"
        assert str(steps[step]) in process.stderr and f"step {step}" in process.stderr
        assert same_weights(run_dir, parent)
        assert later(run_dir, step) == later(parent, step)
        assert step == 0 or later(run_dir, -1) == later(run_dir, step)
        assert list(checkpoints(run_dir)) == [x for x in steps if x >= step]
        args = json.loads((run_dir / "args.json").read_text())
        assert (args["fork_from"], args["fork_step"]) == (str(steps[step]), step)
        assert args["total_timesteps"] == max(steps)


@pytest.mark.parametrize(
    "more",
    [
        "--learning-rate 1e-3",
        "--adam-beta2 0.9",
        "--seed 7",
        "--num-envs 3 --num-steps 20",
        "--action-logprob sampled",
        "--total-timesteps 768",
        "--reset-adam",
        "--pfo-coef 10",
        "--anneal-lr",
        "--reward-keep-prob 0.3",
        "--time-limit bootstrap --max-grad-norm 0.1",
    ],
)
def test_another_flag_acts_in_a_fork(finished, tmp_path, more):
    parent = tmp_path / "parent.pt"
    shutil.copy(checkpoints(finished())[256], parent)
    if "logprob" in more:  # which decides only where actions saturate
        edit(parent, lambda state: state["agent"]["actor_head.bias"][:3].add_(9))
        assert fork("ppo_mujoco", tmp_path, "same", parent).returncode == 0
    process = fork("ppo_mujoco", tmp_path, "fork", parent, more)
    assert process.returncode == 0, process.stderr
    flag = more.split()[0].strip("-").replace("-", "_")
    assert "step 256" in process.stderr and f"{flag} " in process.stderr
    run_dir, scalars = tmp_path / "fork", read_scalars(tmp_path / "fork")
    assert min(step for points in scalars.values() for step, _ in points) > 256
    total = 768 if "total" in more else 512
    assert total - 64 < max(checkpoints(run_dir)) <= total
    args, before = (json.loads((x / "args.json").read_text()) for x in (run_dir, finished()))
    assert args["fork_step"] == 256 and args["fork_from"] == str(parent)
    changed = {name for name in args if args[name] != before[name]} - {"runs_dir", "run_name"}
    given = {word.strip("-").replace("-", "_") for word in more.split() if word.startswith("--")}
    assert changed - {"fork_from", "fork_step"} == given
    if "learning-rate" in more:
        assert scalars["charts/learning_rate"][0][1] == pytest.approx(1e-3)
    if "anneal" in more:  # follows the fork's own total: iterations 5 to 8 of 8
        rates = [x for _, x in scalars["charts/learning_rate"]]
        assert rates == pytest.approx([3e-4 * (8 - i) / 8 for i in range(4, 8)])
    other = tmp_path / "same" if "logprob" in more else finished()
    assert total > 512 or not same_weights(run_dir, other)


@pytest.mark.parametrize(
    "script, total, end", [("ppo_mujoco", 1024, 984), ("ppo_atari", 1536, 1464)]
)
def test_a_fork_with_another_batch_counts_from_its_own_step(finished, tmp_path, script, total, end):
    """SB3#978, #1150: it makes the steps that are left, and anneals as if it had always been so."""
    more = f"--total-timesteps {total} --anneal-lr --capacity-interval 0 --num-steps "
    steps = {"ppo_mujoco": "100", "ppo_atari": "20"}[script]  # 200 and 120 steps an iteration
    process = fork(script, tmp_path, "fork", checkpoints(finished(script))[384], more + steps)
    assert process.returncode == 0, process.stderr
    assert max(checkpoints(tmp_path / "fork")) == end
    args = json.loads((tmp_path / "fork" / "args.json").read_text())
    step, rate = read_scalars(tmp_path / "fork")["charts/learning_rate"][0]
    assert step - args["fork_step"] == (end - 384) // (3 if script == "ppo_mujoco" else 9)
    assert rate == pytest.approx(args["learning_rate"] * (1 - 384 / total))


@pytest.mark.parametrize(
    "more, says",
    [
        ("--width 32", "width"),
        ("--env-id HalfCheetah-v4", "env_id"),
        ("--share-trunk", "share_trunk"),
        ("--policy-std free", "policy-std"),
        ("--total-timesteps 256", "--total-timesteps"),
        ("--learning-rate x", "--learning-rate"),
    ],
)
def test_what_does_not_fit_a_fork_is_refused(finished, tmp_path, more, says):
    process = fork("ppo_mujoco", tmp_path, "fork", checkpoints(finished())[256], more)
    assert process.returncode == 2 and says in process.stderr, process.stderr
    assert "Traceback" not in process.stderr and not list(tmp_path.iterdir())


def test_a_parent_that_is_damaged_or_none_is_refused(finished, half, tmp_path):
    parents = {"missing": tmp_path / "missing.pt", "a folder": tmp_path}
    for name, damage in {
        "flipped": put(flip(0.4)),
        "cut": put(cut(0.7)),
        "other": with_value("ppo_atari", "script"),
        "pipe": put("pipe"),
    }.items():
        damage(half(name=name))
        parents[name] = tmp_path / name / "latest.pt"
    for name, parent in parents.items():
        one_line(fork("ppo_mujoco", tmp_path, "fork", parent), 2)
        assert not (tmp_path / "fork").exists(), name


def test_a_fork_continues_from_its_own_state_and_is_forked(finished, tmp_path):
    parent = checkpoints(finished())[128]
    more = "--learning-rate 1e-3"
    assert fork("ppo_mujoco", tmp_path, "fork", parent, more).returncode == 0
    for name, command in (("a", ""), ("b", f"--fork-from {parent} {more}")):
        shutil.copytree(tmp_path / "fork", tmp_path / name)
        cut_back(tmp_path / name, 256)
        process = resume("ppo_mujoco", tmp_path, name, command)
        assert process.returncode == 0, process.stderr
        assert_same(tmp_path / name, tmp_path / "fork")
    again = checkpoints(tmp_path / "fork")[384]
    assert fork("ppo_mujoco", tmp_path, "again", again).returncode == 0
    assert same_weights(tmp_path / "again", tmp_path / "fork")
    args = json.loads((tmp_path / "again" / "args.json").read_text())
    assert args["fork_from"] == str(again) and args["fork_step"] == 384
    assert args["learning_rate"] == 1e-3
    # --resume with --fork-from where there is no such run yet starts the fork
    process = resume("ppo_mujoco", tmp_path, "new", f"--fork-from {parent} {more}")
    assert process.returncode == 0 and same_weights(tmp_path / "new", tmp_path / "fork")


# Faults: one message, the right exit code, and the run continues identically

ROLLOUT, UPDATE = "gymnasium.wrappers:TimeLimit.step", "torch.optim:Adam.step"
FAULTS = {  # what happens at which call -> exit code, what it says
    "a full disk": (fault_at("os:fsync", 9, "disk full"), 1, "No space left"),
    "a full disk in the log": (fault_at("os:fsync", 8, "disk full"), 1, "No space left"),
    "a full disk at a rename": (fault_at("os:replace", 6, "disk full"), 1, "No space left"),
    "a disk that fails": (fault_at("os:replace", 5, "input/output"), 1, "Input/output error"),
    "Ctrl-C in the rollout": (fault_at(ROLLOUT, 400, "SIGINT"), 130, ""),
    "Ctrl-C in the update": (fault_at(UPDATE, 40, "SIGINT"), 130, ""),
    "Ctrl-C in saving": (fault_at("os:fsync", 9, "SIGINT"), 130, ""),
    "out of memory": (fault_at(UPDATE, 40, "out of memory"), 1, "--minibatch-size"),
    "out of CPU memory": (fault_at(UPDATE, 40, "out of CPU memory"), 1, "--minibatch-size"),
    "SIGTERM": (fault_at(UPDATE, 40, "SIGTERM"), -signal.SIGTERM, None),
    "SIGTERM in saving": (fault_at("os:replace", 6, "SIGTERM"), -signal.SIGTERM, None),
    "SIGHUP": (fault_at(ROLLOUT, 400, "SIGHUP"), -signal.SIGHUP, None),
}
ON_ATARI = ("a full disk", "Ctrl-C in the update", "SIGTERM")
CASES = [("ppo_mujoco", name) for name in FAULTS] + [("ppo_atari", name) for name in ON_ATARI]


@pytest.mark.parametrize("script, name", CASES)
def test_a_fault_ends_the_run_and_resuming_gives_the_identical_one(
    finished, tmp_path, script, name
):
    fault, code, says = FAULTS[name]
    process = start(script, tmp_path, "run", prepare=fault)
    if says is None:
        assert process.returncode == code and "Traceback" not in process.stderr
    else:
        line = one_line(process, code)
        assert says in line and (says.startswith("--") or "--resume" in line)
    assert (tmp_path / "run" / "latest.pt").exists()
    assert resume(script, tmp_path, "run").returncode == 0
    assert_same(tmp_path / "run", finished(script))


def test_the_advice_is_a_command_that_continues_the_run(finished, tmp_path):
    """Also if names have blanks in them."""
    fault = fault_at("os:replace", 6, "disk full")
    words = [*SMALL["ppo_mujoco"].split(), "--runs-dir", "my runs", "--run-name", "a 'b' c"]
    line = one_line(call("ppo_mujoco", words, cwd=tmp_path, prepare=fault), 1)
    script, *words = shlex.split(re.search("python (.* --resume)", line)[1])
    process = call("ppo_mujoco", words, cwd=tmp_path)
    assert script == "ppo_mujoco.py" and process.returncode == 0, process.stderr
    assert_same(tmp_path / "my runs" / "a 'b' c", finished())


def limit_file_size(size=100_000):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_file_that_can_only_be_written_in_part(finished, tmp_path):
    """What is written of a state never takes the place of a complete one."""
    line = one_line(start("ppo_mujoco", tmp_path, "run", prepare=limit_file_size), 1)
    assert "File too large" in line
    assert all(not zipfile.ZipFile(path).testzip() for path in tmp_path.rglob("*.pt"))
    process = start("ppo_mujoco", tmp_path, "run", "--resume")
    assert process.returncode == 0
    assert_same(tmp_path / "run", finished())


def test_a_full_disk_that_is_real(finished, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=800k tmpfs {disk} 2> /dev/null"):
        pytest.skip("no right to mount")
    try:
        line = message(start("ppo_mujoco", disk, "run"), 1)
        assert "No space left on device" in line and "--resume" in line
        shutil.copytree(disk / "run", tmp_path / "run")
    finally:
        os.system(f"umount {disk}")
    process = resume("ppo_mujoco", tmp_path, "run")
    assert process.returncode == 0, process.stderr
    assert same_weights(tmp_path / "run", finished()) and same_scalars(tmp_path / "run", finished())


@pytest.mark.parametrize("first", ["the state", "the log"])
def test_a_folder_that_vanishes(tmp_path, first):
    """Whichever finds it missing: TensorBoard's writer, a thread, says nothing on its own."""
    words = f"{SMALL['ppo_mujoco']} {flags(tmp_path, 'run', '--total-timesteps 200000')}"
    interval = {"the state": 0.001, "the log": 1}[first]
    process = Process("ppo_mujoco", words + f" --checkpoint-interval {interval}")
    process.wait_until(lambda: checkpoints(tmp_path / "run") and "192/" in process.read("stderr"))
    shutil.rmtree((tmp_path / "run").rename(tmp_path / "gone"))  # at once, for who writes there
    assert "No such file or directory" in message(process.wait(), 1)


def test_a_second_process_is_refused(half):
    run_dir = half()
    words = flags(run_dir.parent, "run", "--resume --total-timesteps 100000")
    first = Process("ppo_mujoco", words)
    first.wait_until(lambda: len(list(run_dir.glob("events*"))) > 1)
    second = resume("ppo_mujoco", run_dir.parent, "run")
    running = first.running()
    first.send(signal.SIGTERM)
    first.wait()
    assert running and "another process" in one_line(second, 2)


def test_two_processes_that_start_one_run(tmp_path):
    """The second one saw no folder before the first one made it."""
    (tmp_path / "run").mkdir()
    process = start("ppo_mujoco", tmp_path, "run", prepare=see_no_folder)
    assert "another process" in one_line(process, 2)
    assert not list((tmp_path / "run").iterdir())


def see_no_folder():
    exists = Path.exists
    Path.exists = lambda self: self.name != "run" and exists(self)

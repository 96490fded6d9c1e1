"""A killed and resumed run is, bit for bit, the run that was never killed; forks; damaged files."""

import collections
import fcntl
import functools
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import time
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    SMALL,
    Malicious,
    Process,
    call,
    checkpoints,
    contents,
    fault_at,
    fine,
    message,
    one_line,
    read_args,
    read_scalars,
    same_scalars,
    same_weights,
)
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

import ppo_mujoco

SCRIPTS = ("ppo_mujoco", "ppo_atari")


def name_of(run_dir):
    return f"--runs-dir {run_dir.parent} --run-name {run_dir.name}"


def start(run_dir, more="", script="ppo_mujoco", **kwargs):
    """A small run from its beginning to its end."""
    return call(script, f"{SMALL[script]} {name_of(run_dir)} {more}", **kwargs)


def resume(run_dir, more="", script="ppo_mujoco", **kwargs):
    """The same run continues: its name is enough."""
    return call(script, f"{name_of(run_dir)} --resume {more}", **kwargs)


def fork(run_dir, parent, more="", script="ppo_mujoco", **kwargs):
    return call(script, f"{name_of(run_dir)} --fork-from {parent} {more}", **kwargs)


def cut_back(run_dir, step):
    """Leave a run as if it had been killed just after it saved at `step`."""
    for kept, path in checkpoints(run_dir).items():
        if kept > step:
            path.unlink()
    shutil.copy(run_dir / "checkpoints" / f"{step}.pt", run_dir / "latest.pt")


def count_points(run_dir):
    """How often each point (tag, step) stands in the event files of a run. TensorBoard's
    EventAccumulator drops points of a run that began again."""
    counts = collections.Counter()
    for path in run_dir.glob("events*"):
        for event in LegacyEventFileLoader(str(path)).Load():
            counts.update((value.tag, event.step) for value in event.summary.value)
    return counts


def assert_same(run_dir, whole):
    """Two runs are the same bit for bit: checkpoints, generators, moments, curves."""
    assert checkpoints(run_dir).keys() == checkpoints(whole).keys()
    for ours, theirs in zip(checkpoints(run_dir).values(), checkpoints(whole).values()):
        a, b = (torch.load(path, weights_only=True) for path in (ours, theirs))
        assert all(torch.equal(a["agent"][name], b["agent"][name]) for name in b["agent"])
        assert torch.equal(a["rng"], b["rng"]) and str(a["optimizer"]) == str(b["optimizer"])
        assert str(a["envs"]) == str(b["envs"])
    assert same_scalars(run_dir, whole)
    assert count_points(run_dir) == count_points(whole)
    assert set(count_points(run_dir).values()) == {1}
    assert not list(run_dir.rglob("*.tmp"))


@pytest.fixture
def half(finished, tmp_path):
    """A copy of a finished run as it was in the middle."""
    run_dir = shutil.copytree(finished(), tmp_path / "run")
    cut_back(run_dir, 256)
    return run_dir


ADD_SCALAR = "torch.utils.tensorboard:SummaryWriter.add_scalar"
# Where to kill: the n-th call of a function, n up to what two iterations and the start take
PLACES = {
    "in the rollout": ("ppo_mujoco", "gymnasium.wrappers:TimeLimit.step", 200),
    "on Atari in the rollout": ("ppo_atari", "ale_py.vector_env:AtariVectorEnv.step", 40),
    "in the replay of its episodes": ("ppo_mujoco", "gymnasium.wrappers:TimeLimit.step", 20),
    "in the update or a capacity fit": ("", "torch.optim:Adam.step", 16),
    "in saving, before the disk has it": ("", "os:fsync", 9),
    "in saving, before the new name": ("", "os:replace", 6),
    "in logging": ("", ADD_SCALAR, 60),
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
    run_dir, rng, killed = tmp_path / "run", random.Random(more), 0
    places = [place[1:] for place in PLACES.values() if place[0] in ("", script)]
    first = start(run_dir, more, script, prepare=fault_at("os:replace", 1))
    assert first.returncode == -signal.SIGKILL
    for kill in range(KILLS if not more else KILLS // 2):
        name, most = places[kill % len(places)] if kill < len(places) else rng.choice(places)
        # killed before it kept its flags: they are given again
        words = "" if (run_dir / "args.json").exists() else f"{SMALL[script]} {more}"
        process = resume(run_dir, words, script, prepare=fault_at(name, rng.randint(1, most)))
        assert process.returncode in (0, -signal.SIGKILL), process.stderr
        killed += process.returncode != 0
    assert killed >= 3
    for _ in range(2):  # a finished run stays as it is
        fine(resume(run_dir, script=script))
        assert_same(run_dir, finished(script, more))


@pytest.mark.parametrize("call", [2, 3, 4])
def test_a_start_that_was_killed_before_its_first_state_is_resumed(finished, tmp_path, call):
    """By its name alone, whether it is a new run or a fork; its flags are in args.json."""
    new, forked, kill = tmp_path / "new", tmp_path / "fork", fault_at("os:replace", call)
    assert start(new, prepare=kill).returncode == -signal.SIGKILL
    parent = checkpoints(finished())[256]
    assert fork(forked, parent, prepare=kill).returncode == -signal.SIGKILL
    for run_dir in (new, forked):
        fine(resume(run_dir))
        assert same_weights(run_dir, finished())
    assert_same(new, finished())
    assert min(checkpoints(forked)) == 256


def test_nothing_is_promised_before_the_first_state(finished, tmp_path):
    """And without args.json the flags must be given again, which is said."""
    for number in (1, 2, 3):
        run_dir = tmp_path / f"run{number}"
        line = one_line(start(run_dir, prepare=fault_at("os:replace", number, "disk full")), 1)
        assert "No space left" in line and "--resume" not in line
    (run_dir / "args.json").unlink()
    assert "has no args.json" in fine(start(run_dir, "--resume")).stderr
    assert_same(run_dir, finished())


def test_a_copied_or_renamed_run_continues(half, finished, tmp_path):
    run_dir = half.rename(tmp_path / "renamed")
    fine(resume(run_dir))
    assert_same(run_dir, finished())
    args = read_args(run_dir)
    assert args["run_name"] == "renamed" and args["runs_dir"] == str(tmp_path)


def test_only_flags_that_may_not_change_are_refused_and_listed(half):
    before = contents(half)
    may = "--log-interval 0.5 --total-timesteps 384"
    line = one_line(resume(half, f"--seed 5 --width 32 --pfo-coef 1 {may}"), 2)
    assert re.findall(r"(\w+) \S+ is now", line) == ["seed", "width", "pfo_coef"]
    assert contents(half) == before
    assert "total_timesteps 512 is now 384" in fine(resume(half, may)).stderr


def test_resume_starts_a_run_that_does_not_exist_and_makes_a_finished_one_longer(
    finished, tmp_path
):
    run_dir = tmp_path / "run"
    process = fine(start(run_dir, "--resume --total-timesteps 256"))
    assert "run starts at step 0" in process.stdout and max(checkpoints(run_dir)) == 256
    fine(resume(run_dir, "--total-timesteps 512"))
    assert same_weights(run_dir, finished())


def cosine(args, global_step):
    return args.learning_rate * (1 + math.cos(math.pi * global_step / args.total_timesteps)) / 2


def test_a_longer_run_is_refused_if_its_learning_rates_would_have_been_others(
    run, monkeypatch, capsys
):
    """Also for a schedule that somebody writes into `learning_rate`."""
    monkeypatch.setattr(ppo_mujoco, "learning_rate", cosine)
    run_dir = run("ppo_mujoco", "--total-timesteps 256")
    before = contents(run_dir)
    with pytest.raises(SystemExit) as stop:
        run("ppo_mujoco", "--resume")
    assert stop.value.code == 2 and "total_timesteps 256 is now 512" in capsys.readouterr().err
    assert contents(run_dir) == before


def test_a_script_that_changed_is_said_and_both_are_kept(half, finished):
    with open(half / "ppo_mujoco.py", "a") as file:
        file.write("# changed\n")
    changed = (half / "ppo_mujoco.py").read_text()
    assert "ppo_mujoco.py has changed" in fine(resume(half)).stderr
    texts = {path.read_text() for path in half.glob("*.py")}
    assert texts == {changed, (ROOT / "ppo_mujoco.py").read_text()}
    assert_same(half, finished())


# Files of the user, and an event log that is lost


def test_no_file_of_the_user_is_touched(half, finished, tmp_path):
    """Only the event files that the state knows are cut; no link is followed."""
    user = tmp_path / "user.txt"
    user.write_text("mine")
    (half / "events.md").write_text("mine")
    (half / "events.out.tfevents.9.other").write_text("mine")
    for name in ("events.link", "latest.pt.tmp", "args.json", "ppo_mujoco.py"):
        (half / name).unlink(missing_ok=True)
        (half / name).symlink_to(user)
    os.mkfifo(half / "args.json.tmp")
    fine(resume(half))
    assert user.read_text() == (half / "events.md").read_text() == "mine"
    (renamed,) = half.glob("unsaved-events.*")
    assert renamed.read_text() == "mine" and not (half / "args.json").is_symlink()
    (half / "events.md").unlink()
    (half / "events.link").unlink()
    assert_same(half, finished())


def lose_the_log(how, writer, *_):
    writer.flush()
    (path,) = Path(writer.log_dir).glob("events*")
    if how == "removed":
        path.unlink()
    else:
        os.truncate(path, 0)


@pytest.mark.parametrize("how", ["removed", "emptied"])
@pytest.mark.parametrize("interval", ["0.125", "1"])  # save soon, or when it has grown again
def test_a_log_that_is_lost_ends_the_run(tmp_path, how, interval):
    words = f"--checkpoint-interval {interval} --snapshot-interval {interval} --capacity-interval 0"
    lose = fault_at(ADD_SCALAR, 50, functools.partial(lose_the_log, how))
    line = one_line(start(tmp_path / "run", words, prepare=lose), 1)
    assert "events.out.tfevents" in line and "--resume" not in line


def test_a_clock_that_is_behind_does_not_hide_the_new_curves(half, finished, run, monkeypatch):
    """tensorboard#1011: it reads event files in the order of the times in their names."""
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() - 10**6)
    (before,) = half.glob("events*")
    run("ppo_mujoco", "--resume")
    first, second = sorted(half.glob("events*"))
    assert first == before
    assert same_scalars(half, finished())


def test_only_files_that_can_be_written_are_synced(run, monkeypatch):
    """Windows refuses another fsync."""
    modes = set()
    sync = lambda number: modes.add(fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE)  # noqa: E731
    monkeypatch.setattr(os, "fsync", sync)
    run("ppo_mujoco")
    assert modes and os.O_RDONLY not in modes


@pytest.mark.parametrize("fault", ["no locks", "no function"])
def test_a_disk_that_cannot_lock_is_named(half, tmp_path, fault):
    """filelock#67, poetry#8825: network file systems."""
    before = contents(tmp_path)
    no_lock = fault_at("fcntl:flock", 1, fault)
    for process in (start(tmp_path / "new", prepare=no_lock), resume(half, prepare=no_lock)):
        line = one_line(process, 2)
        assert "lock" in line and "disk" in line
    assert contents(tmp_path) == before


# Damaged files: each is refused, and nothing changed, or costs nothing


def put(content, pattern="latest.pt"):
    """Replace files of a run by what a function makes of their bytes, by "nothing", by a "pipe",
    or by another state."""

    def damage(run_dir):
        for path in list(run_dir.glob(pattern)):
            before = path.read_bytes()
            path.unlink()
            if content == "pipe":
                os.mkfifo(path)
            elif callable(content):
                path.write_bytes(content(before))
            elif content != "nothing":
                torch.save(content, path)

    return damage


def flip(place):
    """A single bit at this share of the length."""

    def flipped(content):
        content = bytearray(content)
        content[int(place * (len(content) - 1))] ^= 1
        return bytes(content)

    return flipped


def cut(share):
    return lambda content: content[: int(share * len(content))]


def with_value(value, *keys):
    """Another value at state[key][key]... in latest.pt; None: that key is gone."""

    def damage(run_dir):
        whole = state = torch.load(run_dir / "latest.pt", weights_only=True)
        for key in keys[:-1]:
            state = state[key]
        state.pop(keys[-1], None)
        if value is not None:
            state[keys[-1]] = value
        torch.save(whole, run_dir / "latest.pt")

    return damage


def both(*damages):
    return lambda run_dir: [damage(run_dir) for damage in damages]


EVENTS = "events.out.tfevents.9.x"
# name, or name: what is said of it -> damage
KEPT, OLDER = "checkpoints/256.pt", "checkpoints/128.pt"  # the newest ones behind latest.pt
COSTS_NOTHING = {
    **{f"bit {x}: latest.pt is damaged": put(flip(x)) for x in (0, 0.1, 0.6, 0.9)},
    **{f"cut {x}: trying the state before it": put(cut(x)) for x in (0.0, 0.5, 0.9999)},
    "without a new flag": with_value(None, "args", "adam_beta2"),
    "another version: torch 1.0": with_value("CPU, 9 threads, torch 1.0", "versions"),
    "missing": put("nothing"),
    "three damaged states": both(put(flip(0.3)), put(cut(0.5), KEPT), put("pipe", OLDER)),
    "a name that is no step": both(put(cut(0.5)), lambda x: (x / "checkpoints/²x.pt").touch()),
    "a list": put([1, 2]),
    "of the other script": with_value("ppo_atari", "script"),
    "a negative step": with_value(-16, "global_step"),
    "without a step": with_value(None, "global_step"),
    "garbage after the events": put(lambda content: content + b"xyz" * 99, "events*"),
    "args.json missing": put("nothing", "args.json"),
    "args.json of another run": put(lambda _: b'{"seed": 9}', "args.json"),
    "diverged.pt": lambda x: (x / "latest.pt").rename(x / "checkpoints" / "diverged.pt"),
}
OTHER_KEYS = "args agent optimizer envs obs_stats rng versions logs scalars"
REFUSED = {
    "every state is damaged": put(cut(0.5), "**/*.pt"),
    "code in every state": put(Malicious(), "**/*.pt"),
    **{f"without {key}": with_value(None, key) for key in OTHER_KEYS.split()},
    "a flag that is gone: save_patience": with_value(30.0, "args", "save_patience"),
    "another layer: networks": with_value(torch.zeros(2), "agent", "norm"),
    "a width that is none": with_value(8.0, "args", "width"),
    "a policy that is none": with_value("x", "args", "policy"),
    "moments of no dict": with_value([1], "optimizer"),
    "a generator that is none": with_value(torch.zeros(3), "rng"),
    "a step within an iteration": with_value(7, "global_step"),
    "a log of another folder": with_value({"../user.txt": [0, 0]}, "logs"),
    "bit flipped in the events": put(flip(0.4), "events*"),
    "events missing": put("nothing", "events*"),
    f"a link: {EVENTS}": lambda x: (x / EVENTS).symlink_to(x.parent / "user.txt"),
    f"a pipe: {EVENTS}": lambda x: os.mkfifo(x / EVENTS),
}


@pytest.mark.parametrize("name", COSTS_NOTHING)
def test_what_is_damaged_costs_nothing(half, finished, name):
    """The run continues from the newest good state to the identical end."""
    COSTS_NOTHING[name](half)
    said = fine(resume(half)).stderr
    assert name.partition(": ")[2] in said and "Traceback" not in said
    assert same_weights(half, finished()) and same_scalars(half, finished())


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_continued_is_refused_and_nothing_changed(half, tmp_path, name):
    (tmp_path / "user.txt").write_text("mine")
    REFUSED[name](half)
    before = contents(tmp_path)
    assert name.partition(": ")[2] in one_line(resume(half), 2)
    assert contents(tmp_path) == before


# Forks


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
        run_dir = tmp_path / f"fork{step}"
        said = fine(fork(run_dir, steps[step], script=script)).stderr
        assert str(steps[step]) in said and f"step {step}" in said
        assert same_weights(run_dir, parent)
        assert later(run_dir, step) == later(parent, step)
        assert step == 0 or later(run_dir, -1) == later(run_dir, step)
        assert list(checkpoints(run_dir)) == [x for x in steps if x >= step]
        args = read_args(run_dir)
        assert (args["fork_from"], args["fork_step"]) == (str(steps[step]), step)
        assert args["total_timesteps"] == max(steps)


@pytest.mark.parametrize(
    "more",
    [
        "--learning-rate 1e-3",
        "--adam-beta2 0.9",
        "--seed 7",
        "--num-envs 3 --num-steps 20",
        "--total-timesteps 768",
        "--policy gaussian --pfo-coef 10",
    ],
)
def test_another_flag_acts_in_a_fork(finished, tmp_path, more):
    run_dir = tmp_path / "fork"
    said = fine(fork(run_dir, checkpoints(finished())[256], more)).stderr
    given = [word.strip("-").replace("-", "_") for word in more.split() if "--" in word]
    assert "step 256" in said and f"{given[0]} " in said
    args, before = read_args(run_dir), read_args(finished())
    changed = {name for name in args if args[name] != before[name]}
    assert changed - {"run_name"} == {*given, "runs_dir", "fork_from", "fork_step"}
    scalars = read_scalars(run_dir)
    assert min(step for points in scalars.values() for step, _ in points) > 256
    assert scalars["charts/learning_rate"][0][1] == pytest.approx(args["learning_rate"])
    total = args["total_timesteps"]
    assert total - 64 < max(checkpoints(run_dir)) <= total
    assert not same_weights(run_dir, finished())


@pytest.mark.parametrize("script, batch", [("ppo_mujoco", 40), ("ppo_atari", 120)])
def test_a_fork_with_another_batch_counts_from_its_own_step(finished, tmp_path, script, batch):
    """SB3#978, #1150: of a finished run, too. It anneals as if it had always been so."""
    run_dir, end = tmp_path / "fork", max(checkpoints(finished(script)))
    more = "--total-timesteps 1500 --num-steps 20 --anneal-lr --log-interval 0.001"
    fine(fork(run_dir, finished(script) / "latest.pt", f"{more} --capacity-interval 0", script))
    steps, rates = zip(*read_scalars(run_dir)["charts/learning_rate"])
    assert list(steps) == list(range(end + batch, 1501, batch))
    assert max(checkpoints(run_dir)) == steps[-1]
    rate = read_args(run_dir)["learning_rate"]
    assert rates == pytest.approx([rate * (1 - (step - batch) / 1500) for step in steps])


@pytest.mark.parametrize(
    "more", ["--width 32", "--env-id HalfCheetah-v4", "--share-trunk", "--total-timesteps 256"]
)
def test_what_does_not_fit_a_fork_is_refused(finished, tmp_path, more):
    line = one_line(fork(tmp_path / "fork", checkpoints(finished())[256], more), 2)
    assert more.split()[0].strip("-") in line.replace("_", "-") and not list(tmp_path.iterdir())


def test_a_fork_continues_from_its_own_state_and_is_forked(finished, tmp_path):
    parent = checkpoints(finished())[128]
    whole, again, more = tmp_path / "fork", tmp_path / "again", "--learning-rate 1e-3"
    fine(fork(whole, parent, more))
    for name, command in (("a", ""), ("b", f"--fork-from {parent} {more}")):
        run_dir = shutil.copytree(whole, tmp_path / name)
        cut_back(run_dir, 256)
        fine(resume(run_dir, command))
        assert_same(run_dir, whole)
    parent_of_again = checkpoints(whole)[384]
    fine(fork(again, parent_of_again))
    assert same_weights(again, whole)
    args = read_args(again)
    assert args["fork_from"] == str(parent_of_again) and args["fork_step"] == 384
    assert args["learning_rate"] == 1e-3
    # --resume with --fork-from where there is no such run yet starts the fork
    fine(resume(tmp_path / "new", f"--fork-from {parent} {more}"))
    assert same_weights(tmp_path / "new", whole)


# Faults: one message, the right exit code, and the run continues identically

ROLLOUT, UPDATE = "gymnasium.wrappers:TimeLimit.step", "torch.optim:Adam.step"
FAULTS = {  # what happens at which call -> exit code, what it says
    "a full disk": (fault_at("os:fsync", 9, "disk full"), 1, "No space left"),
    "a full disk in the log": (fault_at("os:fsync", 8, "disk full"), 1, "No space left"),
    "a disk that fails": (fault_at("os:replace", 5, "input/output"), 1, "Input/output error"),
    "Ctrl-C in the update": (fault_at(UPDATE, 40, "SIGINT"), 130, "interrupted"),
    "Ctrl-C in saving": (fault_at("os:fsync", 9, "SIGINT"), 130, "interrupted"),
    "out of memory": (fault_at(UPDATE, 40, "out of memory"), 1, "--minibatch-size"),
    "out of CPU memory": (fault_at(UPDATE, 40, "out of CPU memory"), 1, "--minibatch-size"),
    "SIGTERM": (fault_at(UPDATE, 40, "SIGTERM"), -signal.SIGTERM, ""),
    "SIGHUP": (fault_at(ROLLOUT, 400, "SIGHUP"), -signal.SIGHUP, ""),
}
ON_ATARI = ("a full disk", "Ctrl-C in the update", "SIGTERM")
CASES = [("ppo_mujoco", name) for name in FAULTS] + [("ppo_atari", name) for name in ON_ATARI]


@pytest.mark.parametrize("script, name", CASES)
def test_a_fault_ends_the_run_and_resuming_gives_the_identical_one(
    finished, tmp_path, script, name
):
    fault, code, says = FAULTS[name]
    run_dir = tmp_path / "run"
    process = start(run_dir, script=script, prepare=fault)
    assert process.returncode == code and "Traceback" not in process.stderr
    if code > 0:
        line = one_line(process, code)
        assert says in line and "--resume" in line
    assert (run_dir / "latest.pt").exists()
    fine(resume(run_dir, script=script))
    assert_same(run_dir, finished(script))


def test_the_advice_is_a_command_that_continues_the_run(finished, tmp_path):
    """Also if names have blanks in them."""
    fault = fault_at("os:replace", 6, "disk full")
    words = [*SMALL["ppo_mujoco"].split(), "--runs-dir", "my runs", "--run-name", "a 'b' c"]
    line = one_line(call("ppo_mujoco", words, cwd=tmp_path, prepare=fault), 1)
    script, *words = shlex.split(re.search("python (.* --resume)", line)[1])
    assert script == "ppo_mujoco.py"
    fine(call("ppo_mujoco", words, cwd=tmp_path))
    assert_same(tmp_path / "my runs" / "a 'b' c", finished())


def test_a_file_that_can_only_be_written_in_part(finished, tmp_path):
    """What is written of a state never takes the place of a complete one."""
    run_dir = tmp_path / "run"
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
    assert "File too large" in one_line(start(run_dir, prepare=limit), 1)
    assert all(not zipfile.ZipFile(path).testzip() for path in tmp_path.rglob("*.pt"))
    fine(start(run_dir, "--resume"))
    assert_same(run_dir, finished())


def test_a_folder_that_vanishes(tmp_path):
    """TensorBoard's writer, a thread, says nothing on its own."""
    run_dir = tmp_path / "run"
    words = f"{SMALL['ppo_mujoco']} {name_of(run_dir)} --total-timesteps 200000"
    process = Process("ppo_mujoco", f"{words} --checkpoint-interval 1")
    process.wait_until(lambda: checkpoints(run_dir) and "192/" in process.read("stderr"))
    shutil.rmtree(run_dir.rename(tmp_path / "gone"))  # at once, for who writes there
    assert "No such file or directory" in message(process.wait(), 1)


def test_a_folder_that_vanishes_between_the_writes_of_two_event_files(half):
    fault = fault_at("os:fsync", 6, functools.partial(shutil.rmtree, half))
    assert "No such file or directory" in message(resume(half, prepare=fault), 1)


def test_a_second_process_is_refused(half):
    first = Process("ppo_mujoco", f"{name_of(half)} --resume --total-timesteps 100000")
    first.wait_until(lambda: len(list(half.glob("events*"))) > 1)
    second = resume(half)
    running = first.running()
    first.send(signal.SIGTERM)
    first.wait()
    assert running and "another process" in one_line(second, 2)


def test_two_processes_that_start_one_run(run, tmp_path, monkeypatch, capsys):
    """The second one saw no folder before the first one made it."""
    (tmp_path / "run").mkdir()
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: path.name != "run" and exists(path))
    with pytest.raises(SystemExit) as stop:
        run("ppo_mujoco")
    assert stop.value.code == 2 and "another process" in capsys.readouterr().err
    assert not list((tmp_path / "run").iterdir())

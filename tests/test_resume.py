"""A run that is killed and resumed is, bit for bit, the run that was never killed; forks; and
damaged files."""

import collections
import functools
import json
import os
import random
import shutil
import signal
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import (
    SMALL,
    Process,
    call,
    checkpoints,
    fault_at,
    final_weights,
    read_scalars,
    same_scalars,
    same_weights,
)
from tensorboard.compat.proto.event_pb2 import Event

SCRIPTS = ("ppo_mujoco", "ppo_atari")
EVERY = "--checkpoint-interval 0.125"  # a state after each of the 8 iterations


def flags(folder, name, more=""):
    return f"--runs-dir {folder} --run-name {name} {more}"


def start(script, folder, name, more="", **kwargs):
    """A small run from its beginning to its end."""
    return call(script, f"{SMALL[script]} {EVERY} {flags(folder, name, more)}", **kwargs)


def resume(script, folder, name, more="", **kwargs):
    """The same run goes on: its name is enough."""
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


def contents(folder):
    """{path: bytes} of all that is in a folder, its lock aside, and args.json, which tells a
    renamed run its name."""
    paths = (path for path in folder.rglob("*") if path.name not in (".lock", "args.json"))
    return {path: path.read_bytes() if path.is_file() else None for path in paths}


def message(process, code):
    """The one line in which a process said why it ended with `code`."""
    assert process.returncode == code, (process.returncode, process.stderr)
    assert "Traceback" not in process.stderr, process.stderr
    lines = process.stderr.replace("\r", "\n").splitlines()
    (line,) = (line for line in lines if "error: " in line)
    return line


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
    points = [{key: n for key, n in x.items() if "text_summary" not in key[0]} for x in counts]
    assert set(points[0].values()) == {1} and points[0] == points[1]
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole("ppo_mujoco"): a run that was never killed, made once."""

    @functools.cache
    def whole(script="ppo_mujoco", more=""):
        folder = tmp_path_factory.mktemp("whole")
        process = start(script, folder, "whole", more)
        assert process.returncode == 0, process.stderr
        return folder / "whole"

    return whole


@pytest.fixture
def half(whole, tmp_path):
    """half(): a copy of that run as it was in the middle."""

    def half(script="ppo_mujoco", name="run", step=None):
        run_dir = tmp_path / name
        shutil.copytree(whole(script), run_dir)
        cut_back(run_dir, step or sorted(checkpoints(run_dir))[2])
        return run_dir

    return half


# Where to kill: the n-th call of a function, n up to what two iterations and the start take
PLACES = {
    "in the rollout": ("ppo_mujoco", "gymnasium.wrappers:TimeLimit.step", 200),
    "on Atari in the rollout": ("ppo_atari", "ale_py.vector_env:AtariVectorEnv.step", 40),
    "in the update or a capacity fit": ("", "torch.optim:Adam.step", 16),
    "in saving, before the disk has it": ("", "os:fsync", 6),
    "in saving, before the new name": ("", "os:replace", 3),
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
def test_killed_and_resumed_is_never_killed(whole, tmp_path, script, more):
    """kill -9 in every part of a run, and in its first save."""
    rng, killed = random.Random(more), 0
    places = [place[1:] for place in PLACES.values() if place[0] in ("", script)]
    first = start(script, tmp_path, "run", more, prepare=fault_at("os:replace", 1))
    assert first.returncode == -signal.SIGKILL
    for kill in range(KILLS if not more else KILLS // 2):
        name, most = places[kill % len(places)] if kill < len(places) else rng.choice(places)
        # the start was killed before it had a state: it starts again
        words = (
            f"{SMALL[script]} {EVERY} {more}" if not (tmp_path / "run/latest.pt").exists() else ""
        )
        prepare = fault_at(name, rng.randint(1, most))
        process = resume(script, tmp_path, "run", words, prepare=prepare)
        assert process.returncode in (0, -signal.SIGKILL), process.stderr
        killed += process.returncode != 0
    assert killed >= 3
    finished = resume(script, tmp_path, "run")
    assert finished.returncode == 0, finished.stderr
    assert_same(tmp_path / "run", whole(script, more))
    again = resume(script, tmp_path, "run")  # a run that is finished stays as it is
    assert again.returncode == 0, again.stderr
    assert_same(tmp_path / "run", whole(script, more))


def test_killed_in_the_replay_of_its_episodes(half, whole):
    run_dir = half()
    before = contents(run_dir)
    state = torch.load(run_dir / "latest.pt", weights_only=True)
    replayed = sum(map(len, state["envs"]["actions"]))
    assert replayed > 1
    fault = fault_at("gymnasium.wrappers:TimeLimit.step", replayed // 2 + 1)
    process = resume("ppo_mujoco", run_dir.parent, "run", prepare=fault)
    assert process.returncode == -signal.SIGKILL and contents(run_dir) == before
    assert resume("ppo_mujoco", run_dir.parent, "run").returncode == 0
    assert_same(run_dir, whole())


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_copied_or_renamed_run_goes_on(half, whole, script):
    run_dir = half(script, "renamed")
    process = resume(script, run_dir.parent, "renamed")
    assert process.returncode == 0, process.stderr
    assert_same(run_dir, whole(script))
    args = json.loads((run_dir / "args.json").read_text())
    assert args["run_name"] == "renamed" and args["runs_dir"] == str(run_dir.parent)


def test_a_flag_that_the_saved_run_did_not_know_has_its_default(half, whole):
    run_dir = half()
    edit(run_dir / "latest.pt", lambda state: state["args"].pop("adam_beta2"))
    assert resume("ppo_mujoco", run_dir.parent, "run").returncode == 0
    assert_same(run_dir, whole())
    assert json.loads((run_dir / "args.json").read_text())["adam_beta2"] == 0.999


def test_a_flag_that_is_gone_is_named(half):
    run_dir = half()
    edit(run_dir / "latest.pt", lambda state: state["args"].update(save_patience=30.0))
    before = contents(run_dir)
    assert "save_patience" in message(resume("ppo_mujoco", run_dir.parent, "run"), 2)
    assert contents(run_dir) == before


@pytest.mark.parametrize("other", ["--seed 5 --pfo-coef 1", "--learning-rate 1e-3", "--width 32"])
def test_a_flag_that_differs_is_refused_and_listed(half, other):
    run_dir = half()
    before = contents(run_dir)
    line = message(resume("ppo_mujoco", run_dir.parent, "run", other + " --log-interval 0.5"), 2)
    for flag in other.split()[::2]:
        assert flag.strip("-").replace("-", "_") in line.replace("-", "_")
    assert contents(run_dir) == before


def test_resume_starts_a_run_that_does_not_exist_and_says_so(whole, tmp_path):
    process = start("ppo_mujoco", tmp_path, "new", "--resume")
    assert process.returncode == 0 and "no state" in process.stderr
    assert_same(tmp_path / "new", whole())


def test_a_longer_run_goes_on_from_a_finished_one(whole, tmp_path):
    assert start("ppo_mujoco", tmp_path, "run", "--total-timesteps 256").returncode == 0
    process = resume("ppo_mujoco", tmp_path, "run", "--total-timesteps 512")
    assert process.returncode == 0, process.stderr
    assert same_weights(tmp_path / "run", whole())
    process = start("ppo_mujoco", tmp_path, "annealed", "--anneal-lr --total-timesteps 256")
    assert process.returncode == 0
    longer = resume("ppo_mujoco", tmp_path, "annealed", "--total-timesteps 512")
    assert "total" in message(longer, 2)  # the learning rates so far would have been others


def test_what_is_other_in_a_resumed_run_is_said_and_only_what_cannot_change_is_refused(half):
    run_dir = half()
    process = resume("ppo_mujoco", run_dir.parent, "run", "--total-timesteps 384 --pfo-coef 3")
    line = message(process, 2)
    assert "pfo_coef 0.0 is now 3.0" in line and "total_timesteps" not in line
    process = resume("ppo_mujoco", run_dir.parent, "run", "--total-timesteps 384")
    assert process.returncode == 0 and "total_timesteps 512 is now 384" in process.stderr


def test_another_version_is_said_and_the_run_goes_on(half):
    run_dir = half()
    edit(run_dir / "latest.pt", lambda state: state.update(versions="CPU, 9 threads, torch 1.0"))
    process = resume("ppo_mujoco", run_dir.parent, "run")
    assert process.returncode == 0 and "torch 1.0" in process.stderr
    assert max(checkpoints(run_dir)) == 512


# Damaged files: name -> (what is done to the run's folder, "refused", "goes on" or either)


def flip(place, name="latest.pt"):
    """A single bit of a file at this share of its length."""

    def damage(run_dir):
        content = bytearray((run_dir / name).read_bytes())
        content[int(place * (len(content) - 1))] ^= 1 << int(place * 997) % 8
        (run_dir / name).write_bytes(content)

    return damage


def cut(share, name="latest.pt"):
    def damage(run_dir):
        content = (run_dir / name).read_bytes()
        (run_dir / name).write_bytes(content[: int(share * len(content))])

    return damage


def replaced(content, name="latest.pt"):
    """Another file, a folder, a pipe or a state in its place."""

    def damage(run_dir):
        path = run_dir / name
        path.unlink()
        if content == "folder":
            path.mkdir()
        elif content == "fifo":
            os.mkfifo(path)
        elif content == "link":
            path.symlink_to(run_dir / "nowhere")
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)

    return damage


def without(*keys):
    def damage(run_dir):
        edit(run_dir / "latest.pt", lambda state: [state.pop(key) for key in keys])

    return damage


def with_value(value, *keys):
    """The state with another value at state[key][key]..."""

    def change(state):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return lambda run_dir: edit(run_dir / "latest.pt", change)


def events(damage):
    def damage_events(run_dir):
        (path,) = run_dir.glob("events*")
        damage(path)

    return damage_events


def both(*damages):
    return lambda run_dir: [damage(run_dir) for damage in damages]


KEPT = "checkpoints/256.pt"  # the newest one behind latest.pt
DAMAGED = {
    **{f"bit flipped at {x:.4f}": (flip(x), "goes on") for x in [i / 16 for i in range(17)]},
    **{f"cut at {x}": (cut(x), "goes on") for x in (0.0, 0.01, 0.5, 0.99, 0.9999)},
    "text": (replaced(b"not a checkpoint"), "goes on"),
    "zeros": (replaced(bytes(5000)), "goes on"),
    "half a zip": (replaced(b"PK\x03\x04 half a zip"), "goes on"),
    "latest is missing": (lambda run_dir: (run_dir / "latest.pt").unlink(), "goes on"),
    "a folder": (replaced("folder"), "refused"),
    "a pipe": (replaced("fifo"), "goes on"),
    "a link to nowhere": (replaced("link"), "goes on"),
    "two damaged states": (both(flip(0.3), cut(0.5, KEPT)), "goes on"),
    "three damaged states": (
        both(flip(0.3), cut(0.5, KEPT), flip(0.4, "checkpoints/128.pt")),
        "goes on",
    ),
    "a kept pipe": (both(flip(0.3), replaced("fifo", KEPT)), "goes on"),
    "a name that is no step": (
        both(cut(0.5), lambda x: x.joinpath("checkpoints/²x.pt").touch()),
        "goes on",
    ),
    "every state is damaged": (
        lambda run_dir: [cut(0.5, path)(run_dir) for path in run_dir.rglob("*.pt")],
        "refused",
    ),
    "an empty dict": (replaced({}), "refused"),
    "a list": (replaced([1, 2]), "refused"),
    "a tensor": (replaced(torch.zeros(3)), "refused"),
    "a foreign dict": (replaced({"state_dict": {}, "epoch": 3}), "refused"),
    "weights alone": (replaced({"agent": {"x": torch.zeros(2)}}), "refused"),
    "of the other script": (with_value("ppo_atari", "script"), "refused"),
    **{
        f"without {key}": (without(key), "refused")
        for key in (
            "script",
            "args",
            "agent",
            "optimizer",
            "envs",
            "obs_stats",
            "global_step",
            "rng",
        )
        + ("versions", "log_sizes", "scalars")
    },
    "args of no dict": (with_value(3, "args"), "refused"),
    "a task that is none": (with_value("NoTask-v0", "args", "env_id"), "refused"),
    "another width": (with_value(7, "args", "width"), "refused"),
    "a width that is none": (with_value("abc", "args", "width"), "refused"),
    "another shape": (with_value(torch.zeros(3), "agent", "actor_head.bias"), "refused"),
    "weights of no dict": (with_value([1], "agent"), "refused"),
    "moments of no dict": (with_value([1], "optimizer"), "refused"),
    "a generator that is none": (with_value(torch.zeros(3), "rng"), "refused"),
    "environments of no dict": (with_value([], "envs"), "refused"),
    "environments without seeds": (with_value({"rngs": []}, "envs"), "refused"),
    "statistics without a mean": (with_value({}, "obs_stats"), "refused"),
    "a step that is none": (with_value("x", "global_step"), "refused"),
    "events cut": (events(lambda x: os.truncate(x, 500)), "refused"),
    "events missing": (events(lambda x: x.unlink()), "refused"),
    "events empty": (events(lambda x: os.truncate(x, 0)), "refused"),
    "garbage after the events": (
        events(lambda x: x.write_bytes(x.read_bytes() + b"xyz" * 99)),
        "goes on",
    ),
    "a foreign event file": (
        lambda x: (x / "events.out.tfevents.0.x").write_bytes(b"xyz"),
        "goes on",
    ),
    "args.json damaged": (lambda x: (x / "args.json").write_text('{"seed'), "goes on"),
    "args.json empty": (lambda x: (x / "args.json").write_text(""), "goes on"),
    "args.json missing": (lambda x: (x / "args.json").unlink(), "goes on"),
    "args.json of another run": (lambda x: (x / "args.json").write_text('{"seed": 9}'), "goes on"),
    "a leftover of a save": (lambda x: (x / "latest.pt.tmp").write_bytes(b"half"), "goes on"),
    "diverged.pt is never gone on from": (
        lambda x: (x / "latest.pt").rename(x / "checkpoints" / "diverged.pt"),
        "goes on",
    ),
}


@pytest.mark.parametrize("damage, right", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_refused_or_costs_nothing(half, whole, damage, right):
    """Refused in one line, nothing changed; or the run goes on from the newest good state to the
    identical end. Never other results, a traceback, a hang."""
    run_dir = half()
    damage(run_dir)
    before = contents(run_dir)
    process = resume("ppo_mujoco", run_dir.parent, "run")
    if right == "refused":
        message(process, 2)
        assert contents(run_dir) == before
    else:
        assert process.returncode == 0, process.stderr
        assert "Traceback" not in process.stderr
        assert same_weights(run_dir, whole()) and same_scalars(run_dir, whole())


def test_the_table_is_large():
    assert len(DAMAGED) >= 40


def test_what_is_damaged_is_named_and_what_takes_its_place(half):
    run_dir = half()
    flip(0.37)(run_dir)
    said = resume("ppo_mujoco", run_dir.parent, "run").stderr
    assert "latest.pt is damaged" in said and "goes on from the state before it" in said


def test_a_malicious_checkpoint_is_not_executed(half):
    run_dir = half()
    for path in run_dir.rglob("*.pt"):
        torch.save({"args": Malicious(run_dir / "executed")}, path)
    message(resume("ppo_mujoco", run_dir.parent, "run"), 2)
    assert not (run_dir / "executed").exists()


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


# Forks


def fork(script, folder, name, parent, more="", **kwargs):
    return call(script, flags(folder, name, f"--fork-from {parent} {more}"), **kwargs)


def later(run_dir, step):
    """The points of a run after a step, its speed aside; those since the last log are a mean."""
    scalars = {k: [x for x in points if x[0] > step] for k, points in read_scalars(run_dir).items()}
    return repr(sorted((k, x) for k, x in scalars.items() if k != "charts/SPS" and x))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_fork_with_nothing_changed_is_the_continuation(whole, tmp_path, script):
    """Of every kept checkpoint: each is a whole state."""
    parent = whole(script)
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
        "--adam-beta1 0.5",
        "--adam-beta2 0.9",
        "--seed 7",
        "--num-envs 3 --num-steps 20",
        "--num-envs 1 --num-steps 64",
        "--action-logprob sampled",
        "--update-epochs 3",
        "--total-timesteps 768",
        "--reset-adam",
        "--pfo-coef 10",
        "--anneal-lr",
        "--clip-coef 0.05",
        "--gamma 0.5",
        "--reward-keep-prob 0.3",
        "--time-limit bootstrap --max-grad-norm 0.1",
    ],
)
def test_another_flag_acts_in_a_fork(whole, tmp_path, more):
    parent = tmp_path / "parent.pt"
    shutil.copy(checkpoints(whole())[256], parent)
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
    args, before = (json.loads((x / "args.json").read_text()) for x in (run_dir, whole()))
    assert args["fork_step"] == 256 and args["fork_from"] == str(parent)
    changed = {name for name in args if args[name] != before[name]} - {"runs_dir", "run_name"}
    given = {word.strip("-").replace("-", "_") for word in more.split() if word.startswith("--")}
    assert changed - {"fork_from", "fork_step"} == given
    if "learning-rate" in more:
        assert scalars["charts/learning_rate"][0][1] == pytest.approx(1e-3)
    if "anneal" in more:  # follows the fork's own total: iterations 5 to 8 of 8
        rates = [x for _, x in scalars["charts/learning_rate"]]
        assert rates == pytest.approx([3e-4 * (8 - i) / 8 for i in range(4, 8)])
    other = tmp_path / "same" if "logprob" in more else whole()
    assert total > 512 or not same_weights(run_dir, other)


@pytest.mark.parametrize(
    "more, says",
    [
        ("--width 32", "width"),
        ("--env-id HalfCheetah-v4", "env_id"),
        ("--share-trunk", "share_trunk"),
        ("--policy-std free", "policy_std"),
        ("--total-timesteps 256", "--total-timesteps"),
        ("--learning-rate x", "--learning-rate"),
    ],
)
def test_what_does_not_fit_a_fork_is_refused(whole, tmp_path, more, says):
    process = fork("ppo_mujoco", tmp_path, "fork", checkpoints(whole())[256], more)
    assert process.returncode == 2 and says in process.stderr, process.stderr
    assert "Traceback" not in process.stderr and not list(tmp_path.iterdir())


def test_a_parent_that_is_damaged_or_none_is_refused(whole, half, tmp_path):
    parents = {"missing": tmp_path / "missing.pt", "a folder": tmp_path}
    for name, damage in {
        "flipped": flip(0.4, "latest.pt"),
        "cut": cut(0.7),
        "empty": replaced({}),
        "other": with_value("ppo_atari", "script"),
        "pipe": replaced("fifo"),
    }.items():
        damage(half(name=name))
        parents[name] = tmp_path / name / "latest.pt"
    for name, parent in parents.items():
        message(fork("ppo_mujoco", tmp_path, "fork", parent), 2)
        assert not (tmp_path / "fork").exists(), name


def test_a_fork_goes_on_from_its_own_state_and_is_forked(whole, tmp_path):
    parent = checkpoints(whole())[128]
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


# Faults: one message, the right exit code, and the run goes on identically

FAULTS = {  # what happens at which call -> exit code, what it says
    "a full disk": (fault_at("os:fsync", 9, "disk full"), 1, "No space left"),
    "a full disk in the log": (fault_at("os:fsync", 10, "disk full"), 1, "No space left"),
    "a full disk at a rename": (fault_at("os:replace", 5, "disk full"), 1, "No space left"),
    "a disk that fails": (fault_at("os:replace", 4, "input/output"), 1, "Input/output error"),
    "Ctrl-C in the rollout": (
        fault_at("gymnasium.wrappers:TimeLimit.step", 400, "SIGINT"),
        130,
        "",
    ),
    "Ctrl-C in the update": (fault_at("torch.optim:Adam.step", 40, "SIGINT"), 130, ""),
    "Ctrl-C in saving": (fault_at("os:fsync", 9, "SIGINT"), 130, ""),
    "out of memory": (
        fault_at("torch.optim:Adam.step", 40, "out of memory"),
        1,
        "--minibatch-size",
    ),
    "SIGTERM": (fault_at("torch.optim:Adam.step", 40, "SIGTERM"), -signal.SIGTERM, None),
    "SIGTERM in saving": (fault_at("os:replace", 5, "SIGTERM"), -signal.SIGTERM, None),
    "SIGHUP": (fault_at("gymnasium.wrappers:TimeLimit.step", 400, "SIGHUP"), -signal.SIGHUP, None),
}


@pytest.mark.parametrize("fault, code, says", FAULTS.values(), ids=FAULTS)
def test_a_fault_ends_the_run_and_resuming_gives_the_identical_one(
    whole, tmp_path, fault, code, says
):
    process = start("ppo_mujoco", tmp_path, "run", prepare=fault)
    if says is None:
        assert process.returncode == code and "Traceback" not in process.stderr
    else:
        line = message(process, code)
        assert says in line and (says.startswith("--") or "--resume" in line)
    assert (tmp_path / "run" / "latest.pt").exists()
    assert resume("ppo_mujoco", tmp_path, "run").returncode == 0
    assert_same(tmp_path / "run", whole())


@pytest.mark.parametrize("script", SCRIPTS[1:])
@pytest.mark.parametrize("name", ["a full disk", "Ctrl-C in the update", "SIGTERM"])
def test_a_fault_on_atari(whole, tmp_path, script, name):
    fault, code, says = FAULTS[name]
    process = start(script, tmp_path, "run", prepare=fault)
    assert process.returncode == code if says is None else says in message(process, code)
    assert resume(script, tmp_path, "run").returncode == 0
    assert_same(tmp_path / "run", whole(script))


def limit_file_size(size=100_000):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_file_that_can_only_be_written_in_part(whole, tmp_path):
    """What is written of a state never takes the place of a whole one."""
    line = message(start("ppo_mujoco", tmp_path, "run", prepare=limit_file_size), 1)
    assert "File too large" in line
    assert all(not zipfile.ZipFile(path).testzip() for path in tmp_path.rglob("*.pt"))
    process = start("ppo_mujoco", tmp_path, "run", "--resume")
    assert process.returncode == 0
    assert_same(tmp_path / "run", whole())


def test_a_full_disk_that_is_real(tmp_path, whole):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=700k tmpfs {disk} 2> /dev/null"):
        pytest.skip("no right to mount")
    try:
        line = message(start("ppo_mujoco", disk, "run"), 1)
        assert "No space left on device" in line and "--resume" in line
        shutil.copytree(disk / "run", tmp_path / "run")
    finally:
        os.system(f"umount {disk}")
    process = resume("ppo_mujoco", tmp_path, "run")
    assert process.returncode == 0, process.stderr
    assert same_weights(tmp_path / "run", whole()) and same_scalars(tmp_path / "run", whole())


@pytest.mark.parametrize("first", ["the state", "the log"])
def test_a_folder_that_vanishes(tmp_path, first):
    """Whichever finds it missing: TensorBoard's writer, a thread, says nothing on its own."""
    words = f"{SMALL['ppo_mujoco']} {flags(tmp_path, 'run', '--total-timesteps 200000')}"
    interval = {"the state": 0.001, "the log": 1}[first]
    process = Process("ppo_mujoco", words + f" --checkpoint-interval {interval}")
    process.wait_until(lambda: checkpoints(tmp_path / "run") and "192/" in process.read("stderr"))
    shutil.rmtree((tmp_path / "run").rename(tmp_path / "gone"))  # at once, for who writes there
    assert "No such file or directory" in message(process.wait(), 1)


@pytest.mark.parametrize("failure", ["raise", "reset"])
def test_a_task_that_crashes_is_named_and_the_run_goes_on(tmp_path, failure):
    more = "--env-id probe_envs:Broken-v0 --capacity-interval 0"
    assert start("ppo_mujoco", tmp_path, "whole", more).returncode == 0
    crash = functools.partial(break_task, 300, failure)
    crashed = start("ppo_mujoco", tmp_path, "run", more, prepare=crash)
    assert crashed.returncode == 1, crashed.stderr
    (line,) = (x for x in crashed.stderr.replace("\r", "\n").splitlines() if "error: " in x)
    for word in ("the joint came off", "environment ", "episode seed ", "step ", "--resume"):
        assert word in line  # the task's own traceback may stand before it
    assert resume("ppo_mujoco", tmp_path, "run").returncode == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


def break_task(step, failure):
    import probe_envs

    probe_envs.Broken.fail_at, probe_envs.Broken.failure = step, failure


def test_parameters_that_are_not_finite_end_the_run(tmp_path):
    more = "--env-id probe_envs:Broken-v0 --capacity-interval 0"
    nan = functools.partial(break_task, 300, "nan")
    line = message(start("ppo_mujoco", tmp_path, "run", more, prepare=nan), 1)
    assert "not finite" in line and "observations" in line and "diverged.pt" in line
    diverged = torch.load(tmp_path / "run" / "checkpoints" / "diverged.pt", weights_only=True)
    assert not all(p.isfinite().all() for p in diverged["agent"].values())
    latest = torch.load(tmp_path / "run" / "latest.pt", weights_only=True)
    assert latest["global_step"] < diverged["global_step"]
    assert all(p.isfinite().all() for p in latest["agent"].values())
    assert all(p.isfinite().all() for p in final_weights(tmp_path / "run").values())
    points = read_scalars(tmp_path / "run")["representation/actor/pca_rank"]
    assert points[0][1] > 0 and points[-1][1] != points[-1][1]  # NaN at the end
    assert start("ppo_mujoco", tmp_path, "whole", more).returncode == 0
    assert resume("ppo_mujoco", tmp_path, "run").returncode == 0  # by a task that is mended
    assert same_weights(tmp_path / "run", tmp_path / "whole")


def test_a_second_process_is_refused(half):
    run_dir = half()
    words = flags(run_dir.parent, "run", "--resume --total-timesteps 100000")
    first = Process("ppo_mujoco", words)
    first.wait_until(lambda: len(list(run_dir.glob("events*"))) > 1)
    second = resume("ppo_mujoco", run_dir.parent, "run")
    running = first.running()
    first.send(signal.SIGTERM)
    first.wait()
    assert running and "another process" in message(second, 2)


def test_two_processes_that_start_one_run(tmp_path):
    """The second one saw no folder before the first one made it."""
    (tmp_path / "run").mkdir()
    process = start("ppo_mujoco", tmp_path, "run", prepare=see_no_folder)
    assert "another process" in message(process, 2)
    assert not list((tmp_path / "run").iterdir())


def see_no_folder():
    exists = Path.exists
    Path.exists = lambda self: self.name != "run" and exists(self)


@pytest.mark.parametrize("script", ("ppo_mujoco", "ppo_atari", "ppo_toy"))
def test_out_of_memory_gives_advice(script):
    process = call(script, "", prepare=fault_at("tyro:cli", 1, "out of memory"))
    assert "--minibatch-size" in message(process, 1)

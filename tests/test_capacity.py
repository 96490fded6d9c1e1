"""capacity.py: the run's own curve again, its options, odd files, and going on after a fault."""

import copy
import importlib
import json
import math
import os
import shutil
import sys

import filelock
import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SMALL,
    Malicious,
    call,
    checkpoints,
    fault_at,
    fine,
    one_line,
    read_scalars,
)
from gymnasium.envs.classic_control import CartPoleEnv

import capacity
import ppo_mujoco

NAMES = ("actor", "critic", "actor_last_minibatch", "critic_last_minibatch")
TOY = "ppo_toy"  # whose runs take a moment


@pytest.fixture
def copied(finished, tmp_path):
    """copied(name, script, flags): such a run's copy of its own in a folder of runs."""

    def copied(name="run", script=TOY, flags=""):
        return shutil.copytree(finished(script, flags), tmp_path / "runs" / name)

    return copied


@pytest.fixture
def measure(monkeypatch):
    """measure(run_dir, ..., flag, ...): capacity.py, and the results of the last run named."""

    def measure(*arguments):
        monkeypatch.setattr(sys, "argv", ["capacity.py", *map(str, arguments)])
        capacity.main()
        args = capacity.tyro.cli(capacity.Args)
        return read_results(args.runs[-1], args.settings())

    return measure


@pytest.fixture
def errors(measure, capsys):
    """errors(run_dir, ...): the lines that capacity.py ends with, without "error: "."""

    def errors(*arguments):
        with pytest.raises(SystemExit) as stop:
            measure(*arguments)
        assert stop.value.code == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        lines = [line for line in said.replace("\r", "\n").splitlines() if "capacity.py: " in line]
        assert all("capacity.py: error: " in line for line in lines), lines
        return [line.partition("error: ")[2] for line in lines]

    return errors


def read_results(run_dir, settings="default"):
    return json.loads((run_dir / f"capacity-{settings}" / "results.json").read_text())


def put(run_dir, text, settings="default"):
    """Bytes as the run's results.json, and its path."""
    path = run_dir / f"capacity-{settings}" / "results.json"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text)
    return path


# The run's own curve


@pytest.mark.parametrize(
    "script, flags",
    [
        ("ppo_mujoco", "--activation relu --share-trunk --capacity-data initial --seed 3"),
        ("ppo_atari", ""),
        (TOY, ""),
        (TOY, "--capacity-data initial --learning-rate 0.003 --adam-beta2 0.9"),
    ],
)
def test_the_defaults_give_the_run_its_own_curve(copied, measure, script, flags):
    run_dir = copied("run", script, flags)
    inline, results = read_scalars(run_dir), measure(run_dir)
    assert results.keys() == {"0"} and len(results["0"]) == 5
    beside = read_scalars(run_dir / "capacity-default")
    for name in NAMES:
        logged = {str(step): value for step, value in inline[f"capacity/{name}"]}
        measured = {k: float(np.float32(x[name])) for k, x in results["0"].items()}  # as in events
        assert measured == logged, name
        assert beside[f"capacity/{name}"] == inline[f"capacity/{name}"]


@pytest.mark.parametrize("data", ["target", "initial"])
def test_a_fork_has_its_own_curve_again(run, measure, data):
    parent = run("ppo_mujoco", f"--capacity-data {data}", name="parent")
    flags = f"--fork-from {parent}/checkpoints/256.pt --seed 5"
    fork = run("ppo_mujoco", flags, name="fork")
    logged, results = read_scalars(fork)["capacity/actor"], measure(fork)["0"]
    assert {step for step, _ in logged} == {384, 512}
    assert all(float(np.float32(results[str(step)]["actor"])) == value for step, value in logged)


def test_the_run_is_left_as_it_was(copied, measure):
    run_dir = copied()
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    measure(run_dir, "--controls")
    assert all(path.read_bytes() == content for path, content in before.items())
    folders = {path.relative_to(run_dir).parts[0] for path in {*run_dir.rglob("*")} - {*before}}
    assert folders == {"checkpoints", "capacity-controls"}
    names = {path.name for path in (run_dir / "capacity-controls").iterdir()}
    assert names == {".lock", "results.json", "events.out.tfevents.capacity"}


def test_runs_with_other_settings_are_measured_one_after_another(copied, measure):
    """Nothing of one run is left for the next."""
    run_dirs = [copied("a"), copied("b", flags="--seed 2 --activation relu")]
    together = measure(*run_dirs), read_results(run_dirs[0])
    for run_dir in run_dirs:
        shutil.rmtree(run_dir / "capacity-default")
    assert together == (measure(run_dirs[1]), measure(run_dirs[0]))


# Options


def test_several_targets_have_a_mean_and_a_spread(copied, measure, capsys):
    run_dir = copied()
    results = measure(run_dir, "--num-targets", 3)
    shown = capsys.readouterr().out
    assert results["0"] == measure(run_dir)["0"]  # the first is the run's own
    assert results["0"] != results["1"] != results["2"]
    values = [results[target]["512"]["actor"] for target in "012"]
    beside = read_scalars(run_dir / "capacity-targets3")
    assert dict(beside["capacity/actor"])[512] == pytest.approx(np.mean(values))
    assert dict(beside["capacity/actor_std"])[512] == pytest.approx(np.std(values, ddof=1))
    assert f"{np.mean(values):.5g} +- {np.std(values, ddof=1):.2g}" in shown


@pytest.mark.parametrize(
    "option", ["--epochs 3", "--learning-rate 0.01", "--data initial", "--data checkpoint"]
)
def test_every_option_acts(copied, measure, option):
    run_dir = copied()
    assert measure(run_dir, *option.split())["0"]["512"] != measure(run_dir)["0"]["512"]


@pytest.mark.parametrize("script", ["ppo_mujoco", TOY])
def test_a_loaded_optimizer_is_the_checkpoints(copied, measure, monkeypatch, script):
    run_dir, module, given = copied("run", script), importlib.import_module(script), []
    fit = module.capacity_loss

    def spy(*args, adam_state=None):
        given.append(copy.deepcopy(adam_state))
        return fit(*args, adam_state=adam_state)

    monkeypatch.setattr(module, "capacity_loss", spy)
    loaded = measure(run_dir, "--optimizer", "loaded")["0"]
    states = [torch.load(path, weights_only=True) for path in checkpoints(run_dir).values()]
    saved = [state["optimizer"]["state"] for state in states]
    torch.testing.assert_close(given, saved, rtol=0, atol=0)
    assert given[0] == {} and {"exp_avg", "exp_avg_sq", "step"} <= given[-1][0].keys()
    fresh = measure(run_dir)["0"]
    assert loaded["0"] == fresh["0"] and loaded["512"] != fresh["512"]


def test_the_controls_tell_what_the_number_is_worth(copied, measure):
    """The fresh network fits as the run's first checkpoint does, heads alone worse than all."""
    run_dir = copied(flags="--capacity-epochs 5 --learning-rate 0.005")
    losses = measure(run_dir, "--controls")["0"]
    first, fresh = losses["0"], losses["fresh"]
    assert fresh["critic"] < 3 * first["critic"] < 9 * fresh["critic"]
    assert fresh["critic"] not in (first["critic"], first["heads_only_critic"])
    assert first["critic"] < first["heads_only_critic"]
    assert {k: losses["512"][k] for k in NAMES} == measure(run_dir)["0"]["512"]
    tags = read_scalars(run_dir / "capacity-controls")
    assert tags["capacity/fresh_critic"] == [(0, np.float32(fresh["critic"]))]
    assert len(tags["capacity/heads_only_actor"]) == 5


@pytest.mark.parametrize("flags", ["", "--share-trunk"])
def test_the_heads_alone_are_fitted_on_frozen_features(copied, measure, monkeypatch, flags):
    run_dir, fitted = copied("run", "ppo_mujoco", flags), []
    make_optimizer = ppo_mujoco.make_optimizer
    spy = lambda agent, args: fitted.append(agent) or make_optimizer(agent, args)  # noqa: E731
    monkeypatch.setattr(ppo_mujoco, "make_optimizer", spy)
    measure(run_dir, "--controls")
    whole, heads = fitted[:2]  # the copies that were fitted
    before = torch.load(run_dir / "checkpoints" / "0.pt", weights_only=True)["agent"]
    for name, weights in before.items():
        assert not torch.equal(whole.state_dict()[name], weights), name
        assert torch.equal(heads.state_dict()[name], weights) == ("trunk" in name), name


@pytest.mark.parametrize(
    "flags, named",
    [
        ("", "runs/NAME"),
        ("runs/run --num-targets 0", "--num-targets"),
        ("runs/run --epochs -1", "--epochs"),
        ("runs/run --learning-rate nan", "--learning-rate"),
        ("runs/run --data mine", "--data"),
        ("runs/run --jobs 2", "--jobs"),
        ("runs/run --cuda", "CUDA device"),
        ("runs", "runs: this is not a run's folder: name runs/NAME"),
        ("runs/run --script nowhere.py", "--script nowhere.py cannot be imported"),
        ("runs/run --script runs/run/args.json", "--script runs/run/args.json cannot be imported"),
    ],
)
def test_a_bad_flag_is_named_and_nothing_is_created(
    copied, measure, monkeypatch, capsys, flags, named
):
    run_dir = copied()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(run_dir.parents[1])
    with pytest.raises(SystemExit) as stop:
        measure(*flags.split())
    said = capsys.readouterr().err
    assert stop.value.code == 2 and named in said and "Traceback" not in said
    assert not list(run_dir.glob("capacity-*"))


# A changed script, and tasks that exit or stay open


def test_a_changed_script_is_used_only_if_it_is_named(copied, measure, errors):
    """A LayerNorm in both trunks; the run that is measured with it was made with it."""
    run_dir, own = copied(), measure(copied("own"))
    path, linear = run_dir / f"{TOY}.py", "nn.Linear(envs.obs_dim, args.width),\n"
    norm = linear + 16 * " " + "nn.LayerNorm(args.width),\n"
    path.write_text(path.read_text().replace(linear, norm))
    fine(call(path.with_suffix(""), f"{SMALL[TOY]} --runs-dir {run_dir} --run-name normed"))
    normed = run_dir / "normed"
    said, script = errors(normed), normed / f"{TOY}.py"
    says = f"its networks differ from those of the script: try --script {script}"
    assert len(said) == 5 and all(says in line for line in said)
    results = measure(normed, "--script", script)["0"]
    logged = read_scalars(normed)["capacity/critic"]
    assert [(int(k), np.float32(x["critic"])) for k, x in results.items()] == logged
    assert measure(run_dir) == own  # by the script beside capacity.py


def test_a_script_measures_only_its_own_runs(copied, errors):
    run_dir = copied()
    said = errors(run_dir, "--script", ROOT / "ppo_mujoco.py")
    assert len(said) == 5 and all("not a checkpoint of ppo_mujoco: " in line for line in said)


def test_a_task_that_exits_is_named_and_all_tasks_are_closed(copied, errors, monkeypatch):
    """CartPole ends the process at the 100th step of the second checkpoint's fit."""
    run_dir, made, closed, steps = copied(), [], [], []
    init, step, close = CartPoleEnv.__init__, CartPoleEnv.step, CartPoleEnv.close

    def counted(env, action):
        steps.append(1)
        if len(steps) == 100:
            sys.exit("enough")
        return step(env, action)

    monkeypatch.setattr(CartPoleEnv, "__init__", lambda *x, **k: made.append(1) or init(*x, **k))
    monkeypatch.setattr(CartPoleEnv, "close", lambda env: closed.append(1) or close(env))
    monkeypatch.setattr(CartPoleEnv, "step", counted)
    [said] = errors(run_dir, "--data", "checkpoint")
    assert "128.pt: " in said and "enough" in said
    assert len(read_results(run_dir, "checkpoint")["0"]) == 4
    assert len(made) == len(closed) == 40  # eight for each checkpoint


# Odd files


def odd_checkpoints(good, state, run_dir):
    """(what the line says, bytes or a state) of files in place of a checkpoint."""

    def flags(**changed):
        return state | {"args": state["args"] | changed}

    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    yield "is damaged", good[: len(good) // 2]
    yield "a checksum is wrong", bytes(flipped)
    yield "is damaged", [1, 2, 3]
    yield "is damaged", state | {"agent": Malicious()}
    yield "of os.py", state | {"script": "os"}
    yield "'script'", {name: state[name] for name in state if name != "script"}
    for part in ("args", "agent", "obs_stats"):
        yield f"KeyError: '{part}'", {name: state[name] for name in state if name != part}
    yield "evil", flags(evil=1)
    yield f"the script: try --script {run_dir}/ppo_toy.py", flags(width=7)
    yield "NoSuchTask", flags(env_id="NoSuchTask-v0")
    yield "--allow-module antigravity", flags(env_id="antigravity:Task-v0")
    yield "--capacity-steps is 1", flags(capacity_steps=1, capacity_interval=0.0)


def test_odd_checkpoints_are_named_and_the_rest_is_done(copied, measure, errors):
    bad, other, odd = copied("bad"), copied("other"), {}
    folder, expected = bad / "checkpoints", measure(copied("good"))["0"]
    good, state = folder / "128.pt", torch.load(folder / "128.pt", weights_only=True)
    cases = odd_checkpoints(good.read_bytes(), state, bad)
    for step, (reason, content) in enumerate(cases, start=1000):
        odd[f"{step}.pt"] = reason
        if isinstance(content, bytes):
            (folder / f"{step}.pt").write_bytes(content)
        else:
            content = content | {"global_step": step} if isinstance(content, dict) else content
            torch.save(content, folder / f"{step}.pt")
    os.mkfifo(folder / "2000.pt")
    (folder / "2001.pt").symlink_to("2001.pt")
    for name in ("2002.pt", "².pt", "best.pt", "-1.pt", "007.pt", f"{'1' * 30}.pt"):
        shutil.copy(good, folder / name)
        odd[name] = "its name is not a step"
    odd |= {"2000.pt": "is not a file", "2001.pt": "is not a file", "2002.pt": "step 128 of"}
    shutil.copy(good, folder / "diverged.pt")  # what a run leaves: nothing is said
    (folder / "5.pt.tmp").write_bytes(b"")
    said = errors(bad, other, "--num-targets", 2)
    assert len(said) == len(odd)
    for name, reason in odd.items():
        [line] = [line for line in said if line.startswith(f"{folder / name}: ")]
        assert reason in line and len(line) < 700, line
    assert "antigravity" not in sys.modules
    assert expected.keys() == {"0", "128", "256", "384", "512"}
    assert read_results(bad, "targets2")["0"] == expected
    assert read_results(bad, "targets2")["1"].keys() == expected.keys()
    assert read_results(other, "targets2")["0"] == expected


ODD_RESULTS = [  # what stands in place of results.json
    "",
    "[]",
    '{"0": {"128": {"actor": 0.5}}}',
    '{"0": {"128": {"actor": true, "critic": 0.5}}}',
    '{"0": {"128": {"actor": NaN, "critic": 0.5}}}',
    '{"0": {"128": {"actor": 0.5, "critic": 0.5, "\\ud800": 0.5}}}',
    '{"1": {"128": {"actor": 0.5, "critic": 0.5}}}',
    '{"0": {"latest": {"actor": 0.5, "critic": 0.5}}}',
]


def test_odd_results_are_named_and_left_and_other_runs_are_done(copied, errors):
    texts = [put(copied(f"odd{i}"), text.encode()) for i, text in enumerate(ODD_RESULTS)]
    fifo, loop = (put(copied(name), b"") for name in ("fifo", "loop"))
    fifo.unlink()
    loop.unlink()
    os.mkfifo(fifo)
    loop.symlink_to("results.json")
    odd, good = [*texts, fifo, loop], copied("good")
    said = errors(*(path.parents[1] for path in odd), good)
    for path, line in zip(odd, said, strict=True):
        assert line.startswith(f"{path.parents[1]}: {path} cannot be used, move it away: "), line
    assert [path.read_text() for path in texts] == ODD_RESULTS
    assert fifo.is_fifo() and loop.is_symlink()
    assert len(read_results(good)["0"]) == 5


def test_folders_that_are_no_runs_are_named(copied, errors, tmp_path):
    good = copied("good")
    runs = good.parent
    (runs / "file").write_text("no run")
    (runs / "diverged" / "checkpoints").mkdir(parents=True)
    shutil.copy(good / "checkpoints" / "0.pt", runs / "diverged" / "checkpoints" / "diverged.pt")
    (copied("results_file") / "capacity-default").write_text("no folder")
    says = dict.fromkeys(("nothing", "file"), "this is not a run's folder: name runs/NAME")
    says |= {"diverged": "it has no checkpoints/STEP.pt", "results_file": "exists"}
    said = errors(*(runs / name for name in says), good)
    for line, (name, reason) in zip(said, says.items(), strict=True):
        assert line.startswith(f"{runs / name}: ") and reason in line, line
    assert len(read_results(good)["0"]) == 5


def test_a_module_is_imported_if_it_is_named(run, measure):
    """probe_envs is found in tests/, as a module of the user's would be."""
    run_dir = run("ppo_mujoco", "--env-id probe_envs:Clock-v0 --capacity-interval 0")
    assert len(measure(run_dir, "--allow-module", "probe_envs")["0"]) == 5


def test_losses_that_are_not_finite_are_null_and_done(copied, measure, monkeypatch):
    run_dir, module = copied(), importlib.import_module(TOY)
    path = run_dir / "checkpoints" / "512.pt"
    state = torch.load(path, weights_only=True)
    state["agent"]["critic_head.weight"][:] = math.nan
    torch.save(state, path)
    losses = measure(run_dir)["0"]["512"]
    assert losses["critic"] is None and losses["actor"] is None or losses["actor"] > 0
    (step, value) = read_scalars(run_dir / "capacity-default")["capacity/critic"][-1]
    assert step == 512 and math.isnan(value)
    monkeypatch.setattr(module, "capacity_loss", None)  # nothing is fitted again
    assert measure(run_dir)["0"]["512"] == losses


# Continuing


def test_what_is_done_is_skipped_and_the_table_shown_again(copied, measure, monkeypatch, capsys):
    module, run_dir = importlib.import_module(TOY), copied()
    whole = measure(run_dir, "--num-targets", 2, "--controls")
    table = capsys.readouterr().out
    assert table.count("\n") == 8 and table.splitlines()[-1].split()[0] == "fresh"
    calls, fit = [], module.capacity_loss
    spy = lambda *args, **kwargs: calls.append(1) or fit(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(module, "capacity_loss", spy)
    assert measure(run_dir, "--num-targets", 2, "--controls") == whole and not calls
    assert capsys.readouterr().out == table
    part = json.loads(json.dumps(whole))
    del part["0"]["512"], part["1"]["0"], part["1"]["fresh"]
    put(run_dir, json.dumps(part).encode(), "targets2-controls")
    assert measure(run_dir, "--num-targets", 2, "--controls") == whole
    assert len(calls) == 5  # two with heads and a fresh network


@pytest.mark.parametrize("function", ["replace", "write_bytes"])
@pytest.mark.parametrize("call", [3, 4])  # the write of a second fit's events, or of its result
def test_a_reader_sees_whole_files_whenever_it_is_interrupted(
    copied, measure, monkeypatch, function, call
):
    """Half of the bytes arrive, and then the process ends. What results.json holds is not done
    again, so the events are there before it."""
    owner = {"replace": capacity.os, "write_bytes": capacity.Path}[function]
    whole_dir, run_dir = copied("whole"), copied("run")
    whole, original, calls = measure(whole_dir), getattr(owner, function), []

    def interrupted(path, content):
        calls.append(1)
        if len(calls) == call:
            if function == "write_bytes":
                original(path, content[: len(content) // 2])
            raise KeyboardInterrupt
        return original(path, content)

    monkeypatch.setattr(owner, function, interrupted)
    for done in range(1, 5):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            measure(run_dir)
        results = read_results(run_dir)["0"]
        assert results.items() <= whole["0"].items() and len(results) == done
        events = read_scalars(run_dir / "capacity-default")["capacity/actor"]
        assert len(events) == done + call - 3
    calls.clear()
    assert measure(run_dir) == whole
    ours, theirs = (read_scalars(x / "capacity-default") for x in (run_dir, whole_dir))
    assert ours == theirs


def test_a_full_disk_is_named_and_other_runs_are_done(copied, errors, monkeypatch):
    full, good, write = copied("full"), copied("good"), capacity.Path.write_bytes

    def full_disk(path, content):
        if "full" in path.parts:
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(capacity.Path, "write_bytes", full_disk)
    [said] = errors(full, good)
    assert said.startswith(f"{full}: ") and "No space left" in said
    assert len(read_results(good)["0"]) == 5


def test_a_second_process_is_refused(copied, measure, errors):
    run_dir, other = copied("run"), copied("other")
    (run_dir / "capacity-default").mkdir()
    with filelock.FileLock(run_dir / "capacity-default" / ".lock"):
        [said] = errors(run_dir, other)
    assert said == f"{run_dir}: another process measures it"
    assert not (run_dir / "capacity-default" / "results.json").exists()
    assert len(read_results(other)["0"]) == len(measure(run_dir)["0"]) == 5


def test_control_c_is_one_line_and_the_same_command_continues(copied, measure):
    run_dir = copied()
    prepare = fault_at(f"{TOY}:capacity_loss", 3, "SIGINT")
    process = call("capacity", [run_dir], prepare=prepare)
    assert "interrupted; the same command continues" in one_line(process, 130)
    assert read_results(run_dir)["0"].keys() == {"0", "128"}
    assert fine(call("capacity", [run_dir])).stdout.count("\n") == 7
    assert read_results(run_dir) == measure(copied("whole"))

"""capacity.py: the run's own curve again, its options, odd files, and going on after a fault."""

import importlib
import json
import math
import os
import random
import shutil
import sys

import filelock
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, Process, call, checkpoints, fault_at, one_line, read_scalars

import capacity

NAMES = ("actor", "critic", "actor_last_minibatch", "critic_last_minibatch")
TOY = "ppo_toy"  # whose runs take a moment


@pytest.fixture
def copied(finished, tmp_path):
    """copied(name, script, flags): such a run's copy of its own in a folder of runs."""

    def copy(name="run", script=TOY, flags=""):
        return shutil.copytree(finished(script, flags), tmp_path / "runs" / name)

    return copy


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
        ("ppo_mujoco", ""),
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
        moments = adam_state[0] if adam_state else {}
        given.append({name: x.clone() for name, x in moments.items()})
        return fit(*args, adam_state=adam_state)

    monkeypatch.setattr(module, "capacity_loss", spy)
    loaded = measure(run_dir, "--optimizer", "loaded")["0"]
    for moments, path in zip(given, checkpoints(run_dir).values(), strict=True):
        saved = torch.load(path, weights_only=True)["optimizer"]["state"].get(0, {})
        assert moments.keys() == saved.keys()
        assert all(torch.equal(moments[name], saved[name]) for name in saved)
    assert given[0] == {} and {"exp_avg", "exp_avg_sq", "step"} <= given[-1].keys()
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
    import ppo_mujoco

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
        ("runs/run --num-targets 1000001", "--num-targets"),
        ("runs/run --num-targets two", "--num-targets"),
        ("runs/run --epochs -1", "--epochs"),
        ("runs/run --learning-rate nan", "--learning-rate"),
        ("runs/run --data mine", "--data"),
        ("runs/run --optimizer sgd", "--optimizer"),
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
    assert {path.name for path in run_dir.iterdir()} >= {"args.json", "checkpoints"}
    assert not list(run_dir.glob("capacity-*"))


# A changed script, and tasks that exit or stay open


def change(run_dir, *changes):
    """Change the script that a run keeps; returns its path."""
    path = run_dir / f"{TOY}.py"
    text = path.read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path.write_text(text)
    return path


def test_a_changed_script_is_used_only_if_it_is_named(copied, measure, errors):
    """A LayerNorm in both trunks; the run that is measured with it was made with it."""
    run_dir, own = copied(), read_results_of(measure, copied("own"))
    norm = "nn.Linear(envs.obs_dim, args.width),\n", "nn.LayerNorm(args.width),\n"
    path = change(run_dir, (norm[0], norm[0] + 16 * " " + norm[1]))
    made = call(path.with_suffix(""), f"{SMALL[TOY]} --runs-dir {run_dir} --run-name normed")
    assert made.returncode == 0, made.stderr
    normed = run_dir / "normed"
    said = errors(normed)
    assert len(said) == 5 and all(
        f"its networks differ from those of the script: try --script {normed}/ppo_toy.py" in line
        for line in said
    )
    results = measure(normed, "--script", normed / "ppo_toy.py")["0"]
    logged = read_scalars(normed)["capacity/critic"]
    assert [(int(k), np.float32(x["critic"])) for k, x in results.items()] == logged
    assert measure(run_dir) == own  # by the script beside capacity.py


def test_a_script_measures_only_its_own_runs(copied, errors):
    run_dir = copied()
    said = errors(run_dir, "--script", ROOT / "ppo_mujoco.py")
    assert len(said) == 5 and all("not a checkpoint of ppo_mujoco: " in line for line in said)


def test_a_task_that_exits_is_named_and_all_tasks_are_closed(copied, errors, monkeypatch):
    """CartPole ends the process at the 100th step of the second checkpoint's fit."""
    from gymnasium.envs.classic_control import CartPoleEnv

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


def odd_checkpoints(good, state, folder):
    """(what is wrong, what the line says, bytes or a state) of files in place of a checkpoint."""
    args = state["args"]

    def flags(**changed):
        return state | {"args": args | changed}

    yield "empty", "is damaged", b""
    yield "a text", "is damaged", b"text"
    yield "cut", "is damaged", good[: len(good) // 2]
    yield "a list", "is damaged", [1, 2, 3]
    for part in ("script", "global_step"):
        yield f"without {part}", part, {k: x for k, x in state.items() if k != part}
    for part in ("args", "agent", "obs_stats"):
        yield f"without {part}", f"KeyError: '{part}'", {k: state[k] for k in state if k != part}
    yield "another script", "of os.py", state | {"script": "os"}
    yield "another step", "step 256 of", state | {"global_step": 256}
    yield "a tensor as step", "is damaged", state | {"global_step": torch.zeros(3)}
    yield "an unknown flag", "evil", flags(evil=1)
    yield "flags of no dict", "TypeError", state | {"args": 3}
    hint = f"the script: try --script {folder}/ppo_toy.py"
    yield "another width", hint, flags(width=7)
    yield "other weights", hint, state | {"agent": {"x": torch.zeros(2)}}
    yield "another task", hint, flags(env_id="Acrobot-v1")
    yield "weights of no dict", "TypeError", state | {"agent": [1]}
    yield "no task", "NoSuchTask", flags(env_id="NoSuchTask-v0")
    yield "a module", "--allow-module antigravity", flags(env_id="antigravity:Task-v0")
    yield "nothing to fit", "--capacity-steps is 1", flags(capacity_steps=1, capacity_interval=0.0)
    yield "absurd threads", "--torch-threads", flags(torch_threads=100_000)
    yield "a word as width", "", flags(width="x")


def test_odd_checkpoints_are_named_and_the_rest_is_done(copied, measure, errors):
    bad, good = copied("bad"), copied("good")
    expected = read_results_of(measure, good)
    folder = bad / "checkpoints"
    state = torch.load(folder / "128.pt", weights_only=True)
    odd = {}
    for number, case in enumerate(odd_checkpoints((folder / "128.pt").read_bytes(), state, bad)):
        what, reason, content = case
        path = folder / f"{1000 + number}.pt"
        odd[path.name] = what, reason
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            if isinstance(content, dict) and content.get("global_step") is state["global_step"]:
                content = content | {"global_step": 1000 + number}
            torch.save(content, path)
    (folder / "2000.pt").mkdir()
    os.mkfifo(folder / "2001.pt")
    (folder / "2002.pt").symlink_to("2002.pt")
    (folder / "2003.pt").symlink_to("nowhere")
    odd |= {f"{number}.pt": ("no file", "is not a file") for number in range(2000, 2004)}
    for name in ("²", "best", "-1", "007", "1" * 30):
        shutil.copy(folder / "128.pt", folder / f"{name}.pt")
        odd[f"{name}.pt"] = "no step", "its name is not a step"
    shutil.copy(folder / "128.pt", folder / "diverged.pt")  # what a run leaves: nothing is said
    (folder / "5.pt.tmp").write_bytes(b"")
    said = errors(bad, copied("other"), "--num-targets", 2)
    assert len(said) == len(odd)
    for name, (what, reason) in odd.items():
        [line] = [line for line in said if line.startswith(f"{folder / name}: ")]
        assert reason in line and len(line) < 700, (what, line)
    assert "antigravity" not in sys.modules
    assert read_results(bad, "targets2")["0"] == expected["0"]
    assert read_results(bad, "targets2")["1"].keys() == expected["0"].keys()
    assert read_results(bad.parent / "other", "targets2")["0"] == expected["0"]


def read_results_of(measure, run_dir):
    results = measure(run_dir)
    assert results["0"].keys() == {"0", "128", "256", "384", "512"}
    return results


def test_mujoco_checkpoints_that_do_not_fit_are_named(copied, errors):
    run_dir = copied("run", "ppo_mujoco")
    for step, changed in ((128, {"width": 32}), (256, {"gamma": 2.0}), (384, {"evil": 1})):
        path = run_dir / "checkpoints" / f"{step}.pt"
        state = torch.load(path, weights_only=True)
        torch.save(state | {"args": state["args"] | changed}, path)
    said = errors(run_dir)
    assert [line.partition(": ")[0][-6:] for line in said] == ["128.pt", "256.pt", "384.pt"]
    assert "its networks differ" in said[0] and "--gamma is 2.0" in said[1] and "evil" in said[2]
    assert read_results(run_dir)["0"].keys() == {"0", "512"}


def test_no_flipped_bit_changes_a_number(copied):
    path = copied() / "checkpoints" / "512.pt"
    good, chance = path.read_bytes(), random.Random(1)
    weights, refused = torch.load(path, weights_only=True)["agent"], 0
    for _ in range(20):
        content = bytearray(good)
        content[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
        path.write_bytes(content)
        try:
            state, *_ = capacity.load_checkpoint(path, capacity.Args(()))
        except capacity.Unusable as problem:
            refused += 1
            assert "damaged" in str(problem)
        else:  # a bit that says nothing, as those of dates
            assert all(torch.equal(x, weights[name]) for name, x in state["agent"].items())
    assert refused > 8


def odd_results():
    """Files in place of results.json."""
    fit = '{"actor": 0.5, "critic": 0.5}'
    yield from (b"", b"[]", b"\xff\xfe\xfa", b"[" * 100_000)
    for text in (
        '{"0": []}',
        '{"0": {"128": {"actor": 0.5}}}',
        '{"0": {"128": {"actor": [1.0], "critic": 0.5}}}',
        '{"0": {"128": {"actor": true, "critic": 0.5}}}',
        '{"0": {"128": {"actor": NaN, "critic": 0.5}}}',
        '{"0": {"128": {"actor": 0.5, "critic": 0.5, "\\ud800": 0.5}}}',
        f'{{"1": {{"128": {fit}}}}}',
        f'{{"0": {{"latest": {fit}}}}}',
        '{"0": {"128": {"actor": 0.5, "critic": 0.5}}',
    ):
        yield text.encode()


def test_odd_results_are_named_and_left_and_other_runs_are_done(copied, errors):
    odd = [put(copied(f"odd{i}"), content) for i, content in enumerate(odd_results())]
    before = [path.read_bytes() for path in odd]
    for name in ("folder", "fifo", "loop"):
        odd.append(put(copied(name), b""))
        odd[-1].unlink()
    odd[-3].mkdir()
    os.mkfifo(odd[-2])
    odd[-1].symlink_to("results.json")
    good = copied("good")
    said = errors(*(path.parents[1] for path in odd), good)
    assert len(said) == len(odd)
    for path, line in zip(odd, said):
        assert line.startswith(f"{path.parents[1]}: {path} cannot be used, move it away: "), line
    assert [path.read_bytes() for path in odd[:-3]] == before and odd[-2].is_fifo()
    assert len(read_results(good)["0"]) == 5


def test_folders_that_are_no_runs_are_named(copied, errors, tmp_path):
    runs = tmp_path / "runs"
    good = copied("good")
    (runs / "file").write_text("no run")
    os.mkfifo(runs / "fifo")
    (runs / "loop").symlink_to("loop")
    for name in ("empty", "checkpoints_file/x", "diverged/checkpoints", "inner_loop"):
        (runs / name).mkdir(parents=True)
    (runs / "checkpoints_file" / "checkpoints").write_text("no folder")
    (runs / "inner_loop" / "checkpoints").symlink_to("checkpoints")
    shutil.copy(good / "checkpoints" / "0.pt", runs / "diverged" / "checkpoints" / "diverged.pt")
    (copied("results_file") / "capacity-default").write_text("no folder")
    (copied("unfinished") / "capacity-default" / "unfinished").mkdir(parents=True)
    names = ("nothing", "file", "fifo", "loop", "empty", "checkpoints_file", "inner_loop")
    no_run = [runs / name for name in names]
    empty = [runs / "diverged"]
    unwritable = [runs / "results_file", runs / "unfinished"]
    said = errors(*no_run, *empty, *unwritable, good, good)
    assert len(said) == 10
    for path, line in zip([*no_run, *empty, *unwritable], said):
        assert line.startswith(f"{path}: "), line
    assert all("this is not a run's folder: name runs/NAME" in line for line in said[:7])
    assert "it has no checkpoints/STEP.pt" in said[7]
    assert "exists" in said[8] and len(read_results(good)["0"]) == 5


def test_what_cannot_be_read_is_named(copied, errors, monkeypatch):
    run_dir, open_zip = copied(), capacity.zipfile.ZipFile

    def denied(path):
        if path.stem == "128":
            raise PermissionError(13, "Permission denied", str(path))
        return open_zip(path)

    monkeypatch.setattr(capacity.zipfile, "ZipFile", denied)
    [said] = errors(run_dir)
    assert "128.pt: it is damaged" in said and "PermissionError" in said
    assert len(read_results(run_dir)["0"]) == 4


def test_a_malicious_checkpoint_is_not_executed(copied, errors, tmp_path):
    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    run_dir = copied()
    torch.save({"script": TOY, "agent": Malicious()}, run_dir / "checkpoints" / "128.pt")
    [said] = errors(run_dir)
    assert "128.pt: " in said and not (tmp_path / "executed").exists()


def test_a_module_is_imported_only_if_it_is_named(run, measure, errors):
    """probe_envs is found in tests/, as a module of the user's would be."""
    run_dir = run("ppo_mujoco", "--env-id probe_envs:Clock-v0 --capacity-interval 0")
    before = sys.modules.pop("probe_envs")
    said = errors(run_dir)
    assert len(said) == 5 and all("--allow-module probe_envs" in line for line in said)
    assert "probe_envs" not in sys.modules
    assert len(measure(run_dir, "--allow-module", "probe_envs")["0"]) == 5
    sys.modules["probe_envs"] = before


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
    path = put(run_dir, json.dumps(part).encode(), "targets2-controls")
    assert measure(run_dir, "--num-targets", 2, "--controls") == whole
    assert len(calls) == 5  # two with heads and a fresh network
    path.unlink()
    (run_dir / "checkpoints" / "128.pt").unlink()
    assert measure(run_dir, "--num-targets", 2, "--controls")["0"].keys() == {*whole["0"]} - {"128"}


@pytest.mark.parametrize("function", ["replace", "write_bytes"])
def test_a_reader_sees_whole_files_whenever_it_is_interrupted(
    copied, measure, monkeypatch, function
):
    """At every write: half of the bytes arrive, and then the process ends."""
    owner = {"replace": capacity.os, "write_bytes": capacity.Path}[function]
    whole_dir, run_dir = copied("whole"), copied("run")
    whole, original, done = measure(whole_dir), getattr(owner, function), 0
    for _ in range(20):
        calls = []

        def interrupted(path, content):
            calls.append(1)  # noqa: B023
            if len(calls) == 3:  # noqa: B023
                if function == "write_bytes":
                    original(path, content[: len(content) // 2])
                raise KeyboardInterrupt
            return original(path, content)

        monkeypatch.setattr(owner, function, interrupted)
        try:
            results = measure(run_dir)
            break
        except KeyboardInterrupt:
            read = read_results(run_dir)["0"]
            assert read.items() <= whole["0"].items() and len(read) > done
            done = len(read)
            events = read_scalars(run_dir / "capacity-default")["capacity/actor"]
            assert len(events) == done  # this call's third write is the events' second
    assert done == 4 and results == whole
    ours, theirs = (read_scalars(x / "capacity-default") for x in (run_dir, whole_dir))
    assert ours == theirs


def test_events_are_never_behind_the_results(copied, measure, monkeypatch):
    """What results.json holds is not done again, so the events must be there before it."""
    run_dir, replace, calls = copied(), os.replace, []

    def interrupted(path, target):
        calls.append(1)
        if len(calls) == 10:  # the last of five times two
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(run_dir)
    measure(run_dir)
    assert len(read_scalars(run_dir / "capacity-default")["capacity/actor"]) == 5


def test_a_full_disk_is_named_and_other_runs_are_done(copied, measure, errors, monkeypatch):
    full, good, write = copied("full"), copied("good"), capacity.Path.write_bytes
    measure(full)
    before = read_results(full)

    def full_disk(path, content):
        if "full" in path.parts:
            write(path, content[:10])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(capacity.Path, "write_bytes", full_disk)
    shutil.copy(full / "checkpoints" / "512.pt", full / "checkpoints" / "640.pt")
    state = torch.load(full / "checkpoints" / "512.pt", weights_only=True)
    torch.save(state | {"global_step": 640}, full / "checkpoints" / "640.pt")
    [said] = errors(full, good)
    assert said.startswith(f"{full}: ") and "No space left" in said
    assert read_results(full) == before and len(read_results(good)["0"]) == 5


def test_a_second_process_is_refused(copied, measure, errors):
    run_dir, other = copied("run"), copied("other")
    (run_dir / "capacity-default").mkdir()
    with filelock.FileLock(run_dir / "capacity-default" / ".lock"):
        [said] = errors(run_dir, other)
    assert said == f"{run_dir}: another process measures it"
    assert not (run_dir / "capacity-default" / "results.json").exists()
    assert len(read_results(other)["0"]) == len(measure(run_dir)["0"]) == 5


def test_two_processes_and_a_kill_spoil_nothing(copied, measure):
    run_dir = copied()
    flags, folder = [run_dir, "--num-targets", "500"], run_dir / "capacity-targets500"
    first = Process("capacity", flags).wait_until((folder / "results.json").exists)
    second = call("capacity", flags)
    assert first.running() and second.returncode == 2
    assert second.stderr.rstrip().endswith("another process measures it")
    first.kill()
    done = read_results(run_dir, "targets500")["0"]
    assert done and done.items() <= measure(copied("whole"))["0"].items()
    with filelock.FileLock(folder / ".lock", timeout=0):  # nobody is at work any more
        pass


def test_control_c_is_one_line_and_the_same_command_continues(copied, measure):
    run_dir = copied()
    prepare = fault_at(f"{TOY}:capacity_loss", 3, "SIGINT")
    process = call("capacity", [run_dir], prepare=prepare)
    assert "interrupted; the same command continues" in one_line(process, 130)
    assert read_results(run_dir)["0"].keys() == {"0", "128"}
    process = call("capacity", [run_dir])
    assert process.returncode == 0 and process.stdout.count("\n") == 7
    assert read_results(run_dir) == measure(copied("whole"))


def test_the_exit_code_is_2_if_anything_was_not_done(copied):
    good = copied()
    process = call("capacity", ["nothing", good])
    assert process.returncode == 2 and len(read_results(good)["0"]) == 5
    assert "error: nothing: this is not a run's folder" in one_line(process, 2)

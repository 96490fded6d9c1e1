"""capacity.py: the inline values again, its options, and going on after an interruption."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, read_scalars

import capacity

NAMES = ("actor", "critic", "actor_last_minibatch", "critic_last_minibatch")


def measure(monkeypatch, *arguments):
    """capacity.py with these arguments, and the results of the last run named."""
    monkeypatch.setattr(sys, "argv", ["capacity.py", *map(str, arguments)])
    capacity.main()
    args = capacity.parse_args(capacity.Args)
    return json.loads((args.runs[-1] / f"capacity-{args.settings()}" / "results.json").read_text())


@pytest.mark.parametrize(
    "script, flags",
    [
        ("ppo_mujoco", ""),
        ("ppo_mujoco", "--activation relu --share-trunk --capacity-data initial --seed 3"),
        ("ppo_atari", ""),
        ("ppo_toy", ""),
    ],
)
def test_the_defaults_give_exactly_the_inline_values(run, monkeypatch, script, flags):
    run_dir = run(script, flags)
    inline = read_scalars(run_dir)
    results = measure(monkeypatch, run_dir)
    assert results.keys() == {"0"} and len(results["0"]) >= 3
    for name in NAMES:
        logged = {str(step): value for step, value in inline[f"capacity/{name}"]}
        measured = {step: float(np.float32(losses[name])) for step, losses in results["0"].items()}  # events hold float32
        assert measured == logged, name
    assert read_scalars(run_dir) == inline or repr(read_scalars(run_dir)) == repr(inline)  # beside, not over
    beside = read_scalars(run_dir / "capacity-default")
    assert all(beside[f"capacity/{name}"] == inline[f"capacity/{name}"] for name in NAMES)


def test_several_targets_have_a_mean_and_a_spread(run, monkeypatch, capsys):
    run_dir = run("ppo_toy")
    results = measure(monkeypatch, run_dir, "--num-targets", 3)
    assert results["0"] == measure(monkeypatch, run_dir)["0"]  # the first is the run's own
    assert results["0"] != results["1"] != results["2"]
    values = [results[target]["512"]["actor"] for target in "012"]
    beside = read_scalars(run_dir / "capacity-targets3")
    assert dict(beside["capacity/actor"])[512] == pytest.approx(np.mean(values))
    assert dict(beside["capacity/actor_std"])[512] == pytest.approx(np.std(values, ddof=1))
    assert f"{np.mean(values):.5g} +- {np.std(values, ddof=1):.2g}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option", ["--epochs 3", "--learning-rate 0.01", "--data initial", "--data checkpoint", "--optimizer loaded"]
)
def test_every_option_acts(run, monkeypatch, option):
    run_dir = run("ppo_toy")
    assert measure(monkeypatch, run_dir, *option.split())["0"]["512"] != measure(monkeypatch, run_dir)["0"]["512"]


def test_the_controls_tell_what_the_number_is_worth(run, monkeypatch):
    """The fresh network fits as the run's first checkpoint does; heads alone fit worse than the whole network."""
    run_dir = run("ppo_toy", "--capacity-epochs 5 --learning-rate 0.005")
    losses = measure(monkeypatch, run_dir, "--controls")["0"]
    assert losses["fresh"]["critic"] < 3 * losses["0"]["critic"] and losses["0"]["critic"] < 3 * losses["fresh"]["critic"]
    assert losses["fresh"] != losses["0"]
    assert losses["0"]["critic"] < losses["0"]["heads_only_critic"]
    assert {name: losses["512"][name] for name in NAMES} == measure(monkeypatch, run_dir)["0"]["512"]


@pytest.mark.parametrize("flags", ["", "--share-trunk", "--policy-std free"])
def test_the_heads_alone_are_fitted_on_frozen_features(run, monkeypatch, flags):
    import ppo_mujoco

    run_dir, groups, optimized = run("ppo_mujoco", flags), [], ppo_mujoco.make_optimizer
    monkeypatch.setattr(ppo_mujoco, "make_optimizer", lambda agent, args: groups.append(agent) or optimized(agent, args))
    measure(monkeypatch, run_dir, "--controls")
    whole, heads = groups[:2]  # the copies that were fitted: of the whole network, and of its heads
    before = torch.load(run_dir / "checkpoints" / "0.pt", weights_only=True)["agent"]
    for name, weights in before.items():
        assert not torch.equal(whole.state_dict()[name], weights), name
        assert torch.equal(heads.state_dict()[name], weights) == ("trunk" in name), name


def test_what_is_done_is_skipped_and_a_broken_off_call_goes_on(run, monkeypatch):
    import ppo_toy

    run_dir = run("ppo_toy")
    whole = measure(monkeypatch, run_dir, "--num-targets", 2)
    results = run_dir / "capacity-targets2" / "results.json"
    part = json.loads(results.read_text())
    del part["0"]["512"], part["1"]["0"]
    results.write_text(json.dumps(part))
    calls, fit = [], ppo_toy.capacity_loss
    monkeypatch.setattr(ppo_toy, "capacity_loss", lambda *args, **kwargs: calls.append(1) or fit(*args, **kwargs))
    assert measure(monkeypatch, run_dir, "--num-targets", 2) == whole and len(calls) == 2
    assert measure(monkeypatch, run_dir, "--num-targets", 2) == whole and len(calls) == 2


def test_several_runs_side_by_side_give_the_same(run, monkeypatch):
    run_dirs = [run("ppo_toy", name="a"), run("ppo_toy", "--seed 2", name="b")]
    alone = [measure(monkeypatch, run_dir) for run_dir in run_dirs]
    for run_dir in run_dirs:
        for path in (run_dir / "capacity-default").iterdir():
            path.unlink()
    assert measure(monkeypatch, *run_dirs, "--jobs", 2) == alone[1]
    assert json.loads((run_dirs[0] / "capacity-default" / "results.json").read_text()) == alone[0]


def test_runs_side_by_side_with_a_bad_one(run, monkeypatch, capsys, tmp_path):
    run_dirs = [run("ppo_toy", name="a"), tmp_path / "nothing", run("ppo_toy", "--seed 2", name="b")]
    (run_dirs[0] / "checkpoints" / "128.pt").write_bytes(b"damaged")
    with pytest.raises(SystemExit) as stop:
        measure(monkeypatch, *run_dirs, run_dirs[0], "--jobs", 2, "--num-targets", 2)
    said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(said) == 2  # the damaged file once, not once per target
    assert any("128.pt cannot be read" in line for line in said) and any("nothing is not" in line for line in said)
    for run_dir, count in ((run_dirs[0], 4), (run_dirs[2], 5)):
        results = json.loads((run_dir / "capacity-targets2" / "results.json").read_text())
        assert [len(known) for known in results.values()] == [count, count]


def test_a_second_process_is_refused(run, monkeypatch, capsys):
    run_dir = run("ppo_toy")
    with capacity.Run(run_dir, capacity.Args(runs=(run_dir,))).alone(), pytest.raises(SystemExit) as stop:
        measure(monkeypatch, run_dir)
    assert stop.value.code == 2 and "another process is at work" in capsys.readouterr().err
    assert not (run_dir / "capacity-default").exists()  # nothing was written
    assert len(measure(monkeypatch, run_dir)["0"]) == 5


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupted_call_ends_with_its_workers_and_goes_on(run, tmp_path, jobs):
    run_dir = run("ppo_toy")
    command = [sys.executable, str(ROOT / "capacity.py"), str(run_dir), "--num-targets", "200", "--jobs", str(jobs)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    results = run_dir / "capacity-targets200" / "results.json"
    while not results.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)  # with the last worker, which holds stderr as well
    assert process.returncode == 130 and "interrupted: the same call goes on" in stderr and "Traceback" not in stderr
    assert 0 < len(json.loads(results.read_text())) < 200
    with capacity.Run(run_dir, capacity.Args(runs=(run_dir,), num_targets=200)).alone():  # nobody is at work any more
        pass


def test_the_workers_of_a_killed_process_end(run):
    run_dir = run("ppo_toy")
    command = [sys.executable, str(ROOT / "capacity.py"), str(run_dir), "--num-targets", "2000", "--jobs", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (run_dir / "capacity-targets2000" / "results.json").exists():
        time.sleep(0.02)
    process.kill()
    process.communicate(timeout=60)


def test_the_run_is_left_as_it_was(run, monkeypatch):
    run_dir = run("ppo_toy")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    threads = torch.get_num_threads()
    measure(monkeypatch, run_dir, "--controls")
    torch.set_num_threads(threads)
    assert all(path.read_bytes() == content for path, content in before.items())

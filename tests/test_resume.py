"""A run that is killed and resumed is, bit for bit, the run that was never killed; and faults on the way."""

import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL, final_weights, read_scalars, same_scalars, same_weights

SCRIPTS = ("ppo_mujoco", "ppo_atari", "ppo_toy")
# A checkpoint in most iterations, so that kills fall between all of them
LONG = {
    "ppo_mujoco": "--total-timesteps 8192 --num-steps 64 --checkpoint-interval 0.02",
    "ppo_atari": "--total-timesteps 3072 --checkpoint-interval 0.04",
    "ppo_toy": "--total-timesteps 8192 --checkpoint-interval 0.02",
}
VARIANTS = ("", "--share-trunk --pfo-coef 1 --pfo-layers all --reward-keep-prob 0.5 --reset-adam")


def command(script, tmp_path, name, flags=""):
    """The shell command of a small run, as a list."""
    words = f"{script}.py {SMALL[script]} {LONG[script]} --runs-dir {tmp_path} --run-name {name} {flags}".split()
    return [sys.executable, str(ROOT / words[0]), *words[1:]]


def call(script, tmp_path, name, flags="", **kwargs):
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    return subprocess.run(command(script, tmp_path, name, flags), capture_output=True, text=True, env=env, **kwargs)


def modified(path):
    """When a file was written, None if there is none."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flags", VARIANTS)
def test_killed_and_resumed_is_never_killed(tmp_path, script, flags):
    """kill -9 at random points of a run, until it is done."""
    kills = int(os.environ.get("KILLS", 2 if flags else 5))
    started = time.monotonic()
    assert call(script, tmp_path, "whole", flags).returncode == 0
    duration = time.monotonic() - started
    run_dir, rng, places = tmp_path / "killed", random.Random(0), []
    latest = run_dir / "latest.pt"
    for kill in range(kills):
        before = modified(latest)
        process = subprocess.Popen(
            command(script, tmp_path, "killed", flags + " --resume"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if kill % 4 == 3:  # anywhere in the start, the replay included
            time.sleep(rng.uniform(0, duration / 2))
        else:  # soon after it has saved for the first time
            while modified(latest) in (before, None) and process.poll() is None:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, duration / 4 / kills))
        alive = process.poll() is None
        process.kill()
        process.wait()
        if alive:
            left = latest if latest.exists() else run_dir / "previous.pt"  # killed between the two renames of a save
            places.append(torch.load(left, weights_only=True)["iteration"])
    assert len(set(places)) > kills // 2, places  # killed while it was training, and at different places
    finished = call(script, tmp_path, "killed", flags + " --resume")
    assert finished.returncode == 0, finished.stderr
    assert same_weights(tmp_path / "whole", tmp_path / "killed")
    assert same_scalars(tmp_path / "whole", tmp_path / "killed")
    whole, killed = (torch.load(tmp_path / name / "latest.pt", weights_only=True) for name in ("whole", "killed"))
    assert torch.equal(whole["rng"]["torch"], killed["rng"]["torch"])
    assert {path.name for path in (tmp_path / "whole" / "checkpoints").iterdir()} == {
        path.name for path in (run_dir / "checkpoints").iterdir()
    }
    again = call(script, tmp_path, "killed", flags + " --resume")
    assert again.returncode == 0 and "is finished" in again.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_kill_before_the_first_save_in_training_loses_nothing_but_time(tmp_path, script):
    flags = "--checkpoint-interval 1 --snapshot-interval 0.05"  # checkpoints are kept long before the state is saved
    assert call(script, tmp_path, "whole", flags).returncode == 0
    process = subprocess.Popen(command(script, tmp_path, "killed", flags), stderr=subprocess.DEVNULL)
    while len(list(tmp_path.glob("killed/checkpoints/*.pt"))) < 3:
        time.sleep(0.002)
    process.kill()
    process.wait()
    refused = call(script, tmp_path, "killed", flags + " --resume --seed 9")
    assert refused.returncode == 2 and "--seed was 1 and is 9" in refused.stderr
    resumed = call(script, tmp_path, "killed", flags + " --resume")
    assert resumed.returncode == 0 and "goes on at step 0" in resumed.stderr
    assert same_weights(tmp_path / "whole", tmp_path / "killed") and same_scalars(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_iteration_and_saves(tmp_path, script, number):
    flags = "--checkpoint-interval 1"  # nothing is saved but by the signal
    assert call(script, tmp_path, "whole", flags).returncode == 0
    process = subprocess.Popen(command(script, tmp_path, "run", flags), stderr=subprocess.PIPE, text=True)
    run_dir = tmp_path / "run"
    while len(list(run_dir.glob("checkpoints/*.pt"))) < 2:  # the loop is running
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr
    assert "--resume goes on" in stderr and "Traceback" not in stderr
    assert (run_dir / "latest.pt").exists()
    assert call(script, tmp_path, "run", flags + " --resume").returncode == 0
    assert same_weights(tmp_path / "whole", run_dir) and same_scalars(tmp_path / "whole", run_dir)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_signal_that_comes_while_saving_waits_for_the_next_iteration(run, monkeypatch, script):
    module, whole = importlib.import_module(script), run(script, "--checkpoint-interval 1", name="whole")
    save = module.save

    def interrupted_save(state, path):
        save(state, path)
        if path.parent.name == "checkpoints" and path.stem != "0":
            monkeypatch.setattr(module, "save", save)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(module, "save", interrupted_save)
    with pytest.raises(SystemExit) as stop:
        run(script, "--checkpoint-interval 1", name="run")
    run_dir = whole.with_name("run")
    assert stop.value.code == 128 + signal.SIGTERM
    del stop  # and with it the lock on the run
    assert torch.load(run_dir / "latest.pt", weights_only=True)["iteration"] > 1
    run(script, "--checkpoint-interval 1 --resume", name="run")
    assert same_weights(whole, run_dir) and same_scalars(whole, run_dir)


def test_resume_starts_a_run_that_does_not_exist(tmp_path):
    assert call("ppo_toy", tmp_path, "new", "--resume").returncode == 0
    assert call("ppo_toy", tmp_path, "plain").returncode == 0
    assert same_weights(tmp_path / "new", tmp_path / "plain")


def test_a_longer_run_goes_on_from_a_finished_one(tmp_path):
    assert call("ppo_toy", tmp_path, "run", "--total-timesteps 4096").returncode == 0
    assert call("ppo_toy", tmp_path, "run", "--total-timesteps 8192 --resume").returncode == 0
    assert call("ppo_toy", tmp_path, "whole", "--total-timesteps 8192").returncode == 0
    assert same_weights(tmp_path / "run", tmp_path / "whole")


def test_other_arguments_are_refused_and_listed(run, capsys):
    run_dir = run("ppo_mujoco")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        run("ppo_mujoco", "--resume --seed 5 --pfo-coef 1 --log-interval 0.5")
    assert stop.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "--seed was 1 and is 5" in message and "--pfo-coef was 0.0 and is 1.0" in message and "interval" not in message
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_another_version_warns_and_goes_on(run, capsys):
    run_dir = run("ppo_mujoco")
    state = torch.load(run_dir / "latest.pt", weights_only=True)
    state["versions"]["mujoco"] = "2.1.0"
    torch.save(state, run_dir / "latest.pt")
    run("ppo_mujoco", "--resume --total-timesteps 1024")
    assert "mujoco was 2.1.0 and is" in capsys.readouterr().err
    assert max(int(path.stem) for path in (run_dir / "checkpoints").iterdir()) == 1024


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_a_damaged_latest_falls_back_to_the_one_before(run, capsys, damage):
    whole, run_dir = run("ppo_toy", name="whole"), run("ppo_toy", "--total-timesteps 256", name="run")
    latest = run_dir / "latest.pt"
    latest.write_bytes({"truncated": latest.read_bytes()[:5000], "empty": b"", "text": b"not a checkpoint"}[damage])
    before = torch.load(run_dir / "previous.pt", weights_only=True)["global_step"]
    run("ppo_toy", "--resume --total-timesteps 512", name="run")
    said = capsys.readouterr().err
    assert "latest.pt cannot be read" in said and f"goes on at step {before}" in said
    assert same_weights(whole, run_dir)
    assert (run_dir / "latest.damaged").exists()
    assert torch.load(run_dir / "previous.pt", weights_only=True)["global_step"] >= before  # never the damaged one


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_an_event_file_that_lost_its_end_is_refused(run, capsys, damage):
    run_dir = run("ppo_toy", "--total-timesteps 256")
    (events,) = run_dir.glob("events*")
    content = events.read_bytes()
    events.unlink() if damage == "gone" else events.write_bytes(content[:-700])
    with pytest.raises(SystemExit) as stop:
        run("ppo_toy", "--total-timesteps 512 --resume")
    assert stop.value.code == 2 and "is shorter than it was" in capsys.readouterr().err
    del stop
    events.write_bytes(content)
    assert same_weights(run("ppo_toy", "--total-timesteps 512 --resume"), run("ppo_toy", name="whole"))


def test_two_damaged_states_are_not_overwritten(run, capsys):
    run_dir = run("ppo_toy")
    for name in ("latest.pt", "previous.pt"):
        (run_dir / name).write_bytes(b"damaged")
    with pytest.raises(SystemExit) as stop:
        run("ppo_toy", "--resume")
    assert stop.value.code == 2 and "no checkpoint" in capsys.readouterr().err
    assert (run_dir / "latest.pt").read_bytes() == b"damaged"


def test_a_run_without_resume_state_is_not_overwritten(run, capsys):
    run_dir = run("ppo_toy", "--checkpoint-interval 0")
    assert not (run_dir / "latest.pt").exists()
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stop:
        run("ppo_toy", "--checkpoint-interval 0 --resume")
    assert stop.value.code == 2 and "keeps no state" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}


def test_a_second_process_is_refused(tmp_path):
    flags = "--total-timesteps 400000"
    first = subprocess.Popen(command("ppo_toy", tmp_path, "run", flags), stderr=subprocess.DEVNULL)
    while len(list(tmp_path.glob("run/checkpoints/*.pt"))) < 1:
        time.sleep(0.02)
    second = call("ppo_toy", tmp_path, "run", flags + " --resume")
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=60) == 128 + signal.SIGTERM
    assert second.returncode == 2 and "another process is at work" in second.stderr


def test_a_malicious_checkpoint_is_not_executed(run, tmp_path, capsys):
    run_dir, proof = run("ppo_toy"), tmp_path / "executed"

    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {proof}",)

    for name in ("latest.pt", "previous.pt"):
        torch.save({"args": Malicious()}, run_dir / name)
    with pytest.raises(SystemExit):
        run("ppo_toy", "--resume")
    assert not proof.exists()


@pytest.fixture
def failing_replace(monkeypatch):
    """failing_replace(n, m): the n-th to m-th call of os.replace finds the disk full."""
    calls, real = [0], os.replace

    def set_failures(first, last):
        def replace(source, target):
            calls[0] += 1
            if first <= calls[0] <= last:
                raise OSError(28, "No space left on device")
            return real(source, target)

        monkeypatch.setattr(os, "replace", replace)

    return set_failures


def test_a_full_disk_costs_nothing_if_it_passes(run, failing_replace, capsys):
    whole = run("ppo_toy", "--checkpoint-interval 0.1", name="whole")
    failing_replace(6, 11)
    run_dir = run("ppo_toy", "--checkpoint-interval 0.1", name="run")
    said = capsys.readouterr().err
    assert said.count("cannot be written (No space left on device)") == 1 and "can be written again" in said
    assert same_scalars(whole, run_dir)
    kept = {path.name: torch.load(path, weights_only=True)["agent"] for path in (whole / "checkpoints").iterdir()}
    assert kept.keys() == {path.name for path in (run_dir / "checkpoints").iterdir()}  # those that failed were tried again
    for name, weights in kept.items():
        saved = torch.load(run_dir / "checkpoints" / name, weights_only=True)["agent"]
        assert all(torch.equal(saved[key], weights[key]) for key in weights), name
    assert not list(run_dir.rglob("*.tmp"))


def test_a_full_disk_that_lasts_stops_the_run_and_keeps_the_last_checkpoint(run, monkeypatch, failing_replace, capsys):
    replace, whole = os.replace, run("ppo_toy", "--checkpoint-interval 0.1", name="whole")
    failing_replace(8, 10**6)
    with pytest.raises(SystemExit) as stop:
        run("ppo_toy", "--checkpoint-interval 0.1 --save-patience 0", name="run")
    assert stop.value.code == 1 and "could not be written" in capsys.readouterr().err
    del stop  # and with it the lock on the run
    monkeypatch.setattr(os, "replace", replace)
    run_dir = run("ppo_toy", "--checkpoint-interval 0.1 --save-patience 0 --resume", name="run")
    assert same_scalars(whole, run_dir) and same_weights(whole, run_dir)


def test_a_folder_that_vanishes(tmp_path):
    process = subprocess.Popen(
        command("ppo_toy", tmp_path, "run", "--total-timesteps 400000 --save-patience 0.5"), stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "run" / "latest.pt").exists():
        time.sleep(0.02)
    shutil.rmtree(tmp_path / "run")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "cannot be written (No such file or directory); the run goes on" in stderr and "the run stops" in stderr
    assert "Traceback" not in stderr


def test_a_crashing_environment_is_named_and_the_run_can_go_on(tmp_path):
    flags = "--env-id probe_envs:Broken-v0 --obs-norm-steps 50 --capacity-interval 0"
    crashed = call("ppo_mujoco", tmp_path, "run", flags)
    assert crashed.returncode == 1
    assert "Broken-v0 crashed (environment" in crashed.stderr and "the joint came off" in crashed.stderr
    again = call("ppo_mujoco", tmp_path, "run", flags + " --resume")
    assert again.returncode == 1 and ("goes on at step" in again.stderr or "crashed" in again.stderr)


@pytest.fixture
def nan_env(monkeypatch):
    import probe_envs

    monkeypatch.setattr(probe_envs.Broken, "failure", "nan")
    monkeypatch.setattr(probe_envs.Broken, "steps_taken", 0)


NAN = "--env-id probe_envs:Broken-v0 --obs-norm-steps 50 --capacity-interval 0 --checkpoint-interval 0.05"


def test_non_finite_parameters_are_said_saved_and_stop_the_run(run, nan_env, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run("ppo_mujoco", NAN)
    said = capsys.readouterr().err
    assert stop.value.code == 1
    assert "not finite, first in iteration" in said and "observations" in said and "policy_loss" in said
    assert "stopped at step" in said and "Traceback" not in said
    weights = final_weights(tmp_path / "run")  # kept for the autopsy
    assert not all(p.isfinite().all() for p in weights.values())
    latest = torch.load(tmp_path / "run" / "latest.pt", weights_only=True)["agent"]
    assert all(p.isfinite().all() for p in latest.values())  # the state to go on from is the last good one
    points = read_scalars(tmp_path / "run")["representation/actor/pca_rank"]
    assert points[0][1] > 0 and points[-1][1] != points[-1][1]  # NaN at the end


def test_stop_on_nonfinite(run, monkeypatch, tmp_path, capsys):
    import ppo_mujoco

    real = ppo_mujoco.ppo_loss

    def bad_loss(*args, **minibatch):
        loss, losses, logratio, policy = real(*args, **minibatch)
        return loss, losses.index_fill(0, torch.tensor([2]), float("inf")), logratio, policy

    monkeypatch.setattr(ppo_mujoco, "ppo_loss", bad_loss)
    run_dir = run("ppo_mujoco", name="goes_on")
    said = capsys.readouterr().err
    assert said.count("not finite, first in iteration 1 (up to step 64): pfo_loss") == 1
    assert max(int(path.stem) for path in (run_dir / "checkpoints").iterdir()) == 512
    with pytest.raises(SystemExit) as stop:
        run("ppo_mujoco", "--stop-on-nonfinite", name="stops")
    assert stop.value.code == 1 and "stopped at step 64 by non-finite pfo_loss" in capsys.readouterr().err


def test_out_of_memory_gives_advice(tmp_path):
    """The last lines of each script, with a main that runs out of memory."""
    for script in SCRIPTS:
        code = (
            f"import runpy, sys, torch, tyro\nsys.argv = ['{script}.py']\n"
            "def cli(*a, **k): raise torch.OutOfMemoryError('CUDA out of memory')\n"
            f"tyro.cli = cli\nrunpy.run_path({str(ROOT / script)!r} + '.py', run_name='__main__')"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 1 and "--minibatch-size" in result.stderr and "Traceback" not in result.stderr


def test_args_json_is_what_was_run(run):
    run_dir = run("ppo_toy", "--seed 3")
    args = json.loads((run_dir / "args.json").read_text())
    assert args["seed"] == 3 and args["run_name"] == "run"

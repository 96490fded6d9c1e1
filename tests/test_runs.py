"""Whole runs of the training scripts."""

import functools
import importlib
import io
import math
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    SMALL,
    Process,
    call,
    checkpoints,
    final_weights,
    fine,
    make_agent,
    message,
    read_args,
    read_scalars,
    same_scalars,
    same_weights,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

SCRIPTS = ("ppo_mujoco", "ppo_atari", "ppo_toy")

TAGS = {
    f"{group}/{name}"
    for group, names in {
        "charts": "learning_rate SPS",
        "losses": "policy_loss value_loss entropy pfo_loss approx_kl old_approx_kl clipfrac "
        "policy_objective_last_minibatch explained_variance actor_grad_norm critic_grad_norm",
        **{
            f"representation/{network}": "pca_rank effective_rank srank feature_rank torch_rank "
            "dead_neurons preactivation_norm feature_norm weight_norm"
            for network in ("actor", "critic")
        },
        "trust_region": "ratio_mean_above ratio_mean_below ratio_excess ratio_max ratio_min "
        "frac_above frac_below kl preactivation_drift",
        "policy": "variance entropy",
    }.items()
    for name in names.split()
}
OWN_TAGS = {"ppo_mujoco": {"policy/saturated_actions"}}
CAPACITY_TAGS = {
    f"capacity/{name}{last}" for name in ("actor", "critic") for last in ("", "_last_minibatch")
}

INTERVENTIONS = (
    "",
    "--pfo-coef 1",
    "--pfo-coef 1 --pfo-layers all --pfo-reduction sum",
    "--share-trunk",
    "--reset-adam",
    "--adam-beta1 0.9 --adam-beta2 0.9",
    "--reward-keep-prob 0.1",
    "--anneal-lr --target-kl 0.01 --ent-coef 0.01 --time-limit bootstrap",
)


@pytest.mark.parametrize("flags", INTERVENTIONS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_tag_is_written_whatever_is_switched_on(finished, script, flags):
    run_dir = finished(script, flags)
    args = read_args(run_dir)
    batch_size = args["num_envs"] * args["num_steps"] * args.get("frameskip", 1)
    scalars = read_scalars(run_dir)
    tags = TAGS | CAPACITY_TAGS | OWN_TAGS.get(script, set())
    assert scalars.keys() - {"charts/episodic_return", "charts/episodic_length"} == tags
    last = args["total_timesteps"]
    log_steps = list(range(batch_size, last + 1, batch_size))
    capacity_steps = [0, last // 4, last // 2, 3 * last // 4, last]
    for tag, points in scalars.items():
        steps = [step for step, _ in points]
        assert script == "ppo_toy" or len(steps) == len(set(steps)), tag
        if tag in CAPACITY_TAGS:
            assert steps == capacity_steps, tag
        elif tag in TAGS:
            assert steps == log_steps, tag
        assert not any(math.isinf(value) for _, value in points), tag
    assert list(checkpoints(run_dir)) == capacity_steps
    assert not list(run_dir.rglob("*.tmp"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_same_seed_gives_the_same_run_whatever_is_measured(run, finished, script):
    measured = finished(script)
    off = "--capacity-interval 0 --log-interval 0 --snapshot-interval 1"
    off += " --checkpoint-interval 0" if script != "ppo_toy" else ""
    unmeasured = run(script, off, name="b")
    assert same_weights(measured, unmeasured)
    assert not read_scalars(unmeasured)
    without_capacity = run(script, "--capacity-interval 0", name="c")
    assert same_scalars(measured, without_capacity, "capacity")
    other_data = run(script, "--capacity-data initial", name="d")
    assert same_scalars(measured, other_data, "capacity")
    # on Atari two nearly uniform policies take the same few actions
    assert script == "ppo_atari" or not same_scalars(measured, other_data)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_seed_and_interventions_that_are_on_change_training(run, finished, script):
    baseline = finished(script)
    for flags in (*INTERVENTIONS[1:], "--seed 2"):
        if flags != "--reward-keep-prob 0.1":  # in so short a run there may be no reward to drop
            assert not same_weights(baseline, finished(script, flags)), flags
    reset = checkpoints(finished(script, "--reset-adam")).values()
    assert not any(torch.load(path)["optimizer"]["state"] for path in reset)
    off = ("--pfo-layers all", "--pfo-reduction sum", "--reward-keep-prob 1", "--target-kl 1e6")
    for i, flags in enumerate(off):
        assert same_weights(baseline, run(script, flags, name=f"off{i}")), flags


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_target_kl_ends_the_update_after_the_epoch_that_passes_it(run, script):
    one = run(script, "--learning-rate 0.01 --update-epochs 1", name="one")
    flags = "--learning-rate 0.01 --update-epochs 3"
    assert same_weights(one, run(script, f"{flags} --target-kl 1e-9", name="stopped"))
    assert not same_weights(one, run(script, flags, name="three"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_compiled_and_eager_agree(run, script):
    eager = read_scalars(run(script, "--capacity-interval 0", name="eager"))
    compiled = read_scalars(run(script, "--capacity-interval 0 --compile", name="compiled"))
    assert eager.keys() == compiled.keys()
    for tag in eager.keys() - {"charts/SPS"}:
        for (_, a), (_, b) in list(zip(eager[tag], compiled[tag]))[:2]:
            assert a == pytest.approx(b, rel=2e-3, abs=1e-5, nan_ok=True), tag


def test_ppo_solves_a_task_that_needs_the_observation(run):
    """-0.25 - variance is what a blind policy gets."""
    flags = "--env-id probe_envs:Target-v0 --total-timesteps 4096 --num-steps 128 "
    flags += "--update-epochs 10 --minibatch-size 64 --capacity-interval 0"
    scalars = read_scalars(run("ppo_mujoco", flags))
    assert scalars["charts/episodic_return"][0][1] < -0.3
    assert scalars["charts/episodic_return"][-1][1] > -0.05
    assert scalars["charts/episodic_length"][-1][1] == 1


@pytest.mark.parametrize("limit, low, high", [("terminate", 2.5, 5.0), ("bootstrap", 7.0, 11.0)])
def test_the_time_limit_ends_the_return_or_not(run, limit, low, high):
    """Reward 1 for 10 steps, gamma 0.9: the mean of (1 - 0.9^n) / 0.1 over n = 1 ... 10 is 4.1;
    without an end it is 10."""
    flags = f"--env-id probe_envs:Clock-v0 --time-limit {limit} --gamma 0.9 --num-steps 128 "
    flags += "--total-timesteps 16384 --update-epochs 10 --learning-rate 1e-2 "
    weights = final_weights(run("ppo_mujoco", flags + "--capacity-interval 0"))
    agent = make_agent(obs_dim=3)
    agent.load_state_dict(weights)
    times = torch.linspace(-1, 0.8, 10)
    with torch.no_grad():
        values = agent(torch.stack([torch.zeros(10), torch.zeros(10), times], 1))[1]
    assert low < values.mean() < high
    if limit == "terminate":
        expected = (1 - 0.9 ** torch.arange(10, 0, -1)) / 0.1
        torch.testing.assert_close(values, expected, atol=0.7, rtol=0)


@pytest.mark.parametrize(
    "script, flags",
    [
        ("ppo_mujoco", ""),
        ("ppo_toy", "--num-steps 32"),
        ("ppo_atari", "--max-episode-frames 30 --time-limit bootstrap"),
    ],
)
def test_the_next_values_are_those_of_the_true_next_observations(run, monkeypatch, script, flags):
    """Every next value that GAE gets is the critic's for what the step led to: at an episode's end
    its last observation."""
    module = importlib.import_module(script)
    step, evaluate, compute_gae = module.Envs.step, module.evaluate, module.compute_gae
    steps, agents, ends = [], [], 0

    def recording_step(self, actions):
        next_obs, *outcome = step(self, actions)
        if script == "ppo_toy":
            true_obs, ended = outcome[0], np.logical_or(*outcome[2:])
        else:
            true_obs, ended = np.array(next_obs), np.logical_or(*outcome[1:3])
            true_obs[ended] = outcome[3] or 0
        for i in np.flatnonzero(ended):
            assert not np.array_equal(true_obs[i], next_obs[i])
        steps.append((true_obs, ended))
        return next_obs, *outcome

    def checking_gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda):
        nonlocal ends
        for t, (true_obs, ended) in enumerate(steps[-len(rewards) :]):
            expected = agents[-1](torch.from_numpy(true_obs))[1]
            torch.testing.assert_close(next_values[t], expected.detach(), rtol=1e-3, atol=1e-4)
            assert dones[t].tolist() == ended.tolist()
            ends += ended.sum()
        return compute_gae(rewards, values, next_values, terminations, dones, gamma, gae_lambda)

    monkeypatch.setattr(module.Envs, "step", recording_step)
    monkeypatch.setattr(
        module, "evaluate", lambda agent, *args: agents.append(agent) or evaluate(agent, *args)
    )
    monkeypatch.setattr(module, "compute_gae", checking_gae)
    run(script, flags + " --capacity-interval 0")
    assert ends >= 4


def test_a_masked_reward_is_not_learned_but_logged(run):
    flags = "--env-id probe_envs:Clock-v0 --reward-keep-prob 0 --total-timesteps 4096 "
    run_dir = run("ppo_mujoco", flags + "--num-steps 128 --capacity-interval 0")
    scalars = read_scalars(run_dir)
    assert scalars["charts/episodic_return"][-1][1] == 10  # raw
    assert scalars["losses/value_loss"][-1][1] < 0.02  # nothing to predict


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_can_be_read_in_the_terminal(run, capsys, script):
    """A header, a row every 2.5 % of the run with what was logged last, the folder and the command
    that shows its curves; 80 columns are enough."""
    run_dir = run(script)
    lines = capsys.readouterr().out.splitlines()
    (header,) = (i for i, line in enumerate(lines) if line.split()[:1] == ["step"])
    columns = importlib.import_module(script).Run.columns
    assert re.split("  +", lines[header].strip()) == ["step", *columns]
    rows = [line for line in lines[header + 1 :] if re.match(r" *[\d,]+ ", line)]
    assert max(map(len, (lines[header], *rows))) <= 79
    rows = [row.replace(",", "").split() for row in rows]
    steps = [int(row[0]) for row in rows]
    assert steps == sorted(set(steps)) and steps[-1] == read_args(run_dir)["total_timesteps"]
    assert 8 <= len(rows) <= 40 and all(len(row) == 1 + len(columns) for row in rows)
    scalars = read_scalars(run_dir)
    for cell, tag in list(zip(rows[-1][1:], columns.values()))[1:]:  # a return may be older
        assert float(cell) == pytest.approx(scalars[tag][-1][1], rel=1e-3, nan_ok=True), tag
    assert str(run_dir) in lines[-1] and f"tensorboard --logdir {run_dir.parent}" in lines[-1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_tensorboard_has_the_flags_as_a_text_and_in_its_own_tab(run, script):
    run_dir = run(script, "--pfo-coef 3 --seed 5")
    events = EventAccumulator(str(run_dir))
    events.Reload()
    (tag,) = (tag for tag in events.Tags()["tensors"] if "hyperparameters" in tag)
    text = events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
    for name, value in read_args(run_dir).items():
        assert f"|{name}|{value}|" in text
    assert max(map(text.index, ("|pfo_coef|", "|seed|"))) < text.index("|gamma|")  # given: first
    assert "_hparams_/experiment" in events.PluginTagToContent("hparams")


def to_a_full_disk():
    for number in (1, 2):
        os.dup2(os.open("/dev/full", os.O_WRONLY), number)


def to_an_ascii_terminal():
    sys.stdout.reconfigure(encoding="ascii", errors="strict")


def to_closed_streams():
    sys.stdout = sys.stderr = None


def to_a_notebook():
    sys.stdout = sys.stderr = io.StringIO()


MAY_FAIL = (to_a_full_disk, to_an_ascii_terminal)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("prepare", [*MAY_FAIL, to_closed_streams, to_a_notebook])
def test_output_that_cannot_be_written_loses_nothing(tmp_path, finished, script, prepare):
    """`>&- 2>&-`, and `%run` in a notebook, whose streams are no files, are no reason to end. Other
    runs may end, with a line where there is a place for it, and are resumed."""
    words = f"{SMALL[script]} --runs-dir {tmp_path} --run-name läuft→"
    process = call(script, words, prepare=prepare)
    assert process.returncode == 0 or prepare in MAY_FAIL
    if process.returncode and prepare is to_an_ascii_terminal:
        assert "ascii" in process.stderr and "läuft" in process.stderr.splitlines()[-1]
    if process.returncode and script != "ppo_toy":
        process = call(script, f"--runs-dir {tmp_path} --run-name läuft→ --resume")
    if script != "ppo_toy" or prepare not in MAY_FAIL:
        assert process.returncode == 0
        assert same_weights(tmp_path / "läuft→", finished(script))


def stop_the_clock():
    now = time.time()
    time.time = lambda: now


@pytest.mark.parametrize("script", SCRIPTS)
def test_names_that_are_not_given_hold_the_changed_flags_and_do_not_collide(tmp_path, script):
    """cleanrl#256: also if runs start in the same second."""
    words = f"{SMALL[script]} --runs-dir {tmp_path} --capacity-interval 0 --pfo-coef "
    runs = [Process(script, words + coef, prepare=stop_the_clock) for coef in ("0", "1", "1")]
    assert [process.wait().returncode for process in runs] == [0, 0, 0]
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 3 and sum("pfo_coef=1" in name for name in names) == 2
    for name in names:
        assert script in name and read_args(tmp_path / name)["run_name"] == name


def pretend_wandb(login):
    def init(name, id, **settings):
        if not login:
            raise RuntimeError("api_key not configured (no-tty)")
        assert re.fullmatch(r"[A-Za-z0-9_-]+", id), id
        print("wandb id ok")

    sys.modules["wandb"] = SimpleNamespace(init=init, __spec__=SimpleNamespace())


def test_weights_and_biases(tmp_path):
    """Without a login nothing is created. wandb PR 4191: its ids take letters, digits, - and _
    only; the run keeps its name."""
    words = [*SMALL["ppo_mujoco"].split(), "--runs-dir", tmp_path, "--run-name", "ü → x", "--track"]
    process = call("ppo_mujoco", words, prepare=functools.partial(pretend_wandb, login=False))
    assert "not configured" in message(process, 2) and not list(tmp_path.iterdir())
    process = call("ppo_mujoco", words, prepare=functools.partial(pretend_wandb, login=True))
    assert "wandb id ok" in fine(process).stdout and (tmp_path / "ü → x" / "latest.pt").exists()


def test_the_real_thing(tmp_path):
    """`python ppo_mujoco.py` in a process that shares nothing with the tests."""
    words = f"{SMALL['ppo_mujoco']} --runs-dir {tmp_path} --run-name run --capacity-interval 0"
    command = [sys.executable, ROOT / "ppo_mujoco.py", *words.split()]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1].startswith(f"{tmp_path / 'run'} is finished")
    refused = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert refused.returncode == 2 and len(refused.stderr.splitlines()) == 1

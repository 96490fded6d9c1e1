"""Tasks that do what real ones were reported to do, in the scripts that take any task."""

import functools
import re

import numpy as np
import probe_envs
import pytest
import torch
from ale_py.vector_env import AtariVectorEnv
from conftest import (
    SMALL,
    call,
    checkpoints,
    fault_at,
    final_weights,
    make_envs,
    message,
    one_line,
    read_scalars,
    same_scalars,
    same_weights,
)

SCRIPTS = ("ppo_mujoco", "ppo_toy")


def task(script, name):
    """The flag for a task of probe_envs.py."""
    return f"--env-id probe_envs:{name}{'Discrete' * (script == 'ppo_toy')}-v0"


def train(script, name, folder, more="", **kwargs):
    words = f"{SMALL[script]} {task(script, name)} --runs-dir {folder} --run-name run {more}"
    return call(script, words, **kwargs)


def resume(folder, **kwargs):
    return call("ppo_mujoco", f"--runs-dir {folder} --run-name run --resume", **kwargs)


def break_task(step, failure):
    probe_envs.Broken.fail_at, probe_envs.Broken.failure = step, failure


FAILURES = {
    "raise in step": "the joint came off",
    "raise, then exit in close": "the joint came off",
    "exit in step": "exit",
    "exit in reset": "exit",
    "observe less": "observ",
    "reward nothing": "NoneType",
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_task_that_fails_ends_the_run_with_the_reason(tmp_path, finished, script, failure):
    """A simulator exits when its window is closed: a cluster took such a run for finished."""
    early = tmp_path / "early"
    process = train(script, "Broken", early, prepare=functools.partial(break_task, 10, failure))
    assert FAILURES[failure] in message(process, 1 if early.exists() else 2)
    assert script == "ppo_toy" or not early.exists()
    late = train(script, "Broken", tmp_path, prepare=functools.partial(break_task, 400, failure))
    assert FAILURES[failure] in message(late, 1) and str(tmp_path) in message(late, 1)
    if script == "ppo_mujoco":
        assert resume(tmp_path).returncode == 0
        whole = finished(script, task(script, "Broken"))
        assert same_weights(tmp_path / "run", whole) and same_scalars(tmp_path / "run", whole)


def test_parameters_that_are_not_finite_end_the_run(tmp_path, finished):
    nan = functools.partial(break_task, 400, "observe NaN")
    line = one_line(train("ppo_mujoco", "Broken", tmp_path, prepare=nan), 1)
    assert "not finite" in line and "observations" in line and "diverged.pt" in line
    run_dir = tmp_path / "run"
    diverged = torch.load(run_dir / "checkpoints" / "diverged.pt", weights_only=True)
    assert not all(p.isfinite().all() for p in diverged["agent"].values())
    latest = torch.load(run_dir / "latest.pt", weights_only=True)
    assert latest["global_step"] < diverged["global_step"]
    assert all(p.isfinite().all() for p in latest["agent"].values())
    assert all(p.isfinite().all() for p in final_weights(run_dir).values())
    points = read_scalars(run_dir)["representation/actor/pca_rank"]
    assert points[0][1] > 0 and points[-1][1] != points[-1][1]  # NaN at the end
    assert resume(tmp_path).returncode == 0  # by a task that is mended
    assert same_weights(run_dir, finished("ppo_mujoco", task("ppo_mujoco", "Broken")))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_thread_of_a_task_does_not_keep_the_process_alive(tmp_path, script):
    """ray#8030, baselines#845: `close` is called at the end, after a fault and after a refusal."""
    assert train(script, "Worker", tmp_path / "a").returncode == 0
    fault = fault_at("torch.utils.tensorboard:SummaryWriter.add_scalar", 60, "disk full")
    assert "No space left" in message(train(script, "Worker", tmp_path / "b", prepare=fault), 1)
    (tmp_path / "file").touch()
    message(train(script, "Worker", tmp_path / "file"), 2)


def tell_close(fault):
    close = AtariVectorEnv.close
    AtariVectorEnv.close = lambda self: print("closed", id(self), flush=True) or close(self)
    if fault:
        fault_at("os:fsync", 6, fault)()


@pytest.mark.parametrize("fault", ["", "disk full"])
def test_atari_games_are_closed(tmp_path, fault):
    words = f"{SMALL['ppo_atari']} --runs-dir {tmp_path} --total-timesteps 96"
    process = call("ppo_atari", words, prepare=functools.partial(tell_close, fault))
    assert process.returncode == bool(fault)
    closed = set(re.findall(r"closed \d+", process.stdout))
    assert len(closed) == 2  # the run's, and those of the capacity data


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_task_may_draw_from_the_generator_of_torch(run, capsys, script):
    """Then training is still the same with the capacity loss off. Two environments that share a
    generator do not repeat their episodes, which a resumed run says."""
    flags = task(script, "DrawsTorch")
    whole = run(script, flags, name="whole")
    assert same_weights(whole, run(script, f"{flags} --capacity-interval 0", name="off"))
    if script == "ppo_mujoco":
        run(script, f"{flags} --resume --total-timesteps 576", name="whole")
        assert "the task does not repeat its episodes" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["OtherPlaces", "OtherRewards", "TakesTheAction"])
def test_a_task_that_does_not_repeat_its_episodes_is_named(run, finished, capsys, name):
    """Gymnasium#728: BipedalWalker. The run continues, and the line says why it will differ. A task
    that changes the action that it is given repeats them (maddpg-pytorch#41)."""
    flags, repeats = task("ppo_mujoco", name), name == "TakesTheAction"
    run("ppo_mujoco", f"{flags} --total-timesteps 256")
    assert "repeat" not in capsys.readouterr().err
    run_dir = run("ppo_mujoco", f"{flags} --resume")
    said = capsys.readouterr().err
    assert ("the task does not repeat its episodes" in said) != repeats
    assert max(checkpoints(run_dir)) == 512
    assert not repeats or same_weights(run_dir, finished("ppo_mujoco", flags))


@pytest.mark.parametrize("name", ["Arrays", "OneArray"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_task_may_return_arrays_of_one_element_or_its_own_array(run, finished, script, name):
    """garage PR 2089; dm_control#34, SuperSuit#116, baselines#418: training stays the same."""
    plain, other = finished(script, task(script, "Drift")), run(script, task(script, name))
    assert same_weights(plain, other) and same_scalars(plain, other)


@pytest.mark.parametrize("name", ["Picky64", "PickyBounds"])
@pytest.mark.parametrize("flags", [{}, {"action_logprob": "sampled"}, {"policy": "gaussian"}])
def test_actions_stay_inside_the_space_in_its_own_precision(name, flags):
    """Minari#127, PettingZoo#1000, ray#23895. The task raises if one does not."""
    envs = make_envs(f"probe_envs:{name}-v0", **flags)
    envs.reset()
    for u in (-1e9, -40, -9, -0.3, 0.0, 0.2, 9, 40, 1e9):
        envs.step(np.full((2, 2), u, np.float32))
    assert {action.dtype for actions in envs.actions for action in actions} == {envs.low.dtype}

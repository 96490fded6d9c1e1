"""Tasks that do what real ones were reported to do, in the scripts that take any task."""

import functools
import re
import sys

import numpy as np
import pytest
import torch
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
    import probe_envs

    probe_envs.Broken.fail_at, probe_envs.Broken.failure = step, failure


FAILURES = {
    "raise in step": "the joint came off",
    "raise in reset": "the joint came off",
    "raise, then exit in close": "the joint came off",
    "exit in step": "exit",
    "exit in reset": "exit",
    "observe less": "observ",
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


def add_path(folder):
    sys.path.insert(0, folder)


@pytest.mark.parametrize("where", ["at its import", "in its constructor"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_task_that_exits_while_it_is_made(tmp_path, script, where):
    code = "def make(**_): raise SystemExit\n__import__('gymnasium').register('T-v0', make)"
    code = "raise SystemExit" if "import" in where else code
    (tmp_path / "exiting.py").write_text(code)
    words = f"{SMALL[script]} --env-id exiting:T-v0 --runs-dir {tmp_path}/runs"
    process = call(script, words, prepare=functools.partial(add_path, str(tmp_path)))
    assert "exiting:T-v0" in one_line(process, 2) and "SystemExit" in one_line(process, 2)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["NoReward", "Gym021"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_task_with_another_interface_is_refused(tmp_path, script, name):
    process = train(script, name, tmp_path / "runs")
    assert "Error" in message(process, 1 if (tmp_path / "runs").exists() else 2)
    assert script == "ppo_toy" or not (tmp_path / "runs").exists()


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


def tell_close():
    import ale_py.vector_env

    Env, close = ale_py.vector_env.AtariVectorEnv, ale_py.vector_env.AtariVectorEnv.close
    Env.close = lambda self: print("closed", id(self), flush=True) or close(self)


@pytest.mark.parametrize("fault", ["", "disk full"])
def test_atari_games_are_closed(tmp_path, fault):
    words = f"{SMALL['ppo_atari']} --runs-dir {tmp_path} --total-timesteps 96"
    prepare = functools.partial(both, tell_close, fault_at("os:fsync", 6 if fault else 999, fault))
    process = call("ppo_atari", words, prepare=prepare)
    assert process.returncode == bool(fault)
    closed = set(re.findall(r"closed \d+", process.stdout))
    assert len(closed) == 2  # the run's, and those of the capacity data


def both(*functions):
    for function in functions:
        function()


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


@pytest.mark.parametrize("name", ["OtherPlaces", "OtherRewards"])
def test_a_task_that_does_not_repeat_its_episodes_is_named(run, capsys, name):
    """Gymnasium#728: BipedalWalker. The run continues, and the line says why it will differ."""
    flags = task("ppo_mujoco", name)
    run("ppo_mujoco", f"{flags} --total-timesteps 256")
    assert "repeat" not in capsys.readouterr().err
    run_dir = run("ppo_mujoco", f"{flags} --resume")
    said = capsys.readouterr().err
    assert "the task does not repeat its episodes" in said and max(checkpoints(run_dir)) == 512


def test_a_task_may_change_the_action_that_it_is_given(run, finished, capsys):
    """maddpg-pytorch#41: half a run and the rest of it are the whole run."""
    flags = task("ppo_mujoco", "TakesTheAction")
    whole = finished("ppo_mujoco", flags)
    run("ppo_mujoco", f"{flags} --total-timesteps 256")
    assert same_weights(whole, run("ppo_mujoco", f"{flags} --resume"))
    assert "repeat" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["Arrays", "OneArray"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_task_may_return_arrays_of_one_element_or_its_own_array(run, finished, script, name):
    """garage PR 2089; dm_control#34, SuperSuit#116, baselines#418: training stays the same."""
    plain, other = finished(script, task(script, "Drift")), run(script, task(script, name))
    assert same_weights(plain, other) and same_scalars(plain, other)


def test_statistics_are_float64():
    """numpy#14691, scikit-learn#12333: a constant has scale 1 and its own value as mean."""
    envs = make_envs("probe_envs:Constants-v0", obs_norm_steps=4000)
    assert envs.obs_std[2:].tolist() == [1, 1]
    exact = [float(np.float32(0.1)), float(np.float32(1234.567))]
    assert envs.obs_mean[2:].tolist() == pytest.approx(exact, rel=1e-12)
    assert np.abs(envs.reset()[:, 2:]).max() < 1e-9


def test_mujoco_observations_keep_their_bits():
    envs = make_envs("Hopper-v4")
    envs.reset()
    np.testing.assert_array_equal(envs.raw_obs[0], envs.envs[0].unwrapped._get_obs())


@pytest.mark.parametrize("name", ["Picky64", "PickyBounds"])
@pytest.mark.parametrize("flags", [{}, {"action_logprob": "sampled"}, {"policy": "gaussian"}])
def test_actions_stay_inside_the_space_in_its_own_precision(name, flags):
    """Minari#127, PettingZoo#1000, ray#23895. The task raises if one does not."""
    envs = make_envs(f"probe_envs:{name}-v0", **flags)
    envs.reset()
    for u in (-1e9, -40, -9, -0.3, 0.0, 0.2, 9, 40, 1e9):
        envs.step(np.full((2, 2), u, np.float32))
    assert {action.dtype for actions in envs.actions for action in actions} == {envs.low.dtype}


def test_no_random_bounds_are_overstepped():
    rng = np.random.default_rng(0)
    envs = make_envs("probe_envs:PickyBounds-v0", num_envs=1)
    for _ in range(100):
        low, high = np.sort(rng.normal(size=(2, 2)).astype(np.float32), 0)
        space = type(envs.envs[0].action_space)(low, high)
        envs.envs[0].unwrapped.action_space = space
        envs.low, envs.high = low, high
        envs.middle, envs.half_width = (high + low) / 2, (high - low) / 2
        envs.reset()
        for u in (-20, 20):
            envs.step(np.full((1, 2), u, np.float32))

"""The environments of ppo_mujoco.py."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import make_envs

import ppo_mujoco as script


def random_actions(envs, num_steps, seed=0):
    shape = num_steps, len(envs.envs), envs.action_dim
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def mujoco_ids():
    specs = gym.registry.items()
    return sorted(x for x, spec in specs if "gymnasium.envs.mujoco" in str(spec.entry_point))


@pytest.mark.parametrize("env_id", [*mujoco_ids(), "Pendulum-v1"])
def test_every_registered_mujoco_task_steps_or_is_refused(env_id, capsys):
    try:
        envs = make_envs(env_id, num_envs=1, obs_norm_steps=2)
    except SystemExit as stop:
        assert stop.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert env_id in line and not env_id.endswith("-v5")  # mujoco-py is gone; Pusher-v4's file
        return
    obs = envs.reset()
    assert obs.dtype == np.float32 and obs.shape == (1, envs.obs_dim)
    obs, *_ = envs.step(random_actions(envs, 1)[0])
    assert np.isfinite(obs).all()


def test_observation_statistics_are_those_of_uniform_random_steps():
    envs = make_envs("Hopper-v4", obs_norm_steps=1000)
    rng, env = np.random.default_rng([1, 0]), gym.make("Hopper-v4")
    observations, (obs, _) = [], env.reset(seed=int(rng.integers(2**31)))
    for _ in range(1000):
        observations.append(obs)
        obs, _, terminated, truncated, _ = env.step(rng.uniform(-1, 1, 3).astype(np.float32))
        if terminated or truncated:
            obs, _ = env.reset(seed=int(rng.integers(2**31)))
    assert envs.obs_mean.dtype == envs.obs_std.dtype == np.float64
    np.testing.assert_allclose(envs.obs_mean, np.mean(observations, 0), rtol=1e-12)
    np.testing.assert_allclose(envs.obs_std, np.std(observations, 0), rtol=1e-12)


def test_constant_dimensions_keep_scale_1():
    envs = make_envs("probe_envs:Clock-v0")
    assert envs.obs_std[1] == 1 and envs.obs_mean[1] == 3 and envs.reset()[0, 1] == 0
    humanoid = make_envs("Humanoid-v4", obs_norm_steps=300)
    assert (humanoid.obs_std == 1).sum() >= 41 and humanoid.obs_std.min() > 1e-6


def test_the_time_feature_runs_from_minus_1_to_1():
    envs = make_envs("probe_envs:Clock-v0", num_envs=1)
    times = [envs.reset()[0, -1]]
    for actions in random_actions(envs, 10):
        obs, _, terminations, truncations, final_obs = envs.step(actions)
        times.append(obs[0, -1])
    assert times[:10] == pytest.approx(np.linspace(-1, 1, 11)[:10].tolist())
    assert times[10] == -1 and truncations == (True,) and terminations == (False,)
    assert final_obs[0][-1] == 1
    assert make_envs("probe_envs:Counter-v0").obs_dim == 2  # no limit, no time


def test_final_observations_and_statistics_of_every_episode():
    obs_stats = {"mean": torch.zeros(2), "std": torch.ones(2)}
    envs = make_envs("probe_envs:Counter-v0", obs_stats=obs_stats)
    envs.reset()
    for step, actions in enumerate(random_actions(envs, 17), start=1):
        obs, rewards, terminations, truncations, final_obs = envs.step(actions)
        ended = step % 5 == 0
        assert terminations == (ended, ended) and truncations == (False, False)
        assert rewards == ((step - 1) % 5 + 1,) * 2
        assert [o.tolist() for o in final_obs] == ([[5, (step + 4) // 5]] * 2 if ended else [])
        # after an end the first observation of the next episode
        assert obs[:, 0].tolist() == [step % 5] * 2
    assert envs.finished == [(15.0, 5)] * 6


@pytest.mark.parametrize(
    "policy, expected",
    [
        ("tanh_normal", [[[-1, 1]], [[-3, -1 + 2 * np.tanh(0.5)]]]),
        ("gaussian", [[[0, 1]], [[-3, 0.5]]]),
    ],
)
def test_actions_reach_the_task_within_its_bounds(policy, expected):
    envs = make_envs("probe_envs:Counter-v0", policy=policy)  # its bounds are -3 and 1
    envs.reset()
    envs.step(np.array([[0.0, 100.0], [-100.0, 0.5]], np.float32))
    np.testing.assert_allclose(envs.actions, expected, rtol=1e-6)


@pytest.mark.parametrize("env_id", ["Hopper-v4", "HalfCheetah-v4", "Ant-v4", "Humanoid-v4"])
def test_replayed_episodes_continue_bit_for_bit(env_id):
    envs = make_envs(env_id)
    other = make_envs(env_id, seed=5, obs_stats=envs.obs_stats)
    envs.reset()
    actions = random_actions(envs, 60)
    for step in range(40):
        envs.step(actions[step])
    state = envs.state_dict()
    assert np.array_equal(other.load_state_dict(state, envs.obs_stats, False), envs.observe())
    for step in range(40, 60):
        for ours, theirs in zip(envs.step(actions[step]), other.step(actions[step])):
            np.testing.assert_array_equal(ours, theirs)
    assert envs.finished == other.finished and envs.returns == other.returns


def test_every_episode_has_a_seed_of_its_own():
    envs = make_envs("probe_envs:Target-v0", num_envs=3)
    envs.reset()
    seeds = set(envs.seeds)
    for actions in random_actions(envs, 20):
        envs.step(actions)
        seeds |= set(envs.seeds)
    assert len(seeds) == 3 * 21


def test_collected_states_are_what_the_agent_visits():
    envs = make_envs("Hopper-v4", num_envs=4)
    agent = script.Agent(envs, script.Args())
    states, index = envs.collect(agent, 100, seed=0)
    assert states.shape == (100, envs.obs_dim) and index.tolist() == list(range(100))
    assert len({tuple(state.tolist()) for state in states}) == 100
    again, _ = make_envs("Hopper-v4", num_envs=4).collect(agent, 100, seed=0)
    assert np.array_equal(states, again)

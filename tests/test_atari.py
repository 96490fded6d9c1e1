"""The environments and the networks of ppo_atari.py."""

import re
from pathlib import Path

import ale_py
import cv2
import numpy as np
import pytest
import torch
import torch.nn as nn
from ale_py import roms

import ppo_atari as script

ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)


def make_envs(num_envs=2, stream=0, **flags):
    return script.Envs(script.Args(env_threads=1, **flags), num_envs, stream)


def play(game, seed, actions, frameskip, sticky, maxpool):
    """The documented pipeline on a single emulator: gray frames (84, 84) and rewards by action."""
    emulator = ale_py.ALEInterface()
    emulator.setFloat("repeat_action_probability", sticky)
    emulator.setInt("random_seed", seed)
    emulator.loadROM(roms.get_rom_path(game))
    emulator.reset_game()
    legal = emulator.getMinimalActionSet()

    def screen():
        return emulator.getScreenGrayscale().reshape(emulator.getScreenDims())

    frames, rewards = [screen()], []
    for action in actions:
        reward, shown = 0, []
        for _ in range(frameskip):
            reward += emulator.act(legal[action])
            shown.append(screen())
        frames.append(np.maximum(*shown[-2:]) if maxpool else shown[-1])
        rewards.append(reward)
    return [cv2.resize(frame, (84, 84), interpolation=cv2.INTER_AREA) for frame in frames], rewards


@pytest.mark.parametrize("env_id, game", [("ALE/Phoenix-v5", "phoenix"), ("ALE/Pong-v5", "pong")])
@pytest.mark.parametrize("sticky", [0.0, 0.25])
@pytest.mark.parametrize("frameskip, maxpool", [(3, False), (4, True)])
def test_preprocessing_is_the_documented_pipeline(env_id, game, sticky, frameskip, maxpool):
    envs = make_envs(env_id=env_id, sticky=sticky, frameskip=frameskip, maxpool=maxpool)
    observations, rewards = [envs.reset()], []
    assert observations[0].shape == (2, 4, 84, 84) and observations[0].dtype == np.uint8
    actions = np.random.default_rng(0).integers(0, envs.action_dim, (150, 2))
    for action in actions:
        next_obs, reward, terminations, truncations, _ = envs.step(action)
        observations.append(next_obs)
        rewards.append(reward)
        assert not terminations.any() and not truncations.any()
    for i in range(2):
        frames, raw_rewards = play(game, envs.seeds[i], actions[:, i], frameskip, sticky, maxpool)
        frames = [np.zeros((84, 84), np.uint8)] * 3 + frames  # nothing before the first frame
        for t, obs in enumerate(observations):
            np.testing.assert_array_equal(obs[i], frames[t : t + 4])
        np.testing.assert_array_equal(np.array(rewards)[:, i], np.sign(raw_rewards))
        assert envs.returns[i] == sum(raw_rewards)  # raw
        assert game != "phoenix" or any(abs(reward) > 1 for reward in raw_rewards)


def test_the_settings_are_the_papers():
    args = script.Args()
    assert (args.frameskip, args.sticky, args.maxpool, args.noop_max) == (3, 0.25, False, 0)
    assert (args.fire_reset, args.episodic_life, args.sign_reward) == (False, False, True)
    assert args.max_episode_frames == 108_000


def test_every_episode_is_right_and_can_be_replayed_from_its_seed_and_actions():
    """Games of a vector of 3 against single emulators: length, return, last and first frames."""
    envs = make_envs(3)
    next_obs, rng, checked = envs.reset(), np.random.default_rng(0), 0
    while checked < 4:
        seeds, played = envs.seeds.copy(), [list(actions) for actions in envs.actions]
        actions = rng.integers(0, envs.action_dim, 3)
        last_obs, returns, count = next_obs, envs.returns.copy(), len(envs.finished)
        next_obs, _, terminations, truncations, final_obs = envs.step(actions)
        for k, i in enumerate(np.flatnonzero(terminations | truncations)):
            frames, rewards = play("phoenix", seeds[i], [*played[i], actions[i]], 3, 0.25, False)
            assert envs.finished[count + k] == (sum(rewards), len(played[i]) + 1)
            assert returns[i] == sum(rewards[:-1])
            np.testing.assert_array_equal(last_obs[i], frames[-5:-1])
            np.testing.assert_array_equal(final_obs[k][:3], frames[-4:-1])
            assert not next_obs[i][:3].any() and next_obs[i][3].any()  # the next game's first
            assert envs.actions[i] == [] and envs.returns[i] == 0 and envs.seeds[i] != seeds[i]
            checked += 1


@pytest.mark.parametrize("limit, steps, episodic_life", [(60, 20, False), (61, 21, True)])
def test_the_last_observation_before_a_time_limit_is_true(limit, steps, episodic_life):
    """Two games, one of them begun 7 steps later, against single emulators."""
    envs = make_envs(2, max_episode_frames=limit, episodic_life=episodic_life)
    envs.reset()
    actions = np.random.default_rng(2).integers(0, 8, (2 * steps + 14, 2))
    for action in actions[:7]:
        envs.step(action)
    envs.start_next(np.array([False, True]))
    ends, finished = [0, 0], len(envs.finished)
    for action in actions[7:]:
        played = [[*past, now] for past, now in zip(envs.actions, action)]
        seeds = envs.seeds.copy()
        next_obs, _, terminations, truncations, final_obs = envs.step(action)
        assert not terminations.any()
        over = [len(past) == steps for past in played]
        assert truncations.tolist() == over and len(final_obs) == sum(over)
        for i, obs in zip(np.flatnonzero(over), final_obs):
            frames, _ = play("phoenix", seeds[i], played[i], 3, 0.25, False)
            frames = [np.zeros((84, 84), np.uint8)] * 3 + frames
            np.testing.assert_array_equal(obs, frames[-4:])
            np.testing.assert_array_equal(next_obs[i, :3], 0)
            assert not np.array_equal(obs[-1], obs[-2])  # the games move
            assert len(envs.actions[i]) == 0 and envs.seeds[i] != seeds[i]
            ends[i] += 1
    assert min(ends) >= 2 and len(envs.finished) - finished == sum(ends)
    assert {length for _, length in envs.finished} == {steps}


@pytest.mark.parametrize("flags", [{"noop_max": 10}, {"fire_reset": True}])
def test_what_begins_a_game_does_not_count_to_its_limit(flags):
    envs = make_envs(1, env_id="ALE/Breakout-v5", max_episode_frames=30, **flags)
    envs.reset()
    for _ in range(20):
        envs.step(np.array([0]))
    assert [length for _, length in envs.finished] == [10, 10]


BREAKOUT, ADVENTURE = {"env_id": "ALE/Breakout-v5"}, {"env_id": "ALE/Adventure-v5", "frameskip": 12}


@pytest.mark.parametrize("flags, losses", [(BREAKOUT, 4), (ADVENTURE, 0)])
def test_the_loss_of_a_life_ends_the_return_but_not_the_game(flags, losses):
    """Breakout ends with the last of five lives, Adventure with a life that is left."""
    envs, plain = make_envs(1, episodic_life=True, **flags), make_envs(1, **flags)
    envs.reset()
    plain.reset()
    rng, ends, plain_ends = np.random.default_rng(0), 0, 0
    while not plain.finished:
        actions = rng.integers(0, envs.action_dim, 1)
        obs, _, terminations, _, final_obs = envs.step(actions)
        plain_obs, _, plain_terminations, *_ = plain.step(actions)
        np.testing.assert_array_equal(obs[:, -1], plain_obs[:, -1])  # the same game goes on
        assert len(final_obs) == terminations.sum()
        ends, plain_ends = ends + terminations.sum(), plain_ends + plain_terminations.sum()
    assert (ends, plain_ends) == (losses + 1, 1)
    assert envs.finished == plain.finished and envs.actions == [[]]


def test_lives_tell_a_lost_life_from_the_end_of_a_game(monkeypatch):
    envs = make_envs(1, episodic_life=True)
    obs, yes, no = envs.reset(), np.array([True]), np.array([False])
    assert envs.lives == [5]
    for lives, games in ((4, 0), (4, 1)):  # the second time nothing was lost but the game
        outcome = obs, np.zeros(1, np.int32), yes, no, {"lives": np.array([lives])}
        monkeypatch.setattr(envs.envs, "step", lambda actions, outcome=outcome: outcome)
        envs.step(np.array([0]))
        assert len(envs.finished) == games


def restored(envs, state, reseeded=False):
    return envs.load_state_dict(state, {}, reseeded)


@pytest.mark.parametrize("flags", [{}, {"max_episode_frames": 600, "episodic_life": True}])
def test_a_restored_vector_goes_on_bit_for_bit(flags):
    envs, other = make_envs(3, **flags), make_envs(3, seed=9, **flags)
    next_obs = envs.reset()
    actions = np.random.default_rng(1).integers(0, 8, (1000, 3))
    for step in range(900):
        next_obs, *_ = envs.step(actions[step])
    assert envs.finished and envs.actions[0] != envs.actions[1]
    next_obs_copy, state = next_obs.copy(), envs.state_dict()
    next_obs[:] = 0  # what was handed out is the caller's
    np.testing.assert_array_equal(restored(other, state), next_obs_copy)
    np.testing.assert_array_equal(state["obs"], next_obs_copy)
    for step in range(900, 1000):
        for ours, theirs in zip(envs.step(actions[step]), other.step(actions[step])):
            np.testing.assert_array_equal(ours, theirs)
    for name in ("finished", "actions", "returns", "seeds", "lives"):
        assert repr(getattr(envs, name)) == repr(getattr(other, name))
    assert envs.mask_rng.random() == other.mask_rng.random()


OTHER_GAMES = [{"sticky": 0.1}, {"frameskip": 4}, {"maxpool": True}, {"noop_max": 5}]
SAME_GAMES = [{"max_episode_frames": 90}, {"episodic_life": True}, {"sign_reward": False}]


@pytest.mark.parametrize("flags", [*OTHER_GAMES, {"fire_reset": True}, *SAME_GAMES])
def test_a_fork_with_a_setting_that_decides_frames_starts_new_games(flags):
    envs, fork = make_envs(2), make_envs(2, **flags)
    envs.reset()
    for _ in range(40):
        envs.step(np.array([1, 2]))
    state = envs.state_dict()
    obs = restored(fork, state)
    if flags in SAME_GAMES:
        np.testing.assert_array_equal(obs, state["obs"])
        assert fork.actions == envs.actions
        fork.step(np.array([0, 0]))
        assert len(fork.finished) == 2 * ("max_episode_frames" in flags)
    else:
        np.testing.assert_array_equal(obs[:, :3], 0)
        assert fork.actions == [[], []] and not set(fork.seeds) & set(envs.seeds)
        assert fork.state_dict()["settings"] != state["settings"]


def test_a_fork_with_more_or_fewer_games_starts_new_ones_and_reseeds():
    envs = make_envs(2)
    envs.reset()
    envs.step(np.array([1, 2]))
    state = envs.state_dict()
    for num_envs in (1, 3):
        fork = make_envs(num_envs)
        obs = restored(fork, state)
        assert obs.shape == (num_envs, 4, 84, 84) and not obs[:, :3].any()
        assert fork.actions == [[] for _ in range(num_envs)]
        assert not set(fork.seeds) & set(envs.seeds)  # the generator went on
    fork = make_envs(2, seed=9)
    draws = np.random.default_rng([9, 0]).integers(2**31, size=2)
    restored(fork, state, reseeded=True)
    np.testing.assert_array_equal(fork.seeds, envs.seeds)  # the games that go on
    fork.reset()
    np.testing.assert_array_equal(fork.seeds, draws)


def test_a_state_of_another_emulator_is_told(capsys):
    envs = make_envs(1)
    envs.reset()
    envs.step(np.array([0]))
    state = envs.state_dict()
    other_obs = state["obs"].clone()
    other_obs[0, 3, 40, 40] += 1
    for changed in ({}, {"obs": other_obs}, {"returns": [1.0]}):
        restored(make_envs(1), state | changed)
        said = capsys.readouterr().err
        assert ("the task does not repeat its episodes" in said) == bool(changed)


def make_agent(**flags):
    torch.manual_seed(0)
    return script.Agent(make_envs(1), script.Args(**flags))


def random_obs(num_obs):
    return torch.randint(0, 256, (num_obs, 4, 84, 84), dtype=torch.uint8)


def test_the_network_is_the_papers():
    agent, every = make_agent(), make_agent(pfo_layers="all")
    obs = random_obs(3)
    out = agent(obs)
    assert out.policy.shape == (3, 8) and out.values.shape == (3,)
    torch.testing.assert_close(out.policy.exp().sum(1), torch.ones(3))
    x, before = obs / 255, []
    for layer in agent.actor_trunk:
        if isinstance(layer, nn.ReLU):
            before.append(x)
        x = layer(x)
    assert [tuple(x.shape[1:]) for x in before] == [(32, 20, 20), (64, 9, 9), (64, 7, 7)]
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(out.actor_preactivations, x, **close)
    assert x.shape == (3, 512) and x.min() < 0  # before the activation
    torch.testing.assert_close(out.pfo_preactivations, x, **close)
    held = torch.cat([x.flatten(1) for x in (*before, x)], 1)
    assert held.shape == (3, 21_632)
    torch.testing.assert_close(every(obs).pfo_preactivations, held, **close)
    policy = agent.actor_head(x.relu()).log_softmax(-1)
    torch.testing.assert_close(out.policy, policy, **close)
    critic = agent.critic_trunk(obs / 255)
    torch.testing.assert_close(out.critic_preactivations, critic, **close)
    torch.testing.assert_close(out.values, agent.critic_head(critic.relu())[:, 0], **close)


@pytest.mark.parametrize("flags", [{}, {"share_trunk": True}, {"activation": "tanh"}])
def test_a_norm_before_any_activation_is_part_of_the_preactivations(flags):
    agent, obs = make_agent(width=16, pfo_layers="all", **flags), random_obs(3)
    for trunk in dict.fromkeys((agent.actor_trunk, agent.critic_trunk)):
        trunk.insert(1, nn.LayerNorm([32, 20, 20]))
        trunk.append(nn.LayerNorm(16))
    out = agent(obs)
    first = out.pfo_preactivations[:, : 32 * 20 * 20]
    for x in (out.actor_preactivations, out.critic_preactivations, first):
        torch.testing.assert_close(x.mean(1), torch.zeros(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(x.var(1, correction=0), torch.ones(3), atol=0.01, rtol=0)
    assert out.pfo_preactivations.shape[1] == 32 * 20 * 20 + 64 * 9 * 9 + 64 * 7 * 7 + 16
    noise = agent.noise(1, 3)[0]
    assert torch.equal(agent.sample(obs, noise), (out.policy + noise).argmax(-1))


def test_categorical_quantities_are_those_of_torch_distributions():
    agent, obs, actions = make_agent(), random_obs(6), torch.arange(6)
    policy, other = (agent(obs)[0] * 5).log_softmax(-1), agent(obs.flip(0))[0]
    ours, theirs = (torch.distributions.Categorical(logits=x) for x in (policy, other))
    torch.testing.assert_close(agent.log_prob(policy, actions), ours.log_prob(actions))
    torch.testing.assert_close(agent.entropy(policy), ours.entropy())
    kl = torch.distributions.kl_divergence(ours, theirs)
    torch.testing.assert_close(agent.kl(policy, other), kl.double(), rtol=1e-4, atol=1e-6)
    stats = agent.policy_stats(policy, actions)
    assert stats.keys() == {"variance", "entropy"}
    torch.testing.assert_close(stats["variance"], ours.probs.var(0).mean())
    torch.testing.assert_close(stats["entropy"], ours.entropy().mean())


def test_gumbel_noise_samples_the_policy():
    agent, obs = make_agent(), random_obs(1)
    with torch.no_grad():
        agent.actor_head.bias += torch.tensor([2.0, 1, 0, 0, 0, 0, 0, -1])
    noise = agent.noise(20_000, 1, generator=torch.Generator().manual_seed(0))[:, 0]
    with torch.no_grad():
        policy = agent(obs).policy
    counts = torch.bincount((policy + noise).argmax(-1), minlength=8) / 20_000
    torch.testing.assert_close(counts, policy[0].exp(), atol=0.012, rtol=0)
    assert agent.sample(obs, noise[:1]).item() == (policy + noise[:1]).argmax().item()


@pytest.mark.parametrize("num_envs", [1, 3])
def test_capacity_states_are_the_observations_with_every_frame_stored_once(num_envs):
    agent = make_agent()
    frames, index = make_envs(num_envs, max_episode_frames=60).collect(agent, 70, seed=3)
    assert frames.shape == (71, 84, 84) and index.shape == (70, 4) and not frames[0].any()
    envs, states = make_envs(num_envs, max_episode_frames=60), []
    next_obs, generator = envs.reset(), torch.Generator().manual_seed(3)
    for noise in agent.noise(-(-70 // num_envs), num_envs, generator):
        states += list(next_obs)
        next_obs, *_ = envs.step(agent.sample(torch.from_numpy(next_obs), noise).numpy())
    np.testing.assert_array_equal(frames[index].numpy(), np.array(states)[:70])
    assert envs.finished  # games ended within


def test_the_memory_of_36000_capacity_states():
    """254 MB of frames; target, fit and evaluation need less than 1 GB beyond them."""

    def memory(name):  # bytes: VmRSS is what the process holds now, VmHWM the most since the mark
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) * 1024

    frames = torch.randint(0, 256, (36_001, 84, 84), dtype=torch.uint8)
    assert frames.numel() == 254_023_056
    index = torch.arange(36_000)[:, None].add(torch.arange(-2, 2)).clamp(0)
    agent, args = make_agent(), script.Args(capacity_epochs=1)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    # one chunk of the evaluation after another needs no more than the first two; so minibatches
    data = script.capacity_target(agent, frames, torch.cat([index[:512], index[-2048:]]))
    script.capacity_loss(agent, args, *data)
    assert memory("VmHWM") - before < 1e9

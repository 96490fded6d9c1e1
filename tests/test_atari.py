"""The environments and the network of ppo_atari.py."""

import re
from pathlib import Path

import ale_py
import cv2
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from ale_py import roms
from conftest import same_scalars, same_weights

import ppo_atari as script

ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)


def make_envs(num_envs=2, stream=0, **flags):
    return script.Envs(script.Args(**flags), num_envs, stream)


def play(game, seed, actions, frameskip, sticky, maxpool):
    """The documented pipeline on a single emulator: gray frames (84, 84), area resized, and the rewards of each action."""
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
    assert (args.frameskip, args.sticky, args.maxpool, args.noop_max, args.fire_reset) == (3, 0.25, False, 0, False)
    assert (args.episodic_life, args.max_episode_frames, args.sign_reward) == (False, 108_000, True)
    envs = make_envs(1)
    assert envs.action_dim == 8  # Phoenix's minimal actions
    envs.reset()
    *_, info = envs.envs.step(np.array([0]))
    assert info["frame_number"][0] == 3


def test_sticky_actions_make_the_game_depend_on_its_seed():
    actions = np.random.default_rng(0).integers(0, 8, 200)
    for sticky, same in ((0.0, True), (0.25, False)):
        ends = []
        for seed in (1, 2):
            envs = make_envs(1, sticky=sticky, seed=seed)
            frames = [envs.reset()] + [envs.step(np.array([action]))[0] for action in actions]
            ends.append(np.concatenate(frames))
        assert np.array_equal(*ends) == same


def test_every_episode_is_right_and_can_be_replayed_from_its_seed_and_actions():
    """Games of a vector of 3 against single emulators: length, raw return, final observation, first observation."""
    envs = make_envs(3)
    next_obs, rng, checked = envs.reset(), np.random.default_rng(0), 0
    while checked < 7:
        seeds, played, returns = list(envs.seeds), [list(actions) for actions in envs.actions], list(envs.returns)
        actions = rng.integers(0, envs.action_dim, 3)
        last_obs, count = next_obs, len(envs.finished)
        next_obs, _, terminations, truncations, final_obs = envs.step(actions)
        for k, i in enumerate(np.flatnonzero(terminations | truncations)):
            frames, rewards = play("phoenix", seeds[i], [*played[i], actions[i]], 3, 0.25, False)
            assert envs.finished[count + k] == (sum(rewards), len(played[i]) + 1)
            assert returns[i] == sum(rewards[:-1])
            np.testing.assert_array_equal(last_obs[i], frames[-5:-1])
            np.testing.assert_array_equal(final_obs[k][:3], frames[-4:-1])  # the true last observation
            assert not next_obs[i][:3].any() and next_obs[i][3].any()  # the next game's first
            assert envs.actions[i] == [] and envs.returns[i] == 0 and envs.seeds[i] != seeds[i]
            checked += 1


def test_a_game_is_cut_after_its_frames():
    envs = make_envs(1, max_episode_frames=30)
    envs.reset()
    for step in range(1, 11):
        _, _, terminations, truncations, final_obs = envs.step(np.array([0]))
        assert (bool(truncations[0]), len(final_obs)) == ((True, 1) if step == 10 else (False, 0))
        assert not terminations[0]
    assert envs.finished[0][1] == 10


def test_the_loss_of_a_life_ends_the_return_but_not_the_game():
    envs, plain = make_envs(1, env_id="ALE/Breakout-v5", episodic_life=True), make_envs(1, env_id="ALE/Breakout-v5")
    envs.reset()
    plain.reset()
    rng, ends, plain_ends = np.random.default_rng(0), 0, 0
    while not plain.finished:
        actions = rng.integers(0, 4, 1)
        obs, _, terminations, _, final_obs = envs.step(actions)
        plain_obs, _, plain_terminations, *_ = plain.step(actions)
        np.testing.assert_array_equal(obs[:, -1], plain_obs[:, -1])  # the same game goes on
        assert len(final_obs) == terminations.sum()
        ends, plain_ends = ends + terminations.sum(), plain_ends + plain_terminations.sum()
    assert (ends, plain_ends) == (5, 1)  # five lives
    assert envs.finished == plain.finished


def test_a_game_that_ends_with_a_life_left_is_over():
    envs, plain = (make_envs(1, env_id="ALE/Adventure-v5", episodic_life=life, frameskip=12) for life in (True, False))
    envs.reset()
    plain.reset()
    rng = np.random.default_rng(0)
    while not plain.finished:
        actions = rng.integers(0, envs.action_dim, 1)
        envs.step(actions)
        plain.step(actions)
    assert envs.finished == plain.finished and envs.actions == [[]]


def test_a_restored_vector_goes_on_bit_for_bit():
    envs, other = make_envs(3), make_envs(3, seed=9)
    envs.reset()
    actions = np.random.default_rng(1).integers(0, 8, (1300, 3))
    for step in range(1200):
        envs.step(actions[step])
    assert len(envs.finished) > 0 and len({len(played) for played in envs.actions}) > 1  # at different places
    state = envs.state_dict()
    np.testing.assert_array_equal(other.load_state_dict(state), envs.last_obs)
    for step in range(1200, 1300):
        for ours, theirs in zip(envs.step(actions[step]), other.step(actions[step])):
            np.testing.assert_array_equal(ours, theirs)
    assert (envs.finished, envs.returns, envs.seeds, envs.actions) == (
        other.finished,
        other.returns,
        other.seeds,
        other.actions,
    )


def test_videos_are_written_beside_the_kept_checkpoints_and_a_failing_one_costs_nothing(run, monkeypatch, capsys):
    flags = "--capture-video --max-episode-frames 60 --capacity-interval 0"
    run_dir = run("ppo_atari", flags, name="filmed")
    names = {path.stem for path in (run_dir / "checkpoints").iterdir()}
    assert {path.stem for path in (run_dir / "videos").iterdir()} == names - {"0"}
    frames = imageio.mimread(run_dir / "videos" / "768.mp4")
    assert len(frames) == 20 and frames[0].shape == (210, 160, 3) and np.std(frames[-1]) > 1
    monkeypatch.setattr(script.imageio, "get_writer", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left")))
    unfilmed = run("ppo_atari", flags, name="unfilmed")
    assert "no video (OSError(28" in capsys.readouterr().err
    assert same_weights(run_dir, unfilmed) and same_scalars(run_dir, unfilmed)


def make_agent(**flags):
    torch.manual_seed(0)
    return script.Agent(make_envs(1), script.Args(**flags))


def test_the_network_is_the_papers():
    agent = make_agent()
    obs = torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8)
    policy, values, outputs, critic_outputs = agent(obs)
    assert policy.shape == (3, 8) and values.shape == (3,)
    assert [tuple(x.shape[1:]) for x in outputs] == [(32, 20, 20), (64, 9, 9), (64, 7, 7), (512,)]
    torch.testing.assert_close(policy.exp().sum(1), torch.ones(3))
    plain = obs.float() / 255
    for layer in agent.actor_trunk:
        plain = layer(plain)
    torch.testing.assert_close(outputs[-1], plain, rtol=1e-4, atol=1e-5)
    assert outputs[-1].min() < 0  # before the activation
    assert script.pfo_inputs(outputs, "all").shape == (3, 21_632)
    assert script.pfo_inputs(outputs, "last").shape == (3, 512)


def test_categorical_quantities_are_those_of_torch_distributions():
    agent = make_agent()
    obs = torch.randint(0, 256, (6, 4, 84, 84), dtype=torch.uint8)
    policy, other = agent(obs)[0] * 5, agent(obs.flip(0))[0]
    policy, actions = policy.log_softmax(-1), torch.arange(6)
    distribution, other_distribution = (torch.distributions.Categorical(logits=x) for x in (policy, other))
    torch.testing.assert_close(agent.log_prob(policy, actions), distribution.log_prob(actions))
    torch.testing.assert_close(agent.entropy(policy), distribution.entropy())
    torch.testing.assert_close(agent.kl(policy, other), torch.distributions.kl_divergence(distribution, other_distribution))
    torch.testing.assert_close(agent.variance(policy), distribution.probs.var(0).mean())


def test_gumbel_noise_samples_the_policy():
    agent = make_agent()
    with torch.no_grad():
        agent.actor_head.bias += torch.tensor([2.0, 1, 0, 0, 0, 0, 0, -1])
    obs = torch.randint(0, 256, (1, 4, 84, 84), dtype=torch.uint8)
    noise = agent.noise(20_000, 1, generator=torch.Generator().manual_seed(0))[:, 0]
    with torch.no_grad():
        policy = agent(obs)[0]
        counts = torch.bincount((policy + noise).argmax(-1), minlength=8) / 20_000
    torch.testing.assert_close(counts, policy[0].exp(), atol=0.012, rtol=0)
    assert agent.sample(obs, noise[:1]).item() == (policy + noise[:1]).argmax().item()


@pytest.mark.parametrize("num_envs", [1, 3])
def test_capacity_states_are_the_observations_with_every_frame_stored_once(num_envs):
    agent = make_agent()
    frames, index = make_envs(num_envs, max_episode_frames=90).collect(agent, 100, seed=3)
    assert frames.shape == (101, 84, 84) and index.shape == (100, 4) and not frames[0].any()
    envs, states = make_envs(num_envs, max_episode_frames=90), []
    next_obs = envs.reset()
    for noise in agent.noise(-(-100 // num_envs), num_envs, generator=torch.Generator().manual_seed(3)):
        states += list(next_obs)
        next_obs, *_ = envs.step(agent.sample(torch.from_numpy(next_obs), noise).numpy())
    np.testing.assert_array_equal(frames[index].numpy(), np.array(states)[:100])
    assert envs.finished  # games ended within


def test_the_memory_of_36000_capacity_states():
    """254 MB of frames; target, fit and evaluation need less than 1 GB beyond them."""

    def memory(name):  # bytes: VmRSS is what the process holds now, VmHWM the most since the mark was set back
        return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    frames = torch.randint(0, 256, (36_001, 84, 84), dtype=torch.uint8)
    assert frames.numel() == 254_023_056
    index = torch.arange(36_000)[:, None].add(torch.arange(-2, 2)).clamp(0)
    agent, args = make_agent(), script.Args(capacity_epochs=1)
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    # one chunk of the full set's evaluation after another needs no more than the first two, and so do the minibatches
    data = script.capacity_target(agent, frames, torch.cat([index[:512], index[-2048:]]))
    script.capacity_loss(agent, args, *data)
    assert memory("VmHWM") - before < 1e9
    held = torch.zeros(10**9, dtype=torch.uint8).fill_(1)  # and the measure would see a GB
    assert memory("VmHWM") - before > len(held)

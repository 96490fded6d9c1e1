"""Tiny tasks that isolate one part of PPO, and tasks that misbehave. Used as --env-id probe_envs:NAME-v0."""

import gymnasium as gym
import numpy as np

BOX = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)


class Target(gym.Env):
    """One step: the observation is +-1, the reward -(action + observation / 2)^2. The policy must read the observation."""

    observation_space, action_space = gym.spaces.Box(-np.inf, np.inf, (1,)), BOX

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.sign = self.np_random.choice([-1.0, 1.0])
        return np.array([self.sign]), {}

    def step(self, action):
        return np.array([self.sign]), -float((action[0] + self.sign / 2) ** 2), True, False, {}


class Clock(gym.Env):
    """Never terminates, reward 1 at every step; the observation is noise beside a constant."""

    observation_space, action_space = gym.spaces.Box(-np.inf, np.inf, (2,)), BOX

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.array([self.np_random.normal(), 3.0]), {}

    def step(self, action):
        return np.array([self.np_random.normal(), 3.0]), 1.0, False, False, {}


class Counter(gym.Env):
    """Observes the number of steps taken and the episode's number; reward: the step; terminates after 5."""

    observation_space, action_space = gym.spaces.Box(-np.inf, np.inf, (2,)), gym.spaces.Box(-3.0, 1.0, (2,), np.float32)
    episode = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.episode = 0, self.episode + 1
        return np.array([0.0, self.episode]), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        return np.array([self.steps, self.episode]), float(self.steps), self.steps == 5, False, {}


class Broken(gym.Env):
    """Works until `fail_at` steps were taken in the process, then raises, or observes NaN."""

    observation_space, action_space = gym.spaces.Box(-np.inf, np.inf, (2,)), BOX
    steps_taken, fail_at, failure = 0, 300, "raise"

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.normal(size=2), {}

    def step(self, action):
        type(self).steps_taken += 1
        obs = self.np_random.normal(size=2)
        if self.steps_taken >= self.fail_at and self.failure == "raise":
            raise RuntimeError("the joint came off")
        if self.steps_taken >= self.fail_at and self.failure == "nan":
            obs[0] = np.nan
        return obs, float(obs[0]), False, False, {}


gym.register("Target-v0", Target)
gym.register("Clock-v0", Clock, max_episode_steps=10)
gym.register("Counter-v0", Counter)
gym.register("Broken-v0", Broken, max_episode_steps=20)

"""Tiny tasks that isolate one part of PPO, tasks that misbehave, and tasks that do what real ones
were reported to do. Used as --env-id probe_envs:NAME-v0."""

import gymnasium as gym
import numpy as np

BOX = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)


def anything(n):
    return gym.spaces.Box(-np.inf, np.inf, (n,))


class Target(gym.Env):
    """One step: the observation is +-1, the reward -(action + observation / 2)^2. The policy must
    read the observation."""

    observation_space, action_space = anything(1), BOX

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.sign = self.np_random.choice([-1.0, 1.0])
        return np.array([self.sign]), {}

    def step(self, action):
        reward = -float((action[0] + self.sign / 2) ** 2)
        return np.array([self.sign]), reward, True, False, {}


class Clock(gym.Env):
    """Never terminates, reward 1 at every step; the observation is noise beside a constant."""

    observation_space, action_space = anything(2), BOX

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.array([self.np_random.normal(), 3.0]), {}

    def step(self, action):
        return np.array([self.np_random.normal(), 3.0]), 1.0, False, False, {}


class Counter(gym.Env):
    """Observes the number of steps taken and the episode's number; reward: the step; terminates
    after 5."""

    observation_space = anything(2)
    action_space = gym.spaces.Box(-3.0, 1.0, (2,), np.float32)
    episode = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.episode = 0, self.episode + 1
        return np.array([0.0, self.episode]), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        obs = np.array([self.steps, self.episode])
        return obs, float(self.steps), self.steps == 5, False, {}


class Broken(gym.Env):
    """From `fail_at` steps in the process on it raises, fails to reset or observes NaN."""

    observation_space, action_space = anything(2), BOX
    steps_taken, fail_at, failure = 0, 10**9, "raise"

    def broken(self, failure):
        return self.steps_taken >= self.fail_at and self.failure == failure

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.broken("reset"):
            raise RuntimeError("the joint came off")
        return self.np_random.normal(size=2), {}

    def step(self, action):
        type(self).steps_taken += 1
        obs = self.np_random.normal(size=2)
        if self.broken("raise"):
            raise RuntimeError("the joint came off")
        if self.broken("nan"):
            obs[0] = np.nan
        return obs, float(obs[0]), False, False, {}


class Silent(gym.Env):
    """Cannot be made, and the error has no text."""

    def __init__(self):
        raise NotImplementedError


class Drift(gym.Env):
    """Observes N(50, 5) in two dimensions; the action moves it; 20 steps. What the tasks below
    have in common."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.place = 0, self.np_random.normal(50, 5, 2)
        return self.look(), {}

    def look(self):
        return self.place.astype(np.float32)

    def reward(self, action):
        return float(action.sum())

    def step(self, action):
        self.time += 1
        self.place = self.np_random.normal(50, 5, 2) + action
        return self.look(), self.reward(action), self.time == 20, False, {}


class OneArray(Drift):
    """Every observation is the same array, overwritten at each step."""

    def __init__(self):
        self.array = np.empty(2, np.float32)

    def look(self):
        self.array[:] = self.place
        return self.array


class Constants(Drift):
    """Constant float32 dimensions whose standard deviation is not 0 in float32."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (4,), np.float32)

    def look(self):
        return np.array([*self.place, 0.1, 1234.567], np.float32)


class TakesTheAction(Drift):
    """Changes the array of the action that it is given."""

    def step(self, action):
        action /= 3
        return super().step(action)


class Picky(Drift):
    """Raises where an action is not in its space."""

    def reward(self, action):
        assert self.action_space.contains(action), (action, action.dtype)
        return 1.0


class Picky64(Picky):
    """float64 bounds that float32 does not have."""

    action_space = gym.spaces.Box(np.array([-0.3, 0.1]), np.array([1.3, 0.7]), dtype=np.float64)


class PickyBounds(Picky):
    """float32 bounds where middle + half width * tanh(u) rounds past the upper one."""

    low, high = np.array([-2.2, 0.1], np.float32), np.array([0.6, 0.7], np.float32)
    action_space = gym.spaces.Box(low, high)


class IntegerActions(Picky):
    action_space = gym.spaces.Box(-2, 2, (2,), np.int32)


class ArrayReward(Drift):
    def reward(self, action):
        return np.array([super().reward(action)])


class NoReward(Drift):
    def reward(self, action):
        return None


class Gym021(Drift):
    """The interface before Gymnasium: reset() gives an observation, step() four values."""

    def reset(self):
        self.np_random, _ = gym.utils.seeding.np_random(0)
        self.time, self.place = 0, np.zeros(2)
        return self.look()

    def step(self, action):
        obs, reward, terminated, _, info = super().step(action)
        return obs, reward, terminated, info


class LostLicence(Drift):
    """A reset fails after some."""

    resets = 0

    def reset(self, *, seed=None, options=None):
        type(self).resets += 1
        if self.resets > 11:
            raise RuntimeError("no licence")
        return super().reset(seed=seed)


gym.register("Target-v0", Target)
gym.register("Clock-v0", Clock, max_episode_steps=10)
gym.register("Counter-v0", Counter)
gym.register("Broken-v0", Broken, max_episode_steps=20)
for task in (Silent, OneArray, Constants, TakesTheAction, Picky64, PickyBounds, IntegerActions):
    gym.register(f"{task.__name__}-v0", task)
for task in (ArrayReward, NoReward, Gym021, LostLicence):
    gym.register(f"{task.__name__}-v0", task)

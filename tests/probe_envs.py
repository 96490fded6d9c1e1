"""Tiny tasks that isolate one part of PPO, tasks that misbehave, and tasks that do what real ones
were reported to do. Used as --env-id probe_envs:NAME-v0, and most of them with discrete actions as
probe_envs:NAMEDiscrete-v0."""

import threading

import gymnasium as gym
import numpy as np
import torch

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


class Silent(gym.Env):
    """Cannot be made, and the error has no text."""

    def __init__(self, error=NotImplementedError):
        raise error


class Drift(gym.Env):
    """Observes N(50, 5) in two dimensions; the action moves it; 20 steps. The tasks below change
    one thing."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, discrete=False):
        if discrete:
            self.action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.place = 0, self.np_random.normal(50, 5, 2)
        return self.look(), {}

    def look(self):
        return self.place.astype(np.float32)

    def reward(self, action):
        return float(np.sum(action))

    def step(self, action):
        self.time += 1
        self.place = self.np_random.normal(50, 5, 2) + action
        return self.look(), self.reward(action), self.time == 20, False, {}


class Broken(Drift):
    """From `fail_at` steps in the process on it does what `failure` names."""

    steps_taken, fail_at, failure = 0, 10**9, ""

    def broken(self, *failures):
        if self.steps_taken < self.fail_at or self.failure not in failures:
            return False
        if self.failure.startswith("exit"):
            raise SystemExit
        return True

    def reset(self, *, seed=None, options=None):
        self.broken("exit in reset")
        return super().reset(seed=seed)

    def step(self, action):
        type(self).steps_taken += 1
        if self.broken("raise in step", "exit in step", "raise, then exit in close"):
            raise RuntimeError("the joint came off")
        return super().step(action)

    def look(self):
        if self.broken("observe NaN"):
            return np.full(2, np.nan)
        return super().look()[: 1 if self.broken("observe less") else 2]

    def reward(self, action):
        return None if self.broken("reward nothing") else super().reward(action)

    def close(self):
        if self.failure == "raise, then exit in close":
            raise SystemExit


class Worker(Drift):
    """Has a thread that ends only when the task is closed."""

    def __init__(self, discrete=False):
        super().__init__(discrete)
        self.closed = threading.Event()
        threading.Thread(target=self.closed.wait).start()

    def close(self):
        self.closed.set()


class DrawsTorch(Drift):
    """Draws from torch's generator, and seeds it."""

    def reset(self, *, seed=None, options=None):
        torch.manual_seed(seed)
        return super().reset(seed=seed)

    def look(self):
        return super().look() + torch.randn(2).numpy()


class OtherPlaces(Drift):
    """Does not repeat its observations: its own generator ignores the seed."""

    rng = np.random.default_rng(0)

    def look(self):
        return super().look() + self.rng.normal(size=2).astype(np.float32)


class OtherRewards(OtherPlaces):
    """Repeats its observations, and not its rewards."""

    look = Drift.look

    def reward(self, action):
        return self.rng.normal()


class OneArray(Drift):
    """Every observation is the same array, overwritten at each step."""

    def look(self):
        self.array = getattr(self, "array", np.empty(2, np.float32))
        self.array[:] = self.place
        return self.array


class TakesTheAction(Drift):
    """Changes the array of the action that it is given."""

    def step(self, action):
        action /= 3
        return super().step(action)


class Picky(Drift):
    """Raises if an action is not in its space."""

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


class Arrays(Drift):
    """Returns arrays of one element for the reward and the ends."""

    def step(self, action):
        obs, *outcome, info = super().step(action)
        return obs, *(np.array([x]) for x in outcome), info


gym.register("Target-v0", Target)
gym.register("Clock-v0", Clock, max_episode_steps=10)
gym.register("Counter-v0", Counter)
gym.register("Silent-v0", Silent)
gym.register("Exits-v0", Silent, kwargs={"error": SystemExit})
for task in list(vars().values()):
    if isinstance(task, type) and issubclass(task, Drift):
        gym.register(f"{task.__name__}-v0", task)
        gym.register(f"{task.__name__}Discrete-v0", task, kwargs={"discrete": True})

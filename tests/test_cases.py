"""What was reported of other projects, on tasks of probe_envs.py that do the same."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL, call, checkpoints, read_scalars, same_scalars, same_weights
from scipy import integrate

import ppo_mujoco as script


def make_envs(task, num_envs=2, **flags):
    args = script.Args(env_id=f"probe_envs:{task}-v0", **{"obs_norm_steps": 400, **flags})
    return script.Envs(args, num_envs, stream=0)


def make_agent(action_dim=1, **flags):
    bounds = np.ones(action_dim, np.float32)
    envs = SimpleNamespace(obs_dim=2, action_dim=action_dim, low=-bounds, high=bounds)
    return script.Agent(envs, script.Args(**flags))


def policy_of(agent, loc, scale):
    """The policy (1, 2) of a constant loc and scale."""
    raw = math.log(math.expm1(scale - 0.01)) - math.log(math.expm1(0.99))
    return torch.tensor([[loc, raw]], dtype=next(agent.parameters()).dtype)


def train(tmp_path, task, name, more=""):
    words = SMALL["ppo_mujoco"] + f" --env-id probe_envs:{task}-v0 --obs-norm-steps 200 "
    return call("ppo_mujoco", words + f"--runs-dir {tmp_path} --run-name {name} {more}")


# The loc, scale and sample u of a Normal; what TorchRL's TanhNormal at the commit that the authors'
# image pins (pytorch/rl 2cfd9b6c8d83, torch, float32) inverts the stored action to; its log_prob
TORCHRL = [
    (0.0, 1.0, 0.699999988079071, 0.699999988079071, -0.7093980312347412),
    (-3.0, 0.5, -2.25, -2.249999523162842, 1.7850075960159302),
    (7.2, 0.0101, 7.2070698738098145, 7.21915340423584, 14.930136680603027),
    (8.0, 0.1, 8.069999694824219, 7.247732639312744, -13.80248737335205),
    (10.0, 0.1, 10.069999694824219, 7.247732639312744, -364.2559509277344),
    (40.0, 0.5, 40.349998474121094, 7.247732639312744, -2132.53857421875),
    (-6.0, 0.011, -5.997799873352051, -5.997977256774902, 14.183685302734375),
    (-30.0, 5.0, -20.0, -7.247732639312744, 0.22748184204101562),
    (0.5, 0.3, 0.13999998569488525, 0.13999998569488525, -0.41542941331863403),
    (6.5, 0.3, 6.559999942779541, 6.561992645263672, 12.001379013061523),
    (-7.25, 0.02, -7.260000228881836, -7.247732639312744, 16.0958309173584),
    (-8.0, 0.1, -7.96999979019165, -7.247732639312744, -13.802486419677734),
    (20.0, 1.0, 20.700000762939453, 7.247732639312744, -69.11993408203125),
    (5.0, 4.0, 8.600000381469727, 7.247732639312744, 10.6460542678833),
    (12.0, 3.0, 8.699999809265137, 7.247732639312744, 9.836952209472656),
    (1.0, 0.02, 1.059999942779541, 1.059999942779541, -0.5464874505996704),
]


@pytest.mark.parametrize("loc, scale, u, scored, log_prob", TORCHRL)
def test_clamped_actions_are_scored_as_torchrl_scores_them(loc, scale, u, scored, log_prob):
    """The numpy actor of a constant policy gives `scored`, log_prob of it `log_prob`."""
    agent = make_agent()
    policy = policy_of(agent, loc, scale)
    with torch.no_grad():
        agent.actor_head.weight.zero_()
        agent.actor_head.bias.copy_(policy[0])
    noise = np.array([[(u - loc) / scale]], np.float32)
    action = agent.numpy_actor()(np.zeros((1, 2), np.float32), noise)
    # tanh near 1 has steps of 6e-8, which arctanh makes 0.03 at u = 7; elsewhere float32's own
    step = 2e-7 / (1 - math.tanh(scored) ** 2)
    assert action.dtype == np.float32
    assert action.item() == pytest.approx(scored, abs=step + 1e-6 * abs(scored))
    ours = agent.log_prob(policy, torch.tensor([[scored]])).item()
    # the step of tanh again, through the slope's logarithm and the Normal
    assert ours == pytest.approx(log_prob, abs=5 * step + 1e-5 * abs(log_prob))
    if abs(scored) > 7.24:  # the clamp itself is one number
        assert abs(action.item()) == pytest.approx(7.247732639312744, abs=1e-6)


def test_sampled_actions_are_scored_where_they_were_sampled():
    agent = make_agent(action_logprob="sampled")
    noise = np.full((1, 1), 1e4, np.float32)
    assert agent.numpy_actor()(np.zeros((1, 2), np.float32), noise).item() > 1000


@pytest.mark.parametrize(
    "loc, scale, entropy",
    [(20, 1, -37.195), (8, 0.5, -13.888), (3, 2, -2.850), (0, 1, 0.670)]
    + [(0, 5, None), (-3, 0.2, None), (-20, 5, None), (1, 0.02, None)],
)
def test_the_entropy_of_tanh_normal_is_exact(loc, scale, entropy):
    """Where a policy saturates it falls without end; no sample takes part in it."""
    agent = make_agent().double()
    slope = lambda u: 2 * (math.log(2) - u - np.logaddexp(0, -2 * u))  # noqa: E731
    density = lambda u: math.exp(-(((u - loc) / scale) ** 2) / 2) / scale / math.sqrt(2 * math.pi)  # noqa: E731
    ends = loc - 12 * scale, loc + 12 * scale
    points = {"points": [0]} if ends[0] < 0 < ends[1] else {}
    integral, _ = integrate.quad(lambda u: density(u) * slope(u), *ends, limit=200, **points)
    exact = math.log(scale) + (math.log(2 * math.pi) + 1) / 2 + integral
    assert entropy is None or exact == pytest.approx(entropy, abs=1e-3)
    policy, state = policy_of(agent, loc, scale), torch.get_rng_state()
    assert agent.entropy(policy).item() == pytest.approx(exact, abs=0.03)
    assert torch.equal(state, torch.get_rng_state())


def test_the_logged_entropy_is_that_of_the_new_policies(tmp_path, monkeypatch, run):
    """losses/entropy: the mean over the minibatches' new policies, also at a large step."""
    seen, real = [], script.ppo_gradient

    def recording(agent, args, **minibatch):
        gradient, losses, policy = real(agent, args, **minibatch)
        seen.append(agent.entropy(agent(minibatch["obs"]).policy).mean().item())
        return gradient, losses, policy

    monkeypatch.setattr(script, "ppo_gradient", recording)
    run_dir = run("ppo_mujoco", "--learning-rate 0.01 --update-epochs 20 --capacity-interval 0")
    logged = [value for _, value in read_scalars(run_dir)["losses/entropy"]]
    expected = np.array(seen).reshape(len(logged), -1).mean(1)
    np.testing.assert_allclose(logged, expected, rtol=1e-4, atol=1e-4)


def test_the_share_of_saturated_actions(run):
    agent = make_agent(action_dim=2)
    policy = torch.zeros(3, 4)
    actions = torch.tensor([[0.0, 8.0], [-9.0, 1.0], [7.0, -7.0]])
    clamped = actions.clamp(-7.247732639312744, 7.247732639312744)
    assert float(agent.policy_stats(policy, clamped)["saturated_actions"]) == pytest.approx(2 / 6)
    sampled = make_agent(action_dim=2, action_logprob="sampled")  # where it would act
    assert float(sampled.policy_stats(policy, actions)["saturated_actions"]) == pytest.approx(2 / 6)
    gaussian = make_agent(action_dim=2, policy="gaussian")
    outside = float(gaussian.policy_stats(policy, actions / 7.5)["saturated_actions"])
    assert outside == pytest.approx(2 / 6)
    (points,) = (v for k, v in read_scalars(run("ppo_mujoco")).items() if "saturated" in k)
    assert all(0 <= value <= 1 for _, value in points)


def test_observations_are_copied():
    """dm_control#34, SuperSuit#116, baselines#418: a task that owns the array it hands out."""
    envs = make_envs("OneArray")
    np.testing.assert_allclose(envs.obs_mean, 50, atol=2)
    np.testing.assert_allclose(envs.obs_std, 5, rtol=0.2)
    obs = [envs.reset()]
    for _ in range(10):
        obs.append(envs.step(np.zeros((2, 2), np.float32))[0])
    assert np.abs(obs).max() < 6 and len({tuple(x.ravel()) for x in obs}) == 11


def test_statistics_are_float64():
    """numpy#14691, scikit-learn#12333: a constant has scale 1 and its own value as mean."""
    envs = make_envs("Constants", obs_norm_steps=4000)
    assert envs.obs_std[2:].tolist() == [1, 1]
    exact = [float(np.float32(0.1)), float(np.float32(1234.567))]
    assert envs.obs_mean[2:].tolist() == pytest.approx(exact, rel=1e-12)
    assert np.abs(envs.reset()[:, 2:]).max() < 1e-9


def test_mujoco_observations_keep_their_bits():
    envs = script.Envs(script.Args(obs_norm_steps=50), 1, stream=0)
    envs.reset()
    np.testing.assert_array_equal(envs.raw_obs[0], envs.envs[0].unwrapped._get_obs())


def test_a_task_may_change_the_action_that_it_is_given(tmp_path):
    """maddpg-pytorch#41: half a run and the rest of it are the whole run."""
    assert train(tmp_path, "TakesTheAction", "whole").returncode == 0
    assert train(tmp_path, "TakesTheAction", "run", "--total-timesteps 256").returncode == 0
    words = f"--runs-dir {tmp_path} --run-name run --resume --total-timesteps 512"
    process = call("ppo_mujoco", words)
    assert process.returncode == 0 and "simulator is another" not in process.stderr
    assert same_weights(tmp_path / "whole", tmp_path / "run")
    assert not same_scalars(tmp_path / "whole", tmp_path / "run")  # other log points


@pytest.mark.parametrize("task", ["Picky64", "PickyBounds"])
@pytest.mark.parametrize("flags", [{}, {"action_logprob": "sampled"}, {"policy": "gaussian"}])
def test_actions_stay_inside_the_space_in_its_own_precision(task, flags):
    """Minari#127, PettingZoo#1000, ray#23895. The task raises where one does not."""
    envs = make_envs(task, **flags)
    envs.reset()
    for u in (-1e9, -40, -9, -0.3, 0.0, 0.2, 9, 40, 1e9):
        envs.step(np.full((2, 2), u, np.float32))
    assert {action.dtype for actions in envs.actions for action in actions} == {envs.low.dtype}


def test_no_random_bounds_are_overstepped():
    rng = np.random.default_rng(0)
    envs = make_envs("PickyBounds", num_envs=1)
    for _ in range(100):
        low, high = np.sort(rng.normal(size=(2, 2)).astype(np.float32), 0)
        space = type(envs.envs[0].action_space)(low, high)
        task = envs.envs[0].unwrapped
        task.action_space = space
        envs.low, envs.high = low, high
        envs.middle, envs.half_width = (high + low) / 2, (high - low) / 2
        envs.reset()
        for u in (-20, 20):
            envs.step(np.full((1, 2), u, np.float32))


def test_integer_actions_are_refused(tmp_path):
    """ray#23074, Gymnasium#1679."""
    process = train(tmp_path, "IntegerActions", "run")
    assert process.returncode == 2 and "IntegerActions" in process.stderr
    assert len(process.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "task, says", [("NoReward", "Error"), ("Gym021", "Error"), ("LostLicence", "no licence")]
)
def test_whatever_a_task_does_wrong_is_said_with_its_place(tmp_path, task, says):
    """stable-baselines#283, Shimmy#162: its traceback may stand, then one line."""
    process = train(tmp_path, task, "run")
    assert process.returncode in (1, 2)
    line = process.stderr.replace("\r", "\n").strip().splitlines()[-1]
    if "%|" in line:  # the bar
        (line,) = (x for x in process.stderr.splitlines() if "error: " in x)
    for word in (task, says, "environment ", "episode seed ", "step ", "nothing was started"):
        assert word in line


def test_a_reward_may_be_an_array_of_one_number(tmp_path):
    process = train(tmp_path, "ArrayReward", "run")
    assert process.returncode == 0, process.stderr
    assert max(checkpoints(tmp_path / "run")) == 512


def test_an_error_without_a_text_has_its_type(tmp_path):
    """Gymnasium-Robotics#300."""
    process = train(tmp_path, "Silent", "run")
    assert process.returncode == 2 and "NotImplementedError" in process.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a,b", "ü → x", "probe"])
def test_a_name_is_made_an_id_only_for_wandb(tmp_path, name):
    """wandb PR 4191: its ids take letters, digits, - and _ only; the run keeps its name."""
    words = SMALL["ppo_mujoco"].split() + ["--runs-dir", tmp_path, "--run-name", name, "--track"]
    words += ["--env-id", "probe_envs:Clock-v0", "--capacity-interval", "0"]
    process = call("ppo_mujoco", words, prepare=pretend_wandb)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / name / "latest.pt").exists() and "wandb id ok" in process.stdout


def pretend_wandb():
    import re
    import sys

    def init(name, id, **settings):
        assert re.fullmatch(r"[A-Za-z0-9_-]+", id), id
        print("wandb id ok")

    sys.modules["wandb"] = SimpleNamespace(init=init, __spec__=SimpleNamespace())


def fail_to_log_in():
    import sys

    def init(**settings):
        raise RuntimeError("api_key not configured (no-tty)")

    sys.modules["wandb"] = SimpleNamespace(init=init, __spec__=SimpleNamespace())


def test_no_login_is_said_and_nothing_is_created(tmp_path):
    words = f"{SMALL['ppo_mujoco']} --runs-dir {tmp_path} --run-name run --track"
    process = call("ppo_mujoco", words, prepare=fail_to_log_in)
    assert process.returncode == 2 and "not configured" in process.stderr
    assert len(process.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())

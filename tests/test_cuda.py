"""The CUDA path: a device computes what the CPU does, a resumed run is identical, nothing waits in
the minibatch loop, memory stays small. All but the first test are skipped where there is none."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, call, fault_at, same_scalars, same_weights
from torch.utils._pytree import tree_map

SCRIPTS = ("ppo_mujoco", "ppo_atari")  # the toy uses the CPU only
CUDA = torch.device("cuda")
BATCH = 64
torch.backends.cudnn.deterministic = True  # as main() sets it; without TF32, torch's default
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def make_update(script, device, **flags):
    """The script, an agent on the device, flags and a minibatch, alike on every device."""
    module = importlib.import_module(script)
    args = module.Args(**flags)
    envs = module.Envs(args, 1, stream=0)
    torch.manual_seed(0)
    agent = module.Agent(envs, args)
    if script == "ppo_atari":
        obs = torch.randint(256, (BATCH, 4, 84, 84), dtype=torch.uint8)
        actions = torch.randint(envs.action_dim, (BATCH,))
    else:
        obs, actions = torch.randn(BATCH, envs.obs_dim), torch.randn(BATCH, envs.action_dim)
    old = module.evaluate(agent, obs)
    logprobs = agent.log_prob(old.policy, actions) + 0.1 * torch.randn(BATCH)
    minibatch = {"obs": obs, "actions": actions, "logprobs": logprobs.detach()}
    minibatch |= {"advantages": torch.randn(BATCH), "returns": torch.randn(BATCH)}
    minibatch["old_pfo_preactivations"] = old.pfo_preactivations + 0.1
    minibatch = {name: x.to(device) for name, x in minibatch.items()}
    return module, agent.to(device), args, minibatch


def assert_close(ours, theirs, rtol):
    """Gradients are alike relative to their norm, losses and policies relative to themselves."""
    gradients, losses, policy = ours
    expected_gradients, expected_losses, expected_policy = theirs
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert (gradient.cpu() - expected.cpu()).norm() < rtol * expected.norm().cpu()
    assert losses.keys() == expected_losses.keys()
    for name, value in losses.items():
        expected_mean = expected_losses[name].mean().item()
        assert value.mean().item() == pytest.approx(expected_mean, rel=rtol, abs=1e-5)
    torch.testing.assert_close(policy.cpu(), expected_policy.cpu(), rtol=rtol, atol=1e-4)


def test_the_cuda_branch_of_compile_gives_copies_of_the_eager_numbers():
    """Run on the CPU, where inductor leaves the CUDA graph out."""
    module, agent, args, minibatch = make_update("ppo_atari", "cpu", pfo_coef=1.0, ent_coef=0.01)
    compute = module.compiled(module.ppo_gradient, SimpleNamespace(type="cuda"))
    first = compute(agent, args, **minibatch)
    kept = tree_map(torch.clone, first)
    minibatch |= {"advantages": -2 * minibatch["advantages"]}
    second = compute(agent, args, **minibatch)
    assert not torch.equal(first[0][0], second[0][0]) and torch.equal(first[0][0], kept[0][0])
    assert_close(first, kept, 1e-6)
    assert_close(second, module.ppo_gradient(agent, args, **minibatch), 1e-4)


@needs_cuda
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_update_is_that_of_the_cpu(script, compiled):
    flags = {"pfo_coef": 1.0, "ent_coef": 0.01}
    module, agent, args, minibatch = make_update(script, "cpu", **flags)
    expected = module.ppo_gradient(agent, args, **minibatch)
    module, agent, args, minibatch = make_update(script, CUDA, **flags)
    compute = module.ppo_gradient
    if compiled:
        compute = module.compiled(compute, CUDA)
    for _ in range(4):  # a CUDA graph is recorded at the second call
        assert_close(compute(agent, args, **minibatch), expected, 1e-3)


@needs_cuda
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_capacity_loss_is_that_of_the_cpu(script):
    results = []
    for device in ("cpu", CUDA):
        flags = {"minibatch_size": 16, "capacity_epochs": 1}
        module, agent, args, minibatch = make_update(script, device, **flags)
        torch.manual_seed(1)
        target = module.Agent(module.Envs(args, 1, stream=0), args).to(device)
        states = minibatch["obs"].cpu(), torch.arange(BATCH)
        data = module.capacity_target(target, *states)
        results.append(module.capacity_loss(agent, args, *data))
    cpu, cuda = results
    assert all(cuda[name] == pytest.approx(cpu[name], rel=1e-2) for name in cpu)


@needs_cuda
def test_nothing_in_the_minibatch_loop_waits_for_the_device():
    module, agent, args, minibatch = make_update("ppo_atari", CUDA, minibatch_size=16)
    optimizer, vectors = module.make_optimizer(agent, args)
    module.step(optimizer, vectors, [torch.zeros_like(x) for x in vectors])  # makes Adam's state
    torch.cuda.set_sync_debug_mode("error")
    try:
        for part in module.minibatches(minibatch, args.minibatch_size):
            gradients, *_ = module.ppo_gradient(agent, args, **part)
            module.step(optimizer, vectors, gradients)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("flags", ["", "--compile"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_resumed_run_is_identical(tmp_path, script, flags):
    flags = f"{SMALL[script]} --runs-dir {tmp_path} {flags}"
    assert call(script, f"{flags} --run-name whole").returncode == 0
    call(script, f"{flags} --run-name run", prepare=fault_at("torch.optim:Adam.step", 40))
    ended = call(script, f"--runs-dir {tmp_path} --run-name run --resume")
    assert ended.returncode == 0 and "bit-identical" not in ended.stderr
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    assert same_scalars(tmp_path / "run", tmp_path / "whole")


@needs_cuda
def test_a_fit_to_36000_states_needs_less_than_a_gigabyte():
    module, agent, args, _ = make_update("ppo_atari", CUDA)
    frames = torch.zeros(36_001, 84, 84, dtype=torch.uint8)
    index = torch.arange(36_000).unsqueeze(1).expand(-1, 4)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    module.capacity_loss(agent, args, *module.capacity_target(agent, frames, index))
    assert torch.cuda.max_memory_allocated() - before < 2**30

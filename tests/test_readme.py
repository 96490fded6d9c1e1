"""What the README and the notebook tell people to type is what the scripts accept, and the changes
that the README ("Change it") and the page on Atari show work."""

import importlib.util
import math
import re
import shlex
import sys

import nbformat
import pytest
import torch
from conftest import ROOT, SMALL, final_weights, read_scalars, same_weights

README = (ROOT / "README.md").read_text()
CELLS = nbformat.read(ROOT / "plots.ipynb", 4).cells
NOTEBOOK = "\n".join(cell.source for cell in CELLS if cell.cell_type == "code")


def commands():
    """Every call of a script in the README and in the notebook's advice."""
    readme = (
        re.sub("<!--.*?-->", "", README)
        .replace("$epochs", "10")
        .replace("$pfo", "0")
        .replace("$seed", "25")
    )
    readme = readme.replace("$flags", "--run-name NAME")
    readme = readme.replace("--resume {}", "--resume --run-name NAME").replace("\\\n", " ")
    collapse = re.search(r'COLLAPSE = "(.+)"', NOTEBOOK)
    notebook = NOTEBOOK.replace("{COLLAPSE}", collapse[1] if collapse else "")
    call = r"(ppo_mujoco|ppo_atari|ppo_toy|capacity)\.py((?: +[\w./*+:-]+)*)"
    for script, flags in re.findall(call, readme + notebook):
        if script != "capacity" or flags:
            yield script, flags.replace(" --help", "")
    for flags in re.findall(r'echo "(--[^"]+)"', readme):
        yield "ppo_mujoco", flags


@pytest.mark.parametrize("script, flags", sorted(set(commands())))
def test_every_command_of_the_readme_is_accepted(monkeypatch, script, flags):
    module, words = importlib.import_module(script), shlex.split(flags)
    args = module.Args
    if script == "ppo_toy" and words[:1] != ["train"]:
        args = module.ToyArgs
    elif script == "ppo_toy":
        words = words[1:]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
    args = module.tyro.cli(args)
    if hasattr(module, "check") and hasattr(args, "minibatch_size"):
        module.check(args)


def test_the_readme_names_every_tag(run):
    """The table "Logged tags" names each tag that a run writes, whole or by its last part."""
    table = README.partition("## Logged tags")[2].partition("\n## ")[0]
    for tag in read_scalars(run("ppo_mujoco")):
        assert re.search(rf"\b{tag.rpartition('/')[2]}\b", table), tag


def test_files_that_the_readme_shows_exist():
    paths = re.findall(r"\]\(([.\w/-]+)\)", README)
    assert len(paths) >= 3 and all((ROOT / path).exists() for path in paths)


def changes():
    """(script, diff) of each ```diff block below a line <!-- change: SCRIPT.py ... -->."""
    block = r"<!-- change: ([\w. ]+) -->\n+```diff\n(.*?)```"
    text = README + (ROOT / ".results/atari.md").read_text()
    found = re.findall(block, text, re.DOTALL)
    return [(x.removesuffix(".py"), diff) for names, diff in found for x in names.split()]


CHANGES = changes()
IDS = [f"{script}: {re.findall('(?m)^[+](.*)', diff)[0].strip()[:40]}" for script, diff in CHANGES]


@pytest.mark.parametrize("script", SMALL)
@pytest.mark.parametrize("word", ["losses[", "LayerNorm"])
def test_the_readme_shows_a_regulariser_and_layer_norm_for_every_script(script, word):
    assert any(script == x and word in diff for x, diff in CHANGES)


def apply_change(text, diff, name):
    """A text with a diff's lines ' ' and '-' replaced by its lines ' ' and '+', wherever they
    stand: hunks are separated by lines that begin with @@."""
    for hunk in re.split(r"(?m)^@@.*\n", diff.strip("\n")):
        lines = [line or " " for line in hunk.splitlines()]
        before = "\n".join(line[1:] for line in lines if line[0] in " -")
        after = "\n".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(before + "\n") == 1, f"{name}: not there exactly once:\n{before}"
        text = text.replace(before + "\n", after + "\n")
    return text


@pytest.fixture
def changed(tmp_path, monkeypatch):
    """changed("ppo_mujoco", diff, "--seed 3"): the run of a changed script, and its module."""

    def changed(script, diff, flags="", name="changed"):
        path = tmp_path / f"{script}.py"
        path.write_text(apply_change((ROOT / path.name).read_text(), diff, path.name))
        spec = importlib.util.spec_from_file_location(script, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, script, module)
        spec.loader.exec_module(module)
        words = f"{path} {SMALL[script]} --runs-dir {tmp_path} --run-name {name} {flags}"
        monkeypatch.setattr(sys, "argv", words.split())
        module.main()
        return tmp_path / name, module

    return changed


@pytest.mark.parametrize("script, diff", CHANGES, ids=IDS)
def test_a_change_of_the_readme_runs_and_changes_the_weights(run, changed, script, diff):
    flags = "--activation relu --learning-rate 0.02"  # with which neurons die
    plain, (run_dir, _) = run(script, flags, name="plain"), changed(script, diff, flags)
    weights, scalars = final_weights(run_dir), read_scalars(run_dir)
    assert all(p.isfinite().all() for p in weights.values())
    assert scalars["representation/actor/pca_rank"][-1][0] in (512, 768)
    assert not same_weights(run_dir, plain)
    new = set(re.findall(r'(?m)^\+.*losses\["(\w+)"\]', diff))
    for name in new:  # a loss is logged under its own name, at every log point
        points = scalars[f"losses/{name}"]
        assert [step for step, _ in points] == [x for x, _ in scalars["losses/policy_loss"]]
        assert all(math.isfinite(value) for _, value in points)


def with_layer_norm():
    return [(script, diff) for script, diff in CHANGES if "LayerNorm" in diff]


@pytest.mark.parametrize("script, diff", with_layer_norm())
def test_with_layer_norm_the_preactivations_are_those_after_it(changed, script, diff):
    """It is what the ranks and norms see, what PFO holds and what the NumPy actor computes."""
    diff = re.sub(r"(?m)^(\+.*LayerNorm\()([^,)\n]+)\)", r"\1\2, elementwise_affine=False)", diff)
    run_dir, module = changed(script, diff, "--width 32")
    scalars = read_scalars(run_dir)
    for network in ("actor", "critic"):
        for _, norm in scalars[f"representation/{network}/preactivation_norm"]:
            # a normalised vector of `width` numbers, less the 1e-5 that LayerNorm adds
            assert norm == pytest.approx(math.sqrt(32), rel=5e-2)
    pfo_dir, _ = changed(script, diff, "--width 32 --pfo-coef 100", name="pfo")
    assert not same_weights(run_dir, pfo_dir)
    drift = "trust_region/preactivation_drift"
    without, with_pfo = (sum(v for _, v in read_scalars(x)[drift]) for x in (run_dir, pfo_dir))
    assert with_pfo < without
    if script == "ppo_mujoco":
        assert_numpy_actor_agrees(module, run_dir)


def assert_numpy_actor_agrees(module, run_dir):
    (path, *_) = run_dir.glob("checkpoints/512.pt")
    state = torch.load(path, weights_only=True)
    args = module.Args(**state["args"])
    envs = module.Envs(args, 1, stream=0, obs_stats=state["obs_stats"])
    agent = module.Agent(envs, args)
    agent.load_state_dict(state["agent"])
    obs, noise = torch.randn(50, envs.obs_dim), torch.randn(50, envs.action_dim)
    with torch.no_grad():
        outputs = agent(obs)
        loc, scale = agent.normal(outputs.policy)
    assert outputs.held.pow(2).mean(1).sqrt().mean() == pytest.approx(1, rel=0.05)
    u = (loc + scale * noise).clamp(-3, 3)
    ours = torch.from_numpy(agent.numpy_actor()(obs.numpy(), noise.numpy())).clamp(-3, 3)
    torch.testing.assert_close(ours, u, rtol=1e-3, atol=1e-4)


def test_a_diff_that_does_not_fit_is_an_error():
    text = "a = 1\nb = 2\nb = 2\n"
    assert apply_change(text, "-a = 1\n+a = 3\n b = 2\n", "x") == "a = 3\nb = 2\nb = 2\n"
    for diff in ("-c = 1\n+c = 2\n", "-b = 2\n+b = 3\n"):
        with pytest.raises(AssertionError, match="exactly once"):
            apply_change(text, diff, "x")

"""What the pages (README.md, .results/*.md) and the notebook tell people to type is accepted by the
scripts. The changes and the Python code that they show work."""

import importlib
import importlib.util
import itertools
import math
import re
import shlex
import sys

import nbformat
import pytest
import torch
from conftest import ROOT, SMALL, final_weights, read_scalars, same_weights

PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *ROOT.glob(".results/*.md")]}
README = PAGES["README.md"]
CELLS = nbformat.read(ROOT / "plots.ipynb", 4).cells
NOTEBOOK = "\n".join(cell.source for cell in CELLS if cell.cell_type == "code")
PLACEHOLDERS = {"$epochs": "10", "$pfo": "0", "$seed": "25", "$flags": "--run-name NAME"}
PLACEHOLDERS |= {"--resume {}": "--resume --run-name NAME", "{}": "runs/NAME"}


def commands():
    """Every call of a script in the code of the pages and in the notebook."""
    text = re.sub("(?s)<!--.*?-->", "", "\n\n".join(PAGES.values()))
    text = "\n".join(re.findall("(?s)```.*?```|`[^`]+`", text)).replace("\\\n", " ")
    text += "\n" + "\n".join(x.replace("\n", " ") for x in re.findall('(?s)"""(.*?)"""', NOTEBOOK))
    for placeholder, value in PLACEHOLDERS.items():
        text = text.replace(placeholder, value)
    call = r"(ppo_mujoco|ppo_atari|ppo_toy|capacity)\.py((?: +[\w./*+:-]+)*)"
    for script, flags in re.findall(call, text):
        if script != "capacity" or flags:
            yield script, flags.replace(" --help", "")
    for flags in re.findall(r'echo "(--[^"]+)"', text):
        yield "ppo_mujoco", flags


@pytest.mark.parametrize("script, flags", sorted(set(commands())))
def test_every_command_of_the_pages_is_accepted(monkeypatch, script, flags):
    module, words = importlib.import_module(script), shlex.split(flags)
    args = module.Args
    if script == "ppo_toy":
        args = module.Args if words[:1] == ["train"] else module.ToyArgs
        words = words[words[:1] == ["train"] :]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
    args = module.tyro.cli(args)
    if hasattr(args, "total_timesteps"):
        module.check(args)


def test_the_readme_names_every_tag(finished):
    """The table "Logged tags" names each tag that a run writes, whole or by its last part."""
    table = README.partition("## Logged tags")[2].partition("\n## ")[0]
    for tag in read_scalars(finished("ppo_mujoco")):
        assert re.search(rf"\b{tag.rpartition('/')[2]}\b", table), tag


def anchors(page):
    """What GitHub makes of the headings of a page."""
    titles = re.findall("(?m)^#+ (.+)$", re.sub("(?s)```.*?```", "", page))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_files_and_sections_that_a_page_links_exist(name):
    folder = ROOT if name == "README.md" else ROOT / ".results"
    page = re.sub("(?s)<!--.*?-->|```.*?```|`[^`]*`", "", PAGES[name])
    for path, section in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page):
        assert (folder / path).exists(), path
        assert not section or section in anchors(PAGES[path.rpartition("/")[2] or name]), section


def changes(page):
    """(script, diff) of each ```diff block below a line <!-- change: SCRIPT.py ... -->."""
    found = re.findall(r"(?s)<!-- change: ([\w. ]+) -->\n+```diff\n(.*?)```", page)
    return [(x.removesuffix(".py"), diff) for names, diff in found for x in names.split()]


CHANGES = list(dict.fromkeys(x for page in PAGES.values() for x in changes(page)))
RECIPES = [x for x in CHANGES if x in changes(PAGES["recipes.md"])]


def title(change):
    script, diff = change
    return f"{script}: {re.findall('(?m)^[+](.*)', diff)[-1].strip()[:40]}"


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
    """changed("ppo_mujoco", [diff], "--seed 3"): the run of a changed script, and its module."""

    def changed(script, diffs, flags="", name="changed"):
        path, text = tmp_path / f"{script}.py", (ROOT / f"{script}.py").read_text()
        for diff in diffs:
            text = apply_change(text, diff, path.name)
        path.write_text(text)
        spec = importlib.util.spec_from_file_location(script, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, script, module)
        spec.loader.exec_module(module)
        words = f"{path} {SMALL[script]} --runs-dir {tmp_path} --run-name {name} {flags}"
        monkeypatch.setattr(sys, "argv", words.split())
        module.main()
        return tmp_path / name, module

    return changed


@pytest.mark.parametrize("script, diff", CHANGES, ids=map(title, CHANGES))
def test_a_change_of_a_page_runs_and_changes_the_weights(finished, changed, script, diff):
    flags = "--activation relu --learning-rate 0.02 --width 32"  # so that neurons die,
    flags += " --capacity-interval 0 --update-epochs 8"  # and some ratios are large
    flags += " --total-timesteps 288" if script == "ppo_atari" else ""
    flags += " --policy gaussian" if "agent.low" in diff else ""
    if "// 1000" in diff:  # ReDo acts at the 1,000th gradient step
        atari = " --minibatch-size 2 --update-epochs 21"
        flags += atari if script == "ppo_atari" else " --update-epochs 32"
    plain = finished(script, flags)
    run_dir, _ = changed(script, [diff], flags)
    weights, scalars = final_weights(run_dir), read_scalars(run_dir)
    assert all(p.isfinite().all() for p in weights.values())
    assert scalars["representation/actor/pca_rank"][-1][0] in (512, 288)
    assert not same_weights(run_dir, plain)
    new = set(re.findall(r'(?m)^\+.*losses\["(\w+)"\]', diff))
    for name in new:  # a loss is logged under its own name, at every log point
        points = scalars[f"losses/{name}"]
        assert [step for step, _ in points] == [x for x, _ in scalars["losses/policy_loss"]]
        assert all(math.isfinite(value) for _, value in points)


def replaced(diff):
    """The lines that a diff removes, and those that build the network."""
    return {line[1:] for line in diff.splitlines() if re.match("-| .*nn.Linear", line)}


@pytest.mark.parametrize("script", SMALL)
def test_recipes_that_change_different_lines_apply_together(changed, script):
    diffs = [diff for name, diff in RECIPES if name == script]
    for pair in itertools.combinations(diffs, 2):
        if not replaced(pair[0]) & replaced(pair[1]):
            text = (ROOT / f"{script}.py").read_text()
            for diff in pair:
                text = apply_change(text, diff, script)
            compile(text, script, "exec")
    both = [diff for diff in diffs if re.search(r"LayerNorm|AdamW\(", diff)]
    assert len(both) == 2 and changed(script, both)


@pytest.mark.parametrize("script, diff", [x for x in CHANGES if "LayerNorm" in x[1]])
def test_with_layer_norm_the_preactivations_are_those_after_it(changed, script, diff):
    """They are what the ranks and norms see, what PFO acts on and what the NumPy actor computes."""
    diff = re.sub(r"(?m)^(\+.*LayerNorm\()([^,)\n]+)\)", r"\1\2, elementwise_affine=False)", diff)
    run_dir, module = changed(script, [diff], "--width 32")
    scalars = read_scalars(run_dir)
    for network in ("actor", "critic"):
        for _, norm in scalars[f"representation/{network}/preactivation_norm"]:
            # a normalised vector of `width` numbers, except for the 1e-5 that LayerNorm adds
            assert norm == pytest.approx(math.sqrt(32), rel=5e-2)
    pfo_dir, _ = changed(script, [diff], "--width 32 --pfo-coef 100", name="pfo")
    drift = "trust_region/preactivation_drift"
    without, with_pfo = (sum(v for _, v in read_scalars(x)[drift]) for x in (run_dir, pfo_dir))
    assert with_pfo < without
    if script == "ppo_mujoco":
        assert_the_numpy_actor_agrees(module, run_dir / "latest.pt")


def assert_the_numpy_actor_agrees(module, path):
    state = torch.load(path, weights_only=True)
    args = module.Args(**state["args"])
    envs = module.Envs(args, 1, stream=0, obs_stats=state["obs_stats"])
    agent = module.Agent(envs, args).eval()
    agent.load_state_dict(state["agent"])
    obs, noise = torch.randn(50, envs.obs_dim), torch.randn(50, envs.action_dim)
    with torch.no_grad():
        loc, scale = agent.normal(agent(obs).policy)
    ours = torch.from_numpy(module.numpy_actor(agent)(obs.numpy(), noise.numpy())).clamp(-3, 3)
    torch.testing.assert_close(ours, (loc + scale * noise).clamp(-3, 3), rtol=1e-3, atol=1e-4)
    return agent, envs


COMPARE_ACTIONS = """
         b_logprobs = agent.log_prob(old.policy, b_actions)
+        loc, scale = agent.normal(old.policy)
+        expected = loc + scale * torch.from_numpy(noise).flatten(0, 1)
+        torch.testing.assert_close(b_actions, expected, rtol=1e-4, atol=1e-5)
"""


def test_spectral_norm_acts_as_it_scores_and_resumes(changed, monkeypatch):
    """Its layers differ in training mode, and their type is not nn.Linear."""
    flags = "--action-logprob sampled --learning-rate 0.01"
    (norm,) = (x for name, x in RECIPES if name == "ppo_mujoco" and "spectral_norm" in x)
    whole, module = changed("ppo_mujoco", [norm, COMPARE_ACTIONS], flags, name="whole")
    changed("ppo_mujoco", [norm], f"{flags} --total-timesteps 256", name="run")
    run_dir, _ = changed("ppo_mujoco", [norm], f"{flags} --resume", name="run")
    assert same_weights(run_dir, whole)
    agent, envs = assert_the_numpy_actor_agrees(module, whole / "latest.pt")
    act = module.numpy_actor(agent)
    monkeypatch.setattr(torch.nn.Module, "__call__", None)  # the actor does without torch
    act(envs.reset(), agent.noise(1, 1)[0])


BLOCKS = {
    name: code
    for page in PAGES.values()
    for name, code in re.findall(r"(?s)<!-- tried: ([\w-]+) -->\n+```python\n(.*?)```", page)
}


def test_the_code_that_loads_an_agent_runs(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").symlink_to(tmp_path)
    run("ppo_mujoco", name="NAME")
    monkeypatch.chdir(tmp_path)
    exec(BLOCKS["watch"], {})
    assert capsys.readouterr().out.strip().endswith(")]")


def test_the_code_that_watches_another_library_runs(tmp_path, monkeypatch):
    pytest.importorskip("stable_baselines3")
    monkeypatch.chdir(tmp_path)
    exec(BLOCKS["stable-baselines3"].replace("10_000", "3_000"), {})

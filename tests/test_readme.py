"""What the README and the notebook tell people to type is what the scripts accept."""

import importlib
import re
import shlex
import sys

import nbformat
import pytest
from conftest import ROOT, read_scalars

README = (ROOT / "README.md").read_text()
NOTEBOOK = "\n".join(cell.source for cell in nbformat.read(ROOT / "plots.ipynb", 4).cells if cell.cell_type == "code")


def commands():
    """Every call of a script in the README (its code blocks, its tables, its loop's flags) and in the notebook's advice."""
    readme = README.replace("$epochs", "10").replace("$pfo", "0").replace("$seed", "25")
    readme = readme.replace("$flags", "--run-name NAME").replace("--resume {}", "--resume --run-name NAME")
    notebook = NOTEBOOK.replace("{COLLAPSE}", re.search(r'COLLAPSE = "(.+)"', NOTEBOOK)[1])
    for script, flags in re.findall(r"(ppo_mujoco|ppo_atari|ppo_toy|capacity)\.py((?: +[\w./*+-]+)*)", readme + notebook):
        if script != "capacity" or flags:
            yield script, flags.replace(" --help", "")
    for flags in re.findall(r'echo "(--[^"]+)"', readme):
        yield "ppo_mujoco", flags


@pytest.mark.parametrize("script, flags", sorted(set(commands())))
def test_every_command_of_the_readme_is_accepted(monkeypatch, script, flags):
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *shlex.split(flags)])
    if script != "ppo_toy":
        args = module.parse_args(module.Args)
    else:
        training = sys.argv[1:2] == ["train"]
        del sys.argv[1 : 1 + training]
        args = module.parse_args(module.Args if training else module.ToyArgs)
    args.check()


def test_the_readme_names_every_tag(run):
    """The table "Logged tags" names each tag that a run writes, whole or by its last part."""
    table = README.partition("## Logged tags")[2].partition("\n## ")[0]
    for tag in read_scalars(run("ppo_mujoco")):
        assert re.search(rf"\b{tag.rpartition('/')[2]}\b", table), tag


def test_files_that_the_readme_shows_exist():
    paths = re.findall(r"\]\(([.\w/-]+)\)", README)
    assert len(paths) >= 3 and all((ROOT / path).exists() for path in paths)

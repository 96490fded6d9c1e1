"""What the README and the notebook tell people to type is what the scripts accept."""

import importlib
import re
import shlex
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def commands():
    """Every call of a training script in the README: in its code blocks, its tables and its loops' flags."""
    filled = README.replace("$epochs", "10").replace("$pfo", "0").replace("$seed", "25")
    for script, flags in re.findall(r"(ppo_mujoco|ppo_atari|ppo_toy)\.py((?: +[\w./+-]+)*)", filled):
        yield script, flags.replace(" --help", "")
    for flags in re.findall(r'echo "(--[^"]+)"', filled):
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
    args.resume, args.run_name = False, "run"
    args.check()


def test_the_readme_names_every_tag(run):
    """The table "Logged tags" names each tag that a run writes, whole or by its last part."""
    from conftest import read_scalars

    table = README.partition("## Logged tags")[2].partition("\n## ")[0]
    for tag in read_scalars(run("ppo_mujoco")):
        assert re.search(rf"\b{tag.rpartition('/')[2]}\b", table), tag


def test_files_that_the_readme_shows_exist():
    for path in re.findall(r"\]\(([.\w/-]+)\)|src=\"([^\"]+)\"", README):
        assert (ROOT / "".join(path)).exists(), path

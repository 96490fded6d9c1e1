"""The scripts repeat what they share, and the copies are identical; every script reads top to bottom."""

import ast
import builtins
import re

import pytest
from conftest import ROOT

TRAINING = ("ppo_mujoco", "ppo_atari", "ppo_toy")
SCRIPTS = (*TRAINING, "capacity")
OWN = {"Args", "Agent", "Envs", "main"}  # what may differ under the same name
HEADERS = [
    "Setup",
    "Rollout",
    "Advantages",
    "PPO update",
    "Representation",
    "Trust region",
    "Capacity loss",
    "Logging",
    "Checkpoint",
]
TEXTS = {script: (ROOT / f"{script}.py").read_text() for script in SCRIPTS}
TREES = {script: ast.parse(text) for script, text in TEXTS.items()}


def definitions(script):
    """{name: source} of the top-level functions and classes, decorators included."""
    lines = TEXTS[script].splitlines()
    nodes = [node for node in TREES[script].body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    first = {node.name: min([node.lineno, *(d.lineno for d in node.decorator_list)]) for node in nodes}
    return {node.name: "\n".join(lines[first[node.name] - 1 : node.end_lineno]) for node in nodes}


def training_loop(script):
    """The source from "# Advantages" to the end of its function, which is the same in every training script."""
    text = TEXTS[script]
    start = text.index("        # Advantages\n")
    line = text[:start].count("\n") + 1
    end = next(n.end_lineno for n in TREES[script].body if n.lineno <= line <= n.end_lineno)
    return "\n".join(text.splitlines()[line - 1 : end])


def flags(script):
    """{flag: help} of the training arguments."""
    body = next(n for n in TREES[script].body if isinstance(n, ast.ClassDef) and n.name == "Args").body
    pairs = zip(body, body[1:])
    return {
        f.target.id: ast.literal_eval(d.value) for f, d in pairs if isinstance(f, ast.AnnAssign) and isinstance(d, ast.Expr)
    }


@pytest.mark.parametrize("other", SCRIPTS[1:])
def test_same_name_means_same_text(other):
    ours, theirs = definitions("ppo_mujoco"), definitions(other)
    shared = ours.keys() & theirs.keys() - OWN
    assert len(shared) >= (4 if other == "capacity" else 35)
    assert [name for name in shared if ours[name] != theirs[name]] == []
    if other == "ppo_toy":
        ours = definitions("ppo_atari")
        assert [name for name in ours.keys() & theirs.keys() - OWN if ours[name] != theirs[name]] == []


@pytest.mark.parametrize("other", TRAINING[1:])
def test_the_training_loop_is_the_same_from_the_advantages_on(other):
    assert training_loop(other) == training_loop("ppo_mujoco")


@pytest.mark.parametrize("script", TRAINING)
def test_the_headers_are_the_same_landmarks_in_the_same_order(script):
    found = re.findall(r"^ +# (" + "|".join(HEADERS) + r")(?=$|:)", TEXTS[script], re.MULTILINE)
    assert found == HEADERS


@pytest.mark.parametrize("other", TRAINING[1:])
def test_the_help_of_a_flag_is_the_same_everywhere(other):
    ours, theirs = flags("ppo_mujoco"), flags(other)
    assert [name for name in ours.keys() & theirs.keys() - {"env_id"} if ours[name] != theirs[name]] == []
    assert len(ours.keys() & theirs.keys()) > 45


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_help_and_is_read(script):
    text = "\n".join(source for name, source in definitions(script).items() if name != "Args")
    for name, node in ((n.name, n) for n in TREES[script].body if isinstance(n, ast.ClassDef) and n.name.endswith("Args")):
        fields = [f.target.id for f in node.body if isinstance(f, ast.AnnAssign)]
        documented = [
            f.target.id for f, d in zip(node.body, node.body[1:]) if isinstance(f, ast.AnnAssign) and isinstance(d, ast.Expr)
        ]
        assert fields == documented, name
        # --wandb-project and the like are read in functions; --seed of the toy in toy()
        unread = [field for field in fields if not re.search(rf"\bargs\.{field}\b", text)]
        assert unread == [], name


def names_read(function):
    """Names that a function reads and neither binds nor receives, its inner functions included."""
    bound, read = set(), set()
    for node in ast.walk(function):
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            bound |= {a.arg for a in (*node.args.args, *node.args.kwonlyargs, *node.args.posonlyargs)}
            bound |= {a.arg for a in (node.args.vararg, node.args.kwarg) if a}
            bound |= {node.name} if isinstance(node, ast.FunctionDef) else set()
        elif isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return read - bound - set(dir(builtins)) - {"__file__"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_functions_see_their_arguments_and_what_is_defined_above_them(script):
    seen = set()
    for node in TREES[script].body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            seen |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            parts = [node] if isinstance(node, ast.FunctionDef) else [n for n in node.body if isinstance(n, ast.FunctionDef)]
            for part in parts:
                assert names_read(part) - seen - {node.name} == set(), f"{node.name}.{part.name}"
            seen.add(node.name)
        else:  # the docstring and the last lines: no constants, no code at import
            assert isinstance(node, (ast.Expr, ast.If)), ast.unparse(node)

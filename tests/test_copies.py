"""The scripts repeat what they share, and the copies are identical; every script reads top to
bottom."""

import ast
import builtins
import itertools
import re

import pytest
from conftest import ROOT

TRAINING = ("ppo_mujoco", "ppo_atari", "ppo_toy")
SCRIPTS = (*TRAINING, "capacity")
OWN = {"Args", "Agent", "Envs", "check", "main"}  # what may differ under the same name
RUN = {"Run"}  # that of the toy and of capacity.py
HEADERS = "Setup|Rollout|Advantages|Representation|PPO update|Trust region|Capacity loss|Logging"
HEADERS = [*HEADERS.split("|"), "Checkpoint"]
TEXTS = {script: (ROOT / f"{script}.py").read_text() for script in SCRIPTS}
TREES = {script: ast.parse(text) for script, text in TEXTS.items()}
ADVICE = (
    "{} is not the same text in {}.py and {}.py. Copy the change to the other scripts, or leave "
    "this test out (pytest --ignore tests/test_copies.py) if you changed one script for yourself."
)


def definitions(script):
    """{name: source} of the top-level functions and classes, decorators included."""
    lines, found = TEXTS[script].splitlines(), {}
    for node in TREES[script].body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def sections(script, first, last):
    """The source of the training loop from the header `first` to the end of the section `last`;
    the last one reaches to the end of its function."""
    text = TEXTS[script]
    start = text.index(f"\n        # {first}") + 1
    if last == HEADERS[-1]:
        return text[start:].partition("\n\n\n")[0]
    after = HEADERS[HEADERS.index(last) + 1]
    return text[start : text.index(f"\n        # {after}")]


@pytest.mark.parametrize("ours, theirs", list(itertools.combinations(SCRIPTS, 2)))
def test_the_same_name_is_the_same_text(ours, theirs):
    a, b = definitions(ours), definitions(theirs)
    shared = a.keys() & b.keys() - OWN - (RUN if theirs in ("ppo_toy", "capacity") else set())
    assert len(shared) >= (3 if theirs == "capacity" else 15)
    different = sorted(name for name in shared if a[name] != b[name])
    assert different == [], ADVICE.format(" and ".join(different), ours, theirs)


@pytest.mark.parametrize(
    "script, first, last",
    [("ppo_atari", "Advantages", "Checkpoint"), ("ppo_toy", "Representation", "Capacity loss")],
)
def test_the_training_loop_is_the_same_text(script, first, last):
    ours, theirs = (sections(x, first, last) for x in ("ppo_mujoco", script))
    assert len(ours.splitlines()) > 35
    what = f"The training loop from # {first} to the end of # {last}"
    assert ours == theirs, ADVICE.format(what, "ppo_mujoco", script)


@pytest.mark.parametrize("script", TRAINING)
def test_the_headers_are_the_same_landmarks_in_the_same_order(script):
    found = re.findall(rf"^ +# ({'|'.join(HEADERS)})(?=$|:)", TEXTS[script], re.MULTILINE)
    assert found == HEADERS


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script):
    sources = definitions(script)
    flags = [node for node in TREES[script].body if node.__class__ is ast.ClassDef]
    for node in (node for node in flags if node.name.endswith("Args")):
        text = "\n".join(source for name, source in sources.items() if name != node.name)
        fields = [x.target.id for x in node.body if isinstance(x, ast.AnnAssign)]
        unread = [field for field in fields if not re.search(rf"\bargs\.{field}\b", text)]
        assert len(fields) > 8 and unread == [], f"{node.name}: no code reads {unread}"


def names_bound(node):
    """Names that an import, a definition or an assignment binds."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, ast.Assign):
        return {x.id for target in node.targets for x in ast.walk(target) if type(x) is ast.Name}
    return set()


def names_read(function):
    """Names that a function reads and neither binds nor receives, inner functions included."""
    bound, read = set(), set()
    for node in ast.walk(function):
        bound |= names_bound(node)
        if isinstance(node, (ast.FunctionDef, ast.Lambda)):
            bound |= {x.arg for x in ast.walk(node.args) if isinstance(x, ast.arg)}
        elif isinstance(node, ast.Name):
            (read if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            bound.add(node.name)
    return read - bound - set(dir(builtins)) - {"__file__"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_functions_see_their_arguments_and_what_is_defined_above_them(script):
    """What stands below main may be used above it: it is no part of PPO. No name of main is read
    by another function."""
    names = [name for node in TREES[script].body for name in names_bound(node)]
    below = set(names[names.index("main") + 1 :]) if "main" in names else set()
    seen = set()
    for node in TREES[script].body:
        seen |= names_bound(node)
        parts = node.body if isinstance(node, ast.ClassDef) else [node]
        for part in (part for part in parts if isinstance(part, ast.FunctionDef)):
            unknown = names_read(part) - seen - below
            assert unknown == set(), f"{node.name}.{part.name} reads {unknown}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_import_fails_on_windows_or_macos(script):
    imports = [
        node for node in ast.walk(TREES[script]) if type(node) in (ast.Import, ast.ImportFrom)
    ]
    modules = {getattr(node, "module", None) or node.names[0].name for node in imports}
    assert not modules & {"fcntl", "resource", "termios", "pwd", "grp", "pty", "posix", "syslog"}
    assert not re.search(r"signal\.SIG(HUP|ALRM|USR|PIPE)|os\.(fork|getuid)", TEXTS[script])

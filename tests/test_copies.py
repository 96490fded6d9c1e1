"""The scripts repeat what they share, and the copies are identical. Every script explains its flags
and names its requirements."""

import ast
import importlib
import itertools
import re
import sys
import tomllib

import pytest
import tyro
from conftest import ROOT

TRAINING = ("ppo_mujoco", "ppo_atari", "ppo_toy")
SCRIPTS = (*TRAINING, "capacity")
OWN = {"Args", "Agent", "Envs", "check", "main"}  # what may differ under the same name,
OWN_TOY = {"Run", "make_optimizer", "capacity_loss"}  # in the toy
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
    own = {"ppo_toy": OWN | OWN_TOY, "capacity": OWN | {"Run"}}
    shared = (a.keys() & b.keys()) - own.get(theirs, OWN)
    assert shared
    different = sorted(name for name in shared if a[name] != b[name])
    assert different == [], ADVICE.format(" and ".join(different), ours, theirs)


@pytest.mark.parametrize(
    "script, first, last",
    [
        ("ppo_atari", "Advantages", "Checkpoint"),
        ("ppo_toy", "Representation", "Representation"),
        ("ppo_toy", "Trust region", "Capacity loss"),
    ],
)
def test_the_training_loop_is_the_same_text(script, first, last):
    ours, theirs = (sections(x, first, last) for x in ("ppo_mujoco", script))
    what = f"The training loop from # {first} to the end of # {last}"
    assert ours == theirs, ADVICE.format(what, "ppo_mujoco", script)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_function_and_class_is_used(script):
    for name, source in definitions(script).items():
        rest = TEXTS[script].replace(source, "")
        assert re.search(rf"(?m)^[^#\n]*\b{name}\b", rest), f"{script}.py does not use {name}"


@pytest.mark.parametrize("script", TRAINING)
def test_the_headers_are_the_same_landmarks_in_the_same_order(script):
    found = re.findall(rf"^ +# ({'|'.join(HEADERS)})(?=$|:)", TEXTS[script], re.MULTILINE)
    assert found == HEADERS


FLAGS = [(script, name) for script in SCRIPTS for name in definitions(script) if "Args" in name]


@pytest.mark.parametrize("script, name", FLAGS)
def test_every_flag_is_read(script, name):
    sources = definitions(script)
    text = "\n".join(source for other, source in sources.items() if other != name)
    flags = re.findall(r"(?m)^    (\w+): ", sources[name])
    unread = [flag for flag in flags if not re.search(rf"\bargs\.{flag}\b", text)]
    assert len(flags) > 7 and unread == [], f"{name}: no code reads {unread}"


@pytest.mark.filterwarnings("ignore:get_parser")
@pytest.mark.parametrize("script, name", FLAGS)
def test_the_help_of_every_flag_is_its_own_comment(script, name):
    """The comment behind a flag, or above it; tyro also takes that of a section."""
    source = definitions(script)[name]
    behind = re.findall(r"(?m)^    (\w+): .*?  # (.+)$", source)
    above = re.findall(r"(?m)((?:^    # .+\n)+)    (\w+): ", source)
    comments = dict(behind) | {flag: re.sub(r"\s+(# )?", " ", text) for text, flag in above}
    parser = tyro.extras.get_parser(getattr(importlib.import_module(script), name))
    helps = {action.dest.replace("-", "_"): action.help for action in parser._actions}
    assert len(helps) > 7
    for flag, text in helps.items() - {("help", helps["help"])}:
        said = re.sub(r"\s+", " ", re.sub(r"\x1b\[\d*m", "", text or "")).strip()
        assert flag in comments and said.startswith(comments[flag].strip()), (flag, said)


def modules(script):
    """The modules that a script imports."""
    names = set()
    for node in ast.walk(TREES[script]):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {getattr(node, "module", None) or alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_import_fails_on_windows_or_macos(script):
    posix = {"fcntl", "resource", "termios", "pwd", "grp", "pty", "posix", "syslog"}
    assert not modules(script) & posix
    assert not re.search(r"signal\.SIG(HUP|ALRM|USR|PIPE)|os\.(fork|getuid)", TEXTS[script])


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_requirements_of_a_script_are_pinned_as_in_requirements_txt(script):
    """PEP 723: `uv run` installs what the block at the script's end names."""
    block = re.search(r"(?m)^# /// script$\n((?:^#(?: .*)?$\n)+?)^# ///$\n\Z", TEXTS[script])
    metadata = tomllib.loads(re.sub("(?m)^# ?", "", block[1]))
    pins = metadata["dependencies"]
    assert metadata["requires-python"] == ">=3.11" and pins == sorted(pins)
    assert set(pins) <= set((ROOT / "requirements.txt").read_text().split())
    named = {pin.partition("==")[0] for pin in pins}
    assert imported(script) <= named
    if script == "ppo_mujoco":
        assert named >= {"mujoco", "imageio"}  # Gymnasium's MuJoCo tasks import both
    if script == "capacity":  # imports the script of a run
        assert named >= set().union(*map(imported, TRAINING), {"mujoco", "imageio"})


def imported(script):
    """The distributions that a script imports, tensorboard for torch.utils.tensorboard."""
    names = [x.replace("torch.utils.tensorboard", "tensorboard") for x in modules(script)]
    names = {x.split(".")[0] for x in names}
    distributions = {"ale_py": "ale-py", "cv2": "opencv-python-headless"}
    return {distributions.get(x, x) for x in names - {*sys.stdlib_module_names, *SCRIPTS}}

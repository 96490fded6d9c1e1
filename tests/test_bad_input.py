"""Wrong command lines: one clear message on stderr, exit code 2, nothing created."""

import contextlib
import importlib
import io
import math
import re
import resource
import sys
from dataclasses import fields, replace
from typing import get_args, get_type_hints

import pytest
from conftest import call, contents
from hypothesis import given, settings
from hypothesis import strategies as st

TRAINING = {"ppo_mujoco": "", "ppo_atari": "", "ppo_toy": "train "}

# What is wrong with every training script: flags, and what the message must name
EVERYWHERE = [
    ("--no-such-flag 3", "--no-such-flag"),
    ("--sed 3", "--seed"),  # the nearest one is suggested
    ("--seed", "--seed"),
    ("stray", "stray"),
    (f"--total-timesteps {'9' * 401}", "--total-timesteps"),
    ("--minibatch-size 1000000", "--minibatch-size is 1000000: it must be from 2 to"),
    ("--capacity-steps 3", "--capacity-steps is 3"),
    ("--run-name a/b", "--run-name"),
    ("--run-name ..", "--run-name"),
    ("--run-name taken", "taken exists"),
    (f"--run-name {'ü' * 110}", "--run-name"),  # 220 bytes
    ("--run-name \udcff", ""),  # a byte that is no UTF-8
    ("--env-id NoSuchTask-v1", "NoSuchTask"),
    (f"--env-id {'x' * 300}", "--env-id"),
    # What opens a folder or a file
    (f"--capacity-interval 0 --runs-dir {'x' * 300}", "--runs-dir"),
    ("--capacity-interval 0 --runs-dir file", "file"),
    ("--capacity-interval 0 --runs-dir /proc/nowhere", "/proc/nowhere"),
]
# Those of the two scripts whose runs are kept
BIG = [
    ("--resume", "--run-name"),
    ("--runs-dir . --run-name file --resume", "file is not a folder"),
    ("--fork-from \udcff.pt", ".pt"),
    ("--fork-from runs", "error: there is no file runs"),
    ("--fork-from file", "file"),
    ("--fork-step 3", "--fork-step"),
    ("--fork-from file --run-name taken", "taken"),
    ("--track --capacity-interval 0", "wandb"),
]
ONE_SCRIPT = [
    ("ppo_mujoco", "--env-id Hoper-v4", "Did you mean: `Hopper`"),
    ("ppo_mujoco", "--env-id CartPole-v1", "ppo_toy.py"),
    ("ppo_mujoco", "--env-id ALE/Pong-v5", "ppo_atari.py"),
    ("ppo_mujoco", "--env-id Blackjack-v1", "Blackjack"),
    ("ppo_mujoco", "--env-id probe_envs:IntegerActions-v0", "IntegerActions"),
    ("ppo_mujoco", "--env-id probe_envs:Silent-v0", "NotImplementedError"),
    ("ppo_mujoco", "--env-id probe_envs:Exits-v0", "SystemExit"),
    ("ppo_atari", "--env-id ALE/Phenix-v5", "ALE/Phoenix-v5"),
    ("ppo_atari", "--env-id phoenix", "ALE/Phoenix-v5"),
    ("ppo_atari", "--env-id PhoenixNoFrameskip-v4", "ALE/Phoenix-v5"),
    ("ppo_atari", "--env-id ALE/Pong-ram-v5", "ALE/Pong-v5"),
    ("ppo_atari", "--env-id Hopper-v4", "ppo_toy.py train (discrete actions) or ppo_mujoco.py"),
    ("ppo_toy", "train --env-id Pendulum-v1", "ppo_mujoco.py"),
    ("ppo_toy", "train --env-id ALE/Pong-v5", "ppo_atari.py"),
    ("ppo_toy", "train --env-id FrozenLake-v1", "FrozenLake"),
    ("ppo_toy", "train --env-id probe_envs:Exits-v0", "SystemExit"),
    ("ppo_toy", "--env-id CartPole-v1", "train"),  # the word is forgotten
    ("ppo_toy", "trian", "trian"),
]
CASES = [
    *((name, word + x, says) for name, word in TRAINING.items() for x, says in EVERYWHERE),
    *((name, flags, says) for name in ("ppo_mujoco", "ppo_atari") for flags, says in BIG),
    *ONE_SCRIPT,
]
IDS = [ascii(" ".join(case[:2])[:60]) for case in CASES]


def assert_one_message(stderr, says):
    """A line of ours or a box of tyro's, and no traceback."""
    text = re.sub("[│─╭╮╰╯|+]|---+", " ", stderr)
    ours = re.findall(r"^\S+\.py: error: .+$", text.strip(), re.MULTILINE)
    boxes = re.findall("For full helptext", text)
    assert len(ours) + len(boxes) == 1 and "Traceback" not in text, stderr
    assert boxes or ours[0] == text.strip(), stderr  # and nothing else
    says, text = ("".join(x.split()) for x in (says, text))  # a box breaks lines
    assert says in text, stderr


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to work in, with a run named "taken" and a file named "file"."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    (tmp_path / "file").write_text("text")
    return tmp_path


@pytest.fixture
def main(monkeypatch, capsys):
    """main("ppo_mujoco", "--seed x"): exit code, stdout and stderr of its `main`."""

    def main(script, flags):
        module = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags.split()])
        if hasattr(module, "evaluate"):  # a run would take for ever
            monkeypatch.setattr(module, "evaluate", None)
        with pytest.raises(SystemExit) as stop:
            module.main()
        return stop.value.code, *capsys.readouterr()

    return main


@pytest.mark.parametrize("script, flags, says", CASES, ids=IDS)
def test_a_wrong_command_line_gets_one_message_and_creates_nothing(
    workplace, main, script, flags, says
):
    if says == "wandb" and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    before = contents(workplace)
    if "fork-from" in flags or "runs-dir" in flags:  # the guard says what is wrong with a file
        process = call(script, flags, cwd=workplace)
        code, out, err = process.returncode, process.stdout, process.stderr
    else:
        code, out, err = main(script, flags)
    assert code == 2 and out == "", (code, out, err)
    assert_one_message(err, says)
    assert contents(workplace) == before


@pytest.mark.parametrize("script", TRAINING)
@pytest.mark.parametrize("name, value", [("PATH", "/nowhere"), ("CXX", "false")])
def test_a_compiler_that_does_not_work_is_named(workplace, monkeypatch, main, script, name, value):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(name, value)
    before = contents(workplace)
    code, _, err = main(script, TRAINING[script] + "--compile")
    assert code == 2 and contents(workplace) == before
    assert_one_message(err, "--compile")
    assert name == "PATH" or value in err


def limit_memory():
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, used + 2**27))


@pytest.mark.parametrize("script", TRAINING)
def test_out_of_memory_gives_advice(workplace, script):
    before = contents(workplace)
    words = f"{TRAINING[script]} --width 4096 --capacity-interval 0"
    process = call(script, words, cwd=workplace, prepare=limit_memory)
    assert process.returncode == 2 and contents(workplace) == before
    assert_one_message(process.stderr, "out of memory: use a smaller --")


@pytest.mark.parametrize("script", TRAINING)
def test_every_number_is_accepted_to_its_ends_and_refused_beyond(script, capsys):
    module = importlib.import_module(script)
    hints = get_type_hints(module.Args, include_extras=True)
    args = module.Args(num_envs=1, num_steps=2, minibatch_size=2, capacity_interval=0.0)
    args.total_timesteps = 10**12
    # A batch has a minibatch, and a run has an iteration
    skip = getattr(args, "frameskip", 1)
    limits = {"minibatch_size": (2, 2), "total_timesteps": (2 * skip, 10**12)}
    for field in fields(args):
        name, kind = field.name, type(field.default)
        if kind not in (int, float) or name == "fork_step":
            continue
        message = f"{script}.py: {name} needs a range, Annotated[type, (low, high)]"
        assert hasattr(hints[name], "__metadata__"), message
        low, high = map(kind, limits.get(name, hints[name].__metadata__[0]))
        flag = f"--{name.replace('_', '-')}"
        beyond = [low - 1, high + 1]
        if kind is float:
            beyond = [math.nextafter(low, -math.inf), math.nextafter(high, math.inf)]
            beyond += [math.nan, math.inf]
        for value in beyond:
            with pytest.raises(SystemExit) as stop:
                module.check(replace(args, **{name: value}))
            (line,) = capsys.readouterr().err.splitlines()
            too_many = name in ("num_envs", "num_steps") and value > high  # for the whole run
            named = f"({flag}|--total-timesteps)" if too_many else flag
            assert stop.value.code == 2 and re.search(f"error: {named} is ", line), (name, line)
        for value in (low, high):
            with contextlib.suppress(SystemExit):  # another flag may not go together with it
                module.check(replace(args, **{name: value}))
            assert f"{flag} is" not in capsys.readouterr().err, (name, value)


@pytest.mark.parametrize("script", TRAINING)
def test_a_word_that_no_flag_takes_is_refused_and_the_flag_named(script, main, workplace):
    for field in fields(importlib.import_module(script).Args):
        if type(field.default) is not str or get_args(field.type):
            flag = f"--{field.name.replace('_', '-')}"
            code, out, err = main(script, f"{TRAINING[script]}{flag} nonsense")
            assert (code, out) == (2, ""), (flag, out)
            assert_one_message(err, "nonsense" if type(field.default) is bool else flag)


# Any words behind any flags are accepted or refused in one message
WORDS = st.sampled_from(
    ["", "0", "-1", "1e400", "nan", "inf", "last", "True", "../x", "ü", "--", "-", "1 2", "[]"]
    + ["\x00", "9" * 30, "9" * 5000, "1e-400", "0x10", "１", "None", "{}", "tanh,relu"]
)


@pytest.mark.parametrize("script", TRAINING)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_fuzzed_command_lines_parse_or_get_one_message(script, data):
    module, argv = importlib.import_module(script), sys.argv
    names = [field.name.replace("_", "-") for field in fields(module.Args)]
    flag = st.sampled_from([f"--{name}" for name in [*names, "nix"]])
    flags = data.draw(st.lists(st.tuples(flag, WORDS | st.text(max_size=8)), max_size=4))
    sys.argv = [f"{script}.py", *(word for pair in flags for word in pair)]
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
            module.check(module.tyro.cli(module.Args))
        assert not stderr.getvalue()
    except SystemExit as stop:
        assert stop.code == 2
        assert_one_message(stderr.getvalue(), "")
    finally:
        sys.argv = argv

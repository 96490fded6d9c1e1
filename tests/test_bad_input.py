"""Wrong command lines: one clear message on stderr, exit code 2, nothing created."""

import contextlib
import importlib
import io
import re
import sys

import pytest
from conftest import call
from hypothesis import given, settings
from hypothesis import strategies as st

TRAINING = {"ppo_mujoco": "", "ppo_atari": "", "ppo_toy": "train "}

# What is wrong with every training script: flags, and what the message must name
EVERYWHERE = [
    ("--no-such-flag 3", "--no-such-flag"),
    ("--sed 3", "--seed"),  # the nearest one is suggested
    ("--seed", "--seed"),
    ("--seed x", "--seed"),
    ("--seed 1.5", "--seed"),
    ("--seed -1", "--seed is -1"),
    (f"--seed {2**32}", "--seed"),
    ("stray", "stray"),
    ("--total-timesteps 0", "--total-timesteps"),
    ("--total-timesteps 10", "--total-timesteps is 10"),
    ("--total-timesteps 1e6", "--total-timesteps"),
    ("--num-envs 0", "--num-envs"),
    ("--num-envs -3", "--num-envs"),
    ("--num-steps 0", "--num-steps"),
    ("--minibatch-size 0", "--minibatch-size"),
    ("--minibatch-size 1", "--minibatch-size is 1"),
    ("--minibatch-size 1000000", "--minibatch-size is 1000000: it must be from 2 to"),
    ("--update-epochs 0", "--update-epochs"),
    ("--update-epochs many", "--update-epochs"),
    ("--learning-rate 0", "--learning-rate"),
    ("--learning-rate -1e-3", "--learning-rate"),
    ("--learning-rate nan", "--learning-rate is nan"),
    ("--learning-rate inf", "--learning-rate is inf"),
    ("--clip-coef 0", "--clip-coef"),
    ("--clip-coef nan", "--clip-coef"),
    ("--max-grad-norm 0", "--max-grad-norm"),
    ("--gamma 1.1", "--gamma"),
    ("--gamma -0.1", "--gamma"),
    ("--gae-lambda 2", "--gae-lambda"),
    ("--ent-coef -0.01", "--ent-coef"),
    ("--vf-coef -1", "--vf-coef"),
    ("--target-kl -1", "--target-kl"),
    ("--pfo-coef -1", "--pfo-coef is -1.0: it must be from 0"),
    ("--pfo-coef inf", "--pfo-coef"),
    ("--pfo-layers first", "--pfo-layers"),
    ("--pfo-reduction max", "--pfo-reduction"),
    ("--adam-beta1 1", "--adam-beta1"),
    ("--adam-beta2 -0.1", "--adam-beta2"),
    ("--reward-keep-prob 1.5", "--reward-keep-prob"),
    ("--activation gelu", "--activation"),
    ("--width 0", "--width"),
    ("--time-limit never", "--time-limit"),
    ("--log-interval 2", "--log-interval"),
    ("--log-interval -1", "--log-interval"),
    ("--capacity-interval nan", "--capacity-interval"),
    ("--capacity-steps 3", "--capacity-steps is 3"),
    ("--capacity-envs 0", "--capacity-envs"),
    ("--capacity-epochs 0", "--capacity-epochs"),
    ("--capacity-data mine", "--capacity-data"),
    ("--snapshot-interval 1.01", "--snapshot-interval"),
    ("--torch-threads -2", "--torch-threads"),
    ("--cuda maybe", "maybe"),
    ("--share-trunk yes", "yes"),
    ("--run-name a/b", "--run-name"),
    ("--run-name ..", "--run-name"),
    ("--run-name .", "--run-name"),
    ("--env-id", "--env-id"),
    ("--env-id NoSuchTask-v1", "NoSuchTask"),
    ("--run-name taken", "taken exists"),
    ("--save-patience 1", "--save-patience"),  # a flag that is gone
    # Extreme numbers
    ("--torch-threads 100000", "--torch-threads"),
    (f"--total-timesteps {'9' * 401}", "--total-timesteps"),
    ("--clip-coef 1e308", "--clip-coef"),
    (f"--width {2**31 - 1}", "--width"),
    (f"--width {2**31}", "--width"),
    (f"--capacity-steps {2**31 - 1}", "--capacity-steps"),
    (f"--capacity-epochs {10**9}", "--capacity-epochs"),
    (f"--num-envs {10**9}", "--num-envs"),
    (f"--num-steps {10**12}", "--num-steps"),
    (f"--update-epochs {10**18}", "--update-epochs"),
    ("--learning-rate 1e300", "--learning-rate"),
    ("--learning-rate 1e-320", "--learning-rate"),
    ("--vf-coef 1e308", "--vf-coef"),
    ("--pfo-coef 1e39", "--pfo-coef"),
    ("--max-grad-norm 1e308", "--max-grad-norm"),
    ("--adam-beta2 0.99999999", "--adam-beta2"),
    (f"--run-name {'x' * 201}", "--run-name"),
    (f"--run-name {'ü' * 130}", "--run-name"),  # more than 255 bytes
]
# Those of the two scripts whose runs are kept
BIG = [
    ("--checkpoint-interval -0.1", "--checkpoint-interval"),
    ("--resume", "--run-name"),
    ("--fork-from", "--fork-from"),
    ("--fork-from nowhere.pt", "error: there is no file nowhere.pt"),
    ("--fork-from runs", "error: there is no file runs"),
    ("--fork-from file", "file"),
    ("--fork-step 3", "--fork-step"),
    ("--fork-from file --run-name taken", "file"),
    ("--track --capacity-interval 0", "wandb"),
    (f"--capacity-interval 0 --runs-dir {'x' * 300}", "--runs-dir"),
    ("--capacity-interval 0 --runs-dir file", "--runs-dir"),
    ("--capacity-interval 0 --runs-dir file/deeper", "--runs-dir"),
    ("--capacity-interval 0 --runs-dir /proc/nowhere", "--runs-dir"),
]
ONE_SCRIPT = [
    ("ppo_mujoco", "--env-id Hoper-v4", "Did you mean: `Hopper`"),
    ("ppo_mujoco", "--env-id Hopper-v9", "v9"),
    ("ppo_mujoco", "--env-id CartPole-v1", "Discrete(2)"),
    ("ppo_mujoco", "--env-id ALE/Pong-v5", "--env-id ALE/Pong-v5"),
    ("ppo_mujoco", "--env-id no_such_module:Task-v0", "no_such_module"),
    ("ppo_mujoco", "--env-id :", "--env-id"),
    ("ppo_mujoco", "--env-id Blackjack-v1", "Blackjack"),
    ("ppo_mujoco", "--env-id probe_envs:IntegerActions-v0", "IntegerActions"),
    ("ppo_mujoco", "--env-id probe_envs:Silent-v0", "NotImplementedError"),
    ("ppo_mujoco", "--policy beta", "--policy"),
    ("ppo_mujoco", "--policy-std none", "--policy-std"),
    ("ppo_mujoco", "--action-logprob exact", "--action-logprob"),
    ("ppo_mujoco", "--obs-norm-steps 0", "--obs-norm-steps"),
    ("ppo_mujoco", f"--obs-norm-steps {10**12}", "--obs-norm-steps"),
    ("ppo_mujoco", "--frameskip 3", "--frameskip"),
    ("ppo_atari", "--env-id ALE/Phenix-v5", "ALE/Phoenix-v5"),
    ("ppo_atari", "--env-id Phoenix", "ALE/Phoenix-v5"),
    ("ppo_atari", "--env-id PhoenixNoFrameskip-v4", "ALE/Phoenix-v5"),
    ("ppo_atari", "--env-id BreakoutDeterministic-v4", "ALE/Breakout-v5"),
    ("ppo_atari", "--env-id ALE/Pong-ram-v5", "ALE/Pong-v5"),
    ("ppo_atari", "--env-id Hopper-v4", "Hopper-v4"),
    ("ppo_atari", "--frameskip 0", "--frameskip is 0"),
    ("ppo_atari", "--frameskip -4", "--frameskip"),
    ("ppo_atari", "--sticky 1.5", "--sticky"),
    ("ppo_atari", "--noop-max -1", "--noop-max"),
    ("ppo_atari", f"--noop-max {2**31 - 1}", "--noop-max"),
    ("ppo_atari", "--noop-max 99999999999", "--noop-max"),
    ("ppo_atari", "--max-episode-frames 0", "--max-episode-frames"),
    ("ppo_atari", "--env-threads -1", "--env-threads"),
    ("ppo_atari", "--env-threads 100000", "--env-threads"),
    ("ppo_atari", "--policy gaussian", "--policy"),
    ("ppo_toy", "train --env-id Pendulum-v1", "Pendulum"),
    ("ppo_toy", "train --env-id FrozenLake-v1", "FrozenLake"),
    ("ppo_toy", "train --resume", "--resume"),
    ("ppo_toy", "trian", "trian"),
    ("ppo_toy", f"--states {10**5}", "--states"),
]
CASES = [
    *(
        (script, word + flags, says)
        for script, word in TRAINING.items()
        for flags, says in EVERYWHERE
    ),
    *((script, flags, says) for script in ("ppo_mujoco", "ppo_atari") for flags, says in BIG),
    *ONE_SCRIPT,
]


def files(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


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
    monkeypatch.setattr(sys, "argv", sys.argv)
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    (tmp_path / "file").write_text("text")
    return tmp_path


def skip_if_it_is_right(says):
    if says == "wandb" and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")


@pytest.mark.parametrize("script, flags, says", CASES, ids=[" ".join(x[:2])[:60] for x in CASES])
def test_a_wrong_command_line_gets_one_message_and_creates_nothing(
    workplace, monkeypatch, capsys, script, flags, says
):
    skip_if_it_is_right(says)
    before = files(workplace)
    sys.argv = [f"{script}.py", *flags.split()]
    if "fork-from" in flags or "runs-dir" in flags:  # the guard says what is wrong with a file
        process = call(script, flags, cwd=workplace)
        code, out, err = process.returncode, process.stdout, process.stderr
    else:
        module = importlib.import_module(script)
        for name in {"evaluate", "simulate"} & vars(module).keys():  # a run would take for ever
            monkeypatch.setattr(module, name, None)
        with pytest.raises(SystemExit) as stop:
            module.main()
        code, (out, err) = stop.value.code, capsys.readouterr()
    assert code == 2 and out == "", (code, out, err)
    assert_one_message(err, says)
    assert files(workplace) == before


def test_the_table_is_large():
    assert len(CASES) >= 60


@pytest.mark.parametrize("script", TRAINING)
def test_a_missing_compiler_is_said_before_anything_is_created(
    workplace, monkeypatch, capsys, script
):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    before = files(workplace)
    sys.argv = [f"{script}.py", *TRAINING[script].split(), "--compile"]
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main()
    assert stop.value.code == 2
    assert_one_message(capsys.readouterr().err, "--compile")
    assert files(workplace) == before


# Any words behind any flags are accepted or refused in one message
WORDS = st.sampled_from(
    ["", "0", "-1", "1e400", "nan", "inf", "last", "True", "../x", "ü", "--", "-", "1 2", "[]"]
    + ["\x00", "9" * 30, "9" * 5000, "1e-400", "0x10", "１", "None", "{}", "tanh,relu"]
)
FLAGS = {
    script: [
        f"--{name.replace('_', '-')}"
        for name in importlib.import_module(script).Args.__annotations__
    ]
    + ["--nix"]
    for script in TRAINING
}


@pytest.mark.parametrize("script", TRAINING)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_fuzzed_command_lines_parse_or_get_one_message(script, data):
    flag = st.tuples(st.sampled_from(FLAGS[script]), WORDS | st.text(max_size=8))
    flags = data.draw(st.lists(flag, max_size=4))
    module, argv = importlib.import_module(script), sys.argv
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

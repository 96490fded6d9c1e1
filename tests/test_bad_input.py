"""Wrong command lines and damaged files: one clear line on stderr, exit code 2, nothing created, nothing lost."""

import contextlib
import importlib
import io
import json
import os
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

TRAINING = {"ppo_mujoco": "", "ppo_atari": "", "ppo_toy": "train "}

# What is wrong with every training script: flags, and what the message must name
EVERYWHERE = [
    ("--no-such-flag 3", "--no-such-flag"),
    ("--sed 3", "--sed"),
    ("--seed", "--seed"),
    ("--seed x", "--seed"),
    ("--seed 1.5", "--seed"),
    ("--seed -1", "--seed is -1"),
    (f"--seed {2**32}", "--seed"),
    ("stray", "stray"),
    ("--total-timesteps 0", "--total-timesteps"),
    ("--total-timesteps 10", "--total-timesteps 10 is less than one batch"),
    ("--total-timesteps 1e6", "--total-timesteps"),
    ("--num-envs 0", "--num-envs"),
    ("--num-envs -3", "--num-envs"),
    ("--num-steps 0", "--num-steps"),
    ("--minibatch-size 0", "--minibatch-size"),
    ("--minibatch-size 1", "--minibatch-size"),
    ("--minibatch-size 1000000", "larger than the batch"),
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
    ("--pfo-coef -1", "--pfo-coef is -1.0: it must be 0 or greater"),
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
    ("--capacity-steps 3", "--capacity-steps"),
    ("--capacity-envs 0", "--capacity-envs"),
    ("--capacity-epochs 0", "--capacity-epochs"),
    ("--capacity-data mine", "--capacity-data"),
    ("--snapshot-interval 1.01", "--snapshot-interval"),
    ("--checkpoint-interval -0.1", "--checkpoint-interval"),
    ("--save-patience -1", "--save-patience"),
    ("--torch-threads -2", "--torch-threads"),
    ("--cuda maybe", "maybe"),
    ("--share-trunk yes", "yes"),
    ("--run-name a/b", "--run-name"),
    ("--run-name ..", "--run-name"),
    (f"--run-name {'x' * 201}", "longer than 200 bytes"),
    (f"--width {2**31}", "less than 2**31"),
    ("--runs-dir file", "cannot be written"),
    ("--resume", "--run-name"),
    ("--track", "pip install wandb"),
    ("--env-id", "--env-id"),
    ("--env-id NoSuchTask-v1", "NoSuchTask"),
    ("--run-name taken", "taken exists"),
]
ONE_SCRIPT = [
    ("ppo_mujoco", "--env-id Hoper-v4", "Did you mean: `Hopper`"),
    ("ppo_mujoco", "--env-id Hopper-v9", "v9"),
    ("ppo_mujoco", "--env-id CartPole-v1", "Discrete(2): it must be a flat bounded Box (ppo_toy.py"),
    ("ppo_mujoco", "--env-id ALE/Pong-v5", "--env-id ALE/Pong-v5"),
    ("ppo_mujoco", "--env-id no_such_module:Task-v0", "no_such_module"),
    ("ppo_mujoco", "--env-id Blackjack-v1", "must be a flat Box"),
    ("ppo_mujoco", "--policy beta", "--policy"),
    ("ppo_mujoco", "--policy-std none", "--policy-std"),
    ("ppo_mujoco", "--action-logprob exact", "--action-logprob"),
    ("ppo_mujoco", "--obs-norm-steps 0", "--obs-norm-steps"),
    ("ppo_mujoco", "--frameskip 3", "--frameskip"),
    ("ppo_atari", "--env-id ALE/Phenix-v5", "use ALE/Phoenix-v5"),
    ("ppo_atari", "--env-id Phoenix", "use ALE/Phoenix-v5"),
    ("ppo_atari", "--env-id PhoenixNoFrameskip-v4", "use ALE/Phoenix-v5, and --frameskip"),
    ("ppo_atari", "--env-id BreakoutDeterministic-v4", "use ALE/Breakout-v5"),
    ("ppo_atari", "--env-id ALE/Pong-ram-v5", "use ALE/Pong-v5"),
    ("ppo_atari", "--env-id Hopper-v4", "is not a game"),
    ("ppo_atari", "--frameskip 0", "--frameskip is 0"),
    ("ppo_atari", "--frameskip -4", "--frameskip"),
    ("ppo_atari", "--sticky 1.5", "--sticky"),
    ("ppo_atari", "--noop-max -1", "--noop-max"),
    ("ppo_atari", "--noop-max 99999999999", "--noop-max"),
    ("ppo_atari", "--max-episode-frames 0", "--max-episode-frames"),
    ("ppo_atari", "--env-threads -1", "--env-threads"),
    ("ppo_atari", "--policy gaussian", "--policy"),
    ("ppo_toy", "train --env-id Pendulum-v1", "it must be Discrete (ppo_mujoco.py"),
    ("ppo_toy", "train --env-id FrozenLake-v1", "must be a flat Box"),
    ("ppo_toy", "trian", "trian"),
    ("ppo_toy", "--alpha", "--alpha"),
    ("ppo_toy", "--alpha x", "--alpha"),
    ("ppo_toy", "--alpha nan", "--alpha"),
    ("ppo_toy", "--theta 1", "--theta"),
    ("ppo_toy", "--phi inf", "--phi"),
    ("ppo_toy", "--clip-coef 0", "--clip-coef"),
    ("ppo_toy", "--learning-rate 0", "--learning-rate"),
    ("ppo_toy", "--epochs 0", "--epochs"),
    ("ppo_toy", "--states -1", "--states"),
    ("ppo_toy", "--states 8", "--states 8 is less than --dim 16"),
    ("ppo_toy", "--features-rank 2", "--states"),
    ("ppo_toy", "--learn-features", "--states"),
    ("ppo_toy", "--states 16 --features-rank 17", "--features-rank"),
    ("ppo_toy", "--states 16 --features-rank 0", "--features-rank"),
    ("ppo_toy", "--states 16 --num-seeds 1", "--num-seeds"),
    ("ppo_toy", "--states 16 --actions 1", "--actions"),
    ("ppo_toy", "--run-name taken", "taken exists"),
    ("ppo_toy", "--seed -1", "--seed"),
    ("capacity", "", "runs"),
    ("capacity", "runs/taken --num-targets 0", "--num-targets"),
    ("capacity", "runs/taken --epochs -1", "--epochs"),
    ("capacity", "runs/taken --learning-rate nan", "--learning-rate"),
    ("capacity", "runs/taken --data mine", "--data"),
    ("capacity", "runs/taken --optimizer sgd", "--optimizer"),
    ("capacity", "runs/taken --jobs 0", "--jobs"),
    ("capacity", "runs/taken --cuda", "no CUDA device"),
    ("capacity", "runs/nothing", "runs/nothing is not the folder of a run"),
    ("capacity", "file", "file is not the folder of a run"),
    ("capacity", "runs/taken", "has no checkpoints"),
]
CASES = [(script, command + flags, says) for script, command in TRAINING.items() for flags, says in EVERYWHERE] + ONE_SCRIPT


def files(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refuse(script, flags, capsys):
    """Run the command line: it must exit with 2 and say one line, which is returned."""
    sys.argv = [f"{script}.py", *flags.split()]
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(script).main()
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.strip() and "fits" not in line]
    assert stop.value.code == 2 and out == "", (out, err)
    assert len(lines) == 1 and lines[0].startswith(f"{script}.py: error: "), err
    return lines[0]


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty folder to work in, with a run named "taken" and a file named "file"."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    (tmp_path / "runs" / "taken").mkdir(parents=True)
    (tmp_path / "file").write_text("text")
    return tmp_path


@pytest.mark.parametrize("script, flags, says", CASES, ids=[f"{script} {flags}" for script, flags, _ in CASES])
def test_a_wrong_command_line_gets_one_line_and_creates_nothing(workplace, capsys, script, flags, says):
    if says == "pip install wandb" and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    if says == "no CUDA device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    before = files(workplace)
    assert says in refuse(script, flags, capsys)
    assert files(workplace) == before


def test_the_table_is_large():
    assert len(CASES) >= 60


WORDS = st.sampled_from(
    ["", "0", "-1", "1e400", "nan", "inf", "last", "True", "../x", "ü", "--", "-", "1 2", "[]", "\x00", "9" * 30]
)
FLAGS = {
    script: ["--" + name.replace("_", "-") for name in importlib.import_module(script).Args.__dataclass_fields__] + ["--nix"]
    for script in TRAINING
}


@pytest.mark.parametrize("script", TRAINING)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_fuzzed_command_lines_parse_or_get_one_line(script, data):
    flags = data.draw(st.lists(st.tuples(st.sampled_from(FLAGS[script]), WORDS | st.text(max_size=8)), max_size=4))
    module, argv = importlib.import_module(script), sys.argv
    sys.argv = [f"{script}.py", *(word for pair in flags for word in pair)]
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            module.parse_args(module.Args).check()
        assert not stderr.getvalue()
    except SystemExit as stop:
        assert stop.code == 2 and len(stderr.getvalue().rstrip("\n").splitlines()) == 1, stderr.getvalue()
    finally:
        sys.argv = argv


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A small run of the toy."""
    folder = tmp_path_factory.mktemp("finished")
    flags = "train --total-timesteps 256 --num-envs 2 --num-steps 32 --minibatch-size 16 --capacity-steps 32 --run-name run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ppo_toy.py", *flags.split(), "--runs-dir", str(folder), "--snapshot-interval", "0.5"])
        importlib.import_module("ppo_toy").main()
    return folder / "run"


def damaged(state):
    """Checkpoints that no training script wrote, by name."""
    yield "a list", [1, 2, 3]
    yield "a tensor", torch.zeros(3)
    yield "no script", {key: value for key, value in state.items() if key != "script"}
    yield "another script", state | {"script": "os"}
    yield "no args", {key: value for key, value in state.items() if key != "args"}
    yield "unknown args", state | {"args": state["args"] | {"evil": 1}}
    yield "args of no dict", state | {"args": 3}
    yield "another width", state | {"args": state["args"] | {"width": 7}}
    yield "no weights", {key: value for key, value in state.items() if key != "agent"}
    yield "other weights", state | {"agent": {"x": torch.zeros(2)}}
    yield "another task", state | {"args": state["args"] | {"env_id": "Acrobot-v1"}}
    yield "no task", state | {"args": state["args"] | {"env_id": "NoSuchTask-v0"}}
    yield "a module", state | {"args": state["args"] | {"env_id": "antigravity:Task-v0"}}
    yield "nothing to fit", state | {"args": state["args"] | {"capacity_steps": 1}}
    for name, value in (("width", "abc"), ("width", -3), ("capacity_steps", "x"), ("minibatch_size", 0), ("seed", "x")):
        yield f"{name} {value}", state | {"args": state["args"] | {name: value}}
    yield "no epochs", state | {"args": state["args"] | {"capacity_epochs": 0}}
    yield "weights of no dict", state | {"agent": [1]}


@pytest.mark.parametrize("number", range(21))
def test_capacity_passes_over_damaged_checkpoints(finished_run, workplace, capsys, number):
    import shutil

    shutil.copytree(finished_run, workplace / "runs" / "bad")
    shutil.copytree(finished_run, workplace / "runs" / "good")
    path = workplace / "runs" / "bad" / "checkpoints" / "128.pt"
    name, content = list(damaged(torch.load(path, weights_only=True)))[number]
    torch.save(content, path)
    sys.argv = ["capacity.py", "runs/bad", "runs/good"]
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("capacity").main()
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and "Traceback" not in err, name
    assert len(said) == (2 if name == "no task" else 1) and "runs/bad/checkpoints/128.pt" in said[-1], err
    assert "antigravity" not in sys.modules
    for run, steps in (("bad", {"0", "256"}), ("good", {"0", "128", "256"})):
        assert json.loads((workplace / "runs" / run / "capacity-default" / "results.json").read_text())["0"].keys() == steps


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 half a zip"])
def test_capacity_passes_over_files_that_are_no_checkpoints(finished_run, workplace, capsys, content):
    import shutil

    shutil.copytree(finished_run, workplace / "runs" / "bad")
    (workplace / "runs" / "bad" / "checkpoints" / "128.pt").write_bytes(content)
    sys.argv = ["capacity.py", "runs/bad", "runs/nothing", "runs/taken"]
    with pytest.raises(SystemExit) as stop:
        importlib.import_module("capacity").main()
    said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert stop.value.code == 2 and len(said) == 3
    assert "cannot be read" in said[0] and "nothing is not" in said[1] and "taken has no" in said[2]


def test_a_malicious_checkpoint_is_not_executed(finished_run, workplace, capsys):
    class Malicious:
        def __reduce__(self):
            return os.system, (f"touch {workplace / 'executed'}",)

    (workplace / "runs" / "bad" / "checkpoints").mkdir(parents=True)
    torch.save({"script": "ppo_toy", "agent": Malicious()}, workplace / "runs" / "bad" / "checkpoints" / "0.pt")
    assert "cannot be read as a checkpoint" in refuse("capacity", "runs/bad", capsys)
    assert not (workplace / "executed").exists()

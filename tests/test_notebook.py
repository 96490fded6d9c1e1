"""plots.ipynb: its functions on made data, and the whole notebook on histories and odd files."""

import gzip
import json
import os
import re
from dataclasses import asdict
from types import SimpleNamespace

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from nbclient import NotebookClient
from scipy import stats
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

matplotlib.use("Agg")
NOTEBOOK = nbformat.read(ROOT / "plots.ipynb", 4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
FUNCTIONS = [cell for cell in CODE if "functions" in cell.metadata.get("tags", [])]
RETURN, RANK = "charts/episodic_return", "representation/actor/pca_rank"


def run_cells(cells, **names):
    """The names that code cells define."""
    names = {"display": lambda *shown: None} | names
    for cell in cells:
        exec(cell.source, names)
    return SimpleNamespace(**names)


@pytest.fixture(scope="module")
def notebook():
    """The functions that the notebook defines in its cells tagged "functions"."""
    return run_cells(FUNCTIONS)


@pytest.fixture
def execute(tmp_path, monkeypatch, capsys):
    """execute(): all cells on the runs in tmp_path/runs; their names and what they printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", ""))
    (tmp_path / "runs").mkdir()

    def execute():
        names = run_cells(CODE)
        plt.close("all")
        return names, capsys.readouterr().out

    return execute


def series(values, every=10):
    return pd.Series(np.array(values, float), index=np.arange(1, len(values) + 1) * every)


def kept(name="histories/hopper-e10-pfo0-s25"):
    """Arguments and table of a kept history."""
    with gzip.open(ROOT / ".results" / f"{name}.csv.gz", "rt") as file:
        return json.loads(file.readline()[2:]), pd.read_csv(file, index_col="step")


ARGS, TABLE = kept()


def write_events(path, table):
    """An event file with a record per row of the table."""
    with open(path, "wb") as file:
        for step, row in table.iterrows():
            values = [Summary.Value(tag=x, simple_value=y) for x, y in row.dropna().items()]
            event = Event(step=step, summary=Summary(value=values))
            RecordWriter(file).write(event.SerializeToString())


def made_run(folder, table=TABLE, lacks=(), **flags):
    """The folder of a run as a training script leaves it, with a kept history's curves."""
    folder.mkdir(parents=True)
    args = {flag: value for flag, value in (ARGS | flags).items() if flag not in lacks}
    (folder / "args.json").write_text(json.dumps(args))
    write_events(folder / "events.out.tfevents.1", table)


def test_band_is_mean_and_range_at_the_same_step(notebook):
    smoothed = notebook.smooth(series([np.nan, 1, np.nan, 3]), alpha=0.5)
    assert np.isnan(smoothed.iloc[0]) and smoothed.iloc[1:].tolist() == [1, 1, 2]
    a = pd.DataFrame({"x": series([1, 2, 3]), "capacity/actor": series([1, np.nan, 3])})
    b = pd.DataFrame({"x": series([3, 4]), "capacity/actor": series([5, 6])})  # ended early
    lines = notebook.band([a, b], "x", alpha=1.0)
    assert lines["mean"].tolist() == [2, 3, 3]
    assert lines["min"].tolist() == [1, 2, 3] and lines["max"].tolist() == [3, 4, 3]
    halves = notebook.band([a, b], "x", alpha=0.5)
    assert halves["mean"].tolist() == [2, 2.5, 2.75]
    unsmoothed = notebook.band([a, b], "capacity/actor", alpha=0.5)
    assert unsmoothed["mean"].tolist() == [3, 3.5, 3]  # a's gap is filled with what it was
    assert notebook.band([a, b], "missing").empty
    steady, seldom = series([100] * 6), series([0, np.nan, 0, np.nan, np.nan, np.nan])
    returns = [pd.DataFrame({RETURN: x, "other": x}) for x in (steady, seldom)]
    assert notebook.band(returns, RETURN, 1.0)["mean"].tolist() == [50] * 6
    other = notebook.band(returns, "other", 1.0)["mean"]
    assert other.tolist() == [50, 50, 50, 100, 100, 100]


def test_the_last_window_is_a_fraction_of_the_planned_run(notebook):
    values = series(range(1, 101))  # steps 10 ... 1000
    assert notebook.last_window(values, 1000) == np.mean([96, 97, 98, 99, 100])
    assert notebook.last_window(values[:50], 1000) == np.mean([46, 47, 48, 49, 50])  # ended early
    values.iloc[-3:] = np.nan
    assert notebook.last_window(values, 1000) == np.mean([96, 97])
    assert np.isnan(notebook.last_window(series([]), 1000))

    values = series(range(1000), every=1)  # the excess ratio: the last window with ten values
    assert notebook.excess_ratio(values, 1000) == np.mean(range(950, 1000))
    collapsed = values.copy()
    collapsed.iloc[600:] = np.nan  # nothing leaves the limits any more
    collapsed.iloc[900:905] = 1e12  # five late values are not ten
    assert notebook.excess_ratio(collapsed, 1000) == np.mean(range(550, 600))
    gaps = values.where(values % 5 == 0)  # exactly ten in a window of 50
    assert notebook.excess_ratio(gaps, 1000) == gaps.dropna().iloc[-10:].mean()
    assert np.isnan(notebook.excess_ratio(values.where(values % 6 == 0), 1000))  # never ten
    assert np.isnan(notebook.excess_ratio(series([], every=1), 1000))


def test_the_lowest_windows_do_not_overlap_and_pass_over_gaps(notebook):
    below = pd.Series([0.9] * 1000, index=np.arange(1, 1001))
    below.loc[41:50] = 0.5  # the whole fifth window of 10
    below.loc[101:105] = 0.1
    below.loc[106:110] = np.nan  # half of the eleventh
    below.loc[501:] = np.nan  # collapsed
    table = pd.DataFrame({"below": below, "rank": np.arange(1, 1001)})
    windows = notebook.lowest_windows(table, "below", 1000, number=3)
    assert windows["below"].tolist() == pytest.approx([0.1, 0.5, 0.9])
    assert windows["rank"].tolist()[:2] == [105.5, 45.5]
    assert len(notebook.lowest_windows(table, "below", 1000, number=100)) == 50
    assert notebook.lowest_windows(table.assign(below=np.nan), "below", 1000).empty
    assert len(notebook.lowest_windows(table.iloc[:25], "below", 1000)) == 3  # ended early


def test_the_share_of_the_gain_that_is_left_counts_from_the_first_five_log_points(notebook):
    start = [0, 40, 0, 40, 20]
    up, down = [100.0] * 500, [10.0] * 500
    assert notebook.kept_gain(series([*start, *up]), 5050) == pytest.approx(1)
    left = notebook.kept_gain(series([*start, *up, *down]), 10_050)
    assert left == pytest.approx((10 - 20) / (100 - 20))
    gaps = series([*start, *up, *down])
    gaps.iloc[5::3] = np.nan
    assert notebook.kept_gain(gaps.dropna(), 10_050) == pytest.approx(left, rel=0.05)
    assert np.isnan(notebook.kept_gain(series([9, 8, 7, 6, 5, 4, 3]), 70))
    assert np.isnan(notebook.kept_gain(series([]), 100))


def test_rank_agreement_is_that_of_scipy(notebook):
    rng = np.random.default_rng(0)
    tags = {name: f"representation/actor/{name}" for name in notebook.RANKS}
    ranks = pd.DataFrame({tag: rng.integers(1, 64, 50).astype(float) for tag in tags.values()})
    ranks.loc[3, tags["srank"]] = np.nan
    agreement = notebook.rank_agreement(ranks, "actor", 64)
    x, y = ranks.dropna()[[tags["pca_rank"], tags["srank"]]].to_numpy().T
    expected = {"kendall": stats.kendalltau(x, y).statistic}
    expected |= {"L2 distance": np.sqrt(((x - y) ** 2).mean()) / 64}
    found = {measure: agreement[measure].loc["pca_rank", "srank"] for measure in expected}
    assert found == pytest.approx(expected)
    collapsed = notebook.rank_agreement(ranks.assign(**{tags["pca_rank"]: 1.0}), "actor", 64)
    assert np.isnan(collapsed["kendall"].loc["pca_rank", "srank"])


def test_the_interquartile_mean_has_an_interval_or_says_that_runs_are_too_few(notebook):
    said = notebook.interquartile_mean([0, 1, 2, 3, 1000, np.nan, np.inf, 5, 6, 7])
    mean, low, high = (float(number) for number in re.findall(r"[\d.e+-]+", said))
    assert mean == np.mean([2, 3, 5, 6]) and low < mean < high
    assert notebook.interquartile_mean([1.0, 2.0, np.nan]) == "too few runs (2)"
    assert "nan" not in notebook.interquartile_mean([4.0, 4.0, 4.0])


def test_runs_and_kept_histories_read_back(notebook, tmp_path):
    made_run(tmp_path / "runs" / "run")
    write_events(tmp_path / "runs" / "run" / "events.out.tfevents.2", TABLE.iloc[-3:] * 2)
    args, table = notebook.read_runs(tmp_path / "runs")["run"]
    expected = pd.concat([TABLE.iloc[:-3], TABLE.iloc[-3:] * 2])  # a later file has the last word
    pd.testing.assert_frame_equal(table[TABLE.columns], expected, rtol=1e-6, check_names=False)
    notebook.keep_history("kept", args, table, tmp_path / "histories")
    kept_args, kept_table = notebook.read_runs(tmp_path / "histories")["kept"]
    assert kept_args == args == ARGS and kept_table.columns.tolist() == table.columns.tolist()
    np.testing.assert_allclose(kept_table, table, rtol=6e-4)
    assert notebook.read_runs(tmp_path / "nothing") == {}


def log(points=100, args=None, **curves):
    """A made log of a calm run with other curves: (table, args). None leaves a curve out."""
    tags = {name: f"trust_region/{name}" for name in ("ratio_max", "kl", "ratio_max_before_update")}
    tags |= {"returns": RETURN, "rank": RANK, "capacity": "capacity/actor"}
    tags |= {"entropy": "policy/entropy", "variance": "policy/variance"}
    tags |= {"dead": "representation/actor/dead_neurons", "saturated": "policy/saturated_actions"}
    calm = {"returns": [0.0] * 5 + [100.0] * (points - 5), "rank": [20.0] * points}
    calm |= {"ratio_max": [2.0] * points, "entropy": [1.0] * points, "variance": [0.1] * points}
    found = {tags[x]: series(y) for x, y in (calm | curves).items() if y is not None}
    return pd.DataFrame(found), args or {}


def switch(before, at, after, points=100):
    return [before] * at + [after] * (points - at)


FALL = [0.0] * 5 + [100.0] * 45 + [10.0] * 50
FLAT = [0.0, 2.0] * 50
DROP = switch(0.2, 50, 0.0)
ROWS = {  # a made log: its verdict, and the step since which it holds
    "log-probability mismatch": (log(ratio_max_before_update=switch(1.0, 50, 1.2)), 530),
    "never learned": (log(returns=FLAT, rank=[1.0] * 100), 60),
    "clamped actions": (log(ratio_max=[1e6] * 20 + switch(2.0, 30, 1e6, 80)), 530),
    "deterministic policy": (log(entropy=DROP, variance=DROP, returns=FALL), 530),
    "representation collapse": (log(rank=switch(20.0, 30, 9.0), returns=FALL), 330),
    "representation lost, return kept": (log(rank=switch(20.0, 30, 9.0)), 330),
    "capacity lost": (log(capacity=switch(1.0, 50, 101.0)), 510),
    "large steps": (log(kl=switch(0.01, 50, 0.2)), 530),
    "healthy": (log(), None),
    "not known": (log(returns=FALL), 560),
}


@pytest.mark.parametrize("row", ROWS)
def test_each_row_of_the_table_is_diagnosed(notebook, row):
    (table, args), since = ROWS[row]
    found = notebook.diagnose(table, args)
    assert (found["verdict"], found["since"]) == (row, since)
    assert 1 <= len(found["numbers"]) <= 4 and np.isfinite(list(found["numbers"].values())).all()
    said = notebook.in_words(found)
    assert said.startswith(row) and ("Try: " in said) == (row in notebook.DIAGNOSES)
    # Nothing that is logged later changes what a rule says of a step
    rising = log(rank=switch(20.0, 60, 60.0), entropy=switch(0.5, 60, 100.0))[0]
    for logged in (table, rising.assign(**{RETURN: TABLE[RETURN].to_numpy()[:100]})):
        conditions = notebook.conditions(logged, args)
        for row, part in notebook.conditions(logged.iloc[:60], args).items():
            assert part.tolist() == conditions[row].iloc[:60].tolist(), row


@pytest.mark.parametrize(
    "made, verdict",
    [
        (log(ratio_max=switch(2.0, 50, 9e5)), "healthy"),
        (log(ratio_max=[2.0] * 96 + [1e12] * 2 + [2.0] * 2), "healthy"),  # two points of five
        (log(ratio_max=switch(1e12, 50, 2.0)), "healthy"),  # it was mended
        (log(ratio_max=[1e12] * 100, args={"action_logprob": "sampled"}), "healthy"),
        (log(ratio_max=[1e12] * 100, rank=[20.0] * 50 + [1.0] * 50), "clamped actions"),  # order
        (log(ratio_max_before_update=[1.005] * 100), "healthy"),  # rounding
        (log(entropy=[2.0] * 50 + [0.001] * 50, variance=[0.3] * 100), "healthy"),  # a Normal's
        (log(entropy=[2.0] * 50 + [-0.1] * 25 + [0.001] * 25), "healthy"),
        (log(entropy=DROP), "healthy"),  # the policy still differs between states
        (log(rank=[20.0] * 50 + [10.0] * 50), "healthy"),  # half, and not below
        (log(returns=FLAT), "healthy"),
        (log(returns=[0.0] * 5 + [100.0] * 90 + [0.0] * 5), "healthy"),  # ten log points decide
        (log(points=5), "not known"),
        (log(rank=None), "not known"),
        (log(ratio_max=None, kl=[0.2] * 100), "large steps"),
        ((pd.DataFrame({"x": series([1, 2])}), {}), "not known"),
    ],
)
def test_a_diagnosis_near_its_limits(notebook, made, verdict):
    assert notebook.diagnose(*made)["verdict"] == verdict
    said = notebook.in_words(notebook.diagnose(*log(rank=None, ratio_max=None)))
    assert said == "not known (return 100); too few log points of ratio_max, pca_rank"


def test_kept_histories_are_diagnosed(notebook):
    slides = "representation collapse"
    family = {x: kept(f"climber-forks/{x}") for x in ("agent-s7", "rate1e-2-s7-pfo0")}
    for name, verdict, since in (
        ("histories/hopper-tanh-e20-pfo0-s25", "clamped actions", 790_528),
        ("recipes-november/acrobot-regulariser-s25", "representation lost, return kept", 124_928),
        ("climber-forks/rate1e-2-s7-pfo0", slides, 660_480),  # with the history of agent-s7
    ):
        runs = family | {name.split("/")[1]: kept(name)}
        table = notebook.whole_history(name.split("/")[1], runs)
        found = notebook.diagnose(table, kept(name)[0])
        assert (found["verdict"], found["since"]) == (verdict, since), name
    row = notebook.row_of("run", {"run": kept("histories/hopper-tanh-e20-pfo0-s25")})
    assert (row["ratios break"], row["return falls"]) == (825_344, 2_078_720)
    assert row["actions saturate"] == "not logged" and 40 < row["pca_rank then"] < 46
    assert round(row["gain left"], 2) == -0.06


def test_the_readme_names_the_rows_of_the_diagnosis_in_their_order(notebook):
    readme = (ROOT / "README.md").read_text().split("Which collapse do you have?")[1]
    rows = re.findall(r"^\| ?([^|-]{2}[^|]*?) ?\|", readme.split("\n## ")[0], re.M)[1:]
    assert rows == list(notebook.DIAGNOSES)


def test_a_log_of_another_program_is_diagnosed_and_not_drawn(execute, tmp_path):
    made_run(tmp_path / "runs" / "own")
    table = log(ratio_max=switch(2.0, 50, 1e12))[0].rename(columns={RETURN: "rollout/ep_rew_mean"})
    (tmp_path / "runs" / "PPO_1").mkdir()
    write_events(tmp_path / "runs" / "PPO_1" / "events.out.tfevents.1", table)
    names, said = execute()
    assert "PPO_1: clamped actions since step 530 (ratio_max 1e+12, pca_rank 20" in said
    assert "own: healthy (return" in said and list(names.own) == list(names.runs) == ["own"]


def test_what_happened_is_judged_by_the_rules_of_the_pages(notebook):
    flags = ARGS | {"width": 32, "total_timesteps": 1000}
    for happened, (table, _) in {
        "ratios broken": log(ratio_max=switch(2.0, 50, 1e6), returns=FALL),
        "never learned": log(returns=[1.0] * 100),
        "collapsed": log(returns=[0.0] * 5 + [100.0] * 45 + [5.0] * 50),
        "partly lost": log(returns=[0.0] * 5 + [100.0] * 45 + [30.0] * 50),
        "rank fell": log(rank=switch(20.0, 30, 9.0)),
        "nothing broke": log(),
    }.items():
        assert notebook.what_happened("run", {"run": (flags, table)}) == happened
        assert happened in notebook.FITS
    atari, name = flags | {"env_id": "ALE/CrazyClimber-v5"}, "rate1e-2-s7-pfo0"
    assert notebook.what_happened(name, {name: (atari, table)}) == "collapsed"
    assert set(notebook.FITS) >= set(notebook.ATARI)
    named = " ".join(notebook.ATARI.values()).split()
    assert all(list(ROOT.glob(f".results/*/{name}.csv.gz")) for name in named)


def test_how_early_a_sign_told(notebook):
    flags = ARGS | {"total_timesteps": 1000}
    late, early = (log(returns=FALL, kl=switch(0.0, at, 0.2))[0] for at in (70, 20))
    calm, alarm = log(kl=[0.0] * 100)[0], log(kl=[0.2] * 100)[0]
    runs = {x: (flags, t) for x, t in zip("abcd", (late, early, calm, alarm))}
    row = notebook.how_early(notebook.judge({"made": runs})).loc["Hopper-v4: large steps"]
    assert row.tolist() == [2, 1, "330", "330", 2, 1]


def test_every_arm_has_a_name_and_a_colour(notebook):
    flags = {"pfo_coef": 10.0, "share_trunk": True, "reset_adam": True, "adam_beta2": 0.9}
    flags |= {"adam_beta1": 0.5, "reward_keep_prob": 0.1, "action_logprob": "sampled"}
    arms = [{"policy": "gaussian"}, *({flag: value} for flag, value in flags.items())]
    pfo = {"pfo_coef": 1.0}
    arms += [pfo, pfo | {"pfo_layers": "all"}, pfo | {"pfo_reduction": "sum"}]
    names = {notebook.arm(ARGS | flags) for flags in arms}
    assert len(names) == 11 and "no intervention" not in names
    assert notebook.arm(ARGS | {"pfo_coef": 1.0}) == "PFO 1"
    off = {"env_id": "ALE/Phoenix-v5", "pfo_layers": "all", "adam_beta1": 0.9}
    assert notebook.arm(ARGS) == notebook.arm(off) == notebook.arm({}) == "no intervention"
    first = {name: notebook.colour(name) for name in sorted(names)}
    assert first == {name: notebook.colour(name) for name in sorted(names, reverse=True)}
    assert notebook.arm(ARGS | {"change": "dual clip"}) == "dual clip"  # no flag of a script
    fork = ARGS | {"fork_from": "runs/plain/checkpoints/7.pt", "change": "dual clip"}
    assert notebook.changes(fork, ARGS) == "fork: dual clip"
    rows = pd.DataFrame({"arm": ["a", "a", "b"], "settings": ["x=0 y=1", "x=0 y=1", "x=2 y=1"]})
    assert notebook.full_arms(rows).tolist() == ["a", "a", "b x=2"]


def test_small_marks_keep_their_colours_in_a_small_picture(notebook, tmp_path, monkeypatch):
    colours = [*list(notebook.COLOURS.values())[:12], *(c for _, c in notebook.MARKS.values())]
    figure, axis = plt.subplots(figsize=(10, 6))
    for i, c in enumerate(colours):
        axis.scatter([i], [i], s=40, marker="s", color=c)
        axis.fill_between(range(20), i, i + 9, color=c, alpha=0.2)
    monkeypatch.setenv("PICTURES", str(tmp_path))
    notebook.keep_picture(figure, "marks")
    pixels = (plt.imread(tmp_path / "marks.png")[:, :, :3] * 255).reshape(-1, 3)
    assert len(np.unique(pixels, axis=0)) <= 64
    for c in colours:
        assert np.abs(pixels - 255 * np.array(matplotlib.colors.to_rgb(c))).max(1).min() < 16, c


def test_whatever_varies_within_a_task_is_a_setting(notebook):
    runs = {
        "old": ARGS,
        "zero": ARGS | {"weight_decay": 0.0, "fresh": False, "seed": 7, "runs_dir": "elsewhere"},
        "decay": ARGS
        | {"weight_decay": 0.1, "log_interval": 0.01, "save_patience": 1, "fork_from": ""},
        "decay_too": ARGS | {"weight_decay": 0.1, "update_epochs": 20, "pfo_coef": 1.0},
        "fresh": ARGS | {"fresh": True},
        "long": ARGS | {"total_timesteps": 10**6, "learning_rate": 1e-3},
        "elsewhere": ARGS | {"env_id": "Ant-v4", "num_envs": 4},
    }
    table = notebook.describe(runs)
    settings = table["settings"]
    assert settings["old"] == settings["zero"] == "fresh=0 weight_decay=0"  # one has no such flag
    assert settings["decay"] == settings["decay_too"] == "fresh=0 weight_decay=0.1"
    assert settings["fresh"] == "fresh=True weight_decay=0"
    assert settings["long"] == settings["elsewhere"] == ""  # alone in their tasks
    assert table["arm"].tolist() == ["no intervention"] * 3 + ["PFO 1"] + ["no intervention"] * 3


def test_a_new_flag_is_an_arm_of_its_own(execute, tmp_path):
    for seed in (25, 7):
        made_run(tmp_path / "runs" / f"plain-{seed}", seed=seed)
    doubled = TABLE.assign(**{RETURN: TABLE[RETURN] * 2})
    made_run(tmp_path / "runs" / "decayed", doubled, weight_decay=0.1)
    names, said = execute()
    assert "'decayed' has other settings, weight_decay=0.1" in said
    assert sorted(map(len, names.by_arm().values())) == [1, 2]
    assert "no intervention with weight_decay=0.1" in names.by_arm()
    assert list(names.baseline) == ["plain-25", "plain-7"] and len(names.finals) == 2


def test_the_arm_of_a_fork_is_what_it_changed(notebook):
    fork = {"fork_from": "runs/plain/checkpoints/1290240.pt", "fork_step": 1_290_240}
    runs = {
        "plain": ARGS,
        "pfo": ARGS | {"pfo_coef": 1.0, "total_timesteps": 10**6},
        "cure": ARGS | fork | {"action_logprob": "sampled", "total_timesteps": 450_000},
        "control": ARGS | fork | {"seed": 1},
        "same": ARGS | {"fork_from": "/somewhere/runs/plain/latest.pt", "fork_step": 5},
        "of_pfo": ARGS | {"fork_from": "x/pfo/checkpoints/4.pt", "learning_rate": 1e-3},
        "orphan": ARGS | {"fork_from": "runs/gone/checkpoints/7.pt", "share_trunk": True},
        "bare": ARGS | {"fork_from": "7.pt", "reset_adam": True},
    }
    table = notebook.describe(runs)
    assert table["arm"].tolist()[2:] == [
        "fork: action_logprob=sampled",
        "fork: other seed",
        "fork: nothing changed",
        "fork of PFO 1: learning_rate=0.001, pfo_coef=0",
        "fork: share_trunk=True",
        "fork: reset_adam=True",
    ]
    assert table.loc["cure", "total_timesteps"] == 300_000  # its parent's task
    assert table.loc["of_pfo", "total_timesteps"] == 10**6
    assert set(table["settings"]) == {""}
    assert len(notebook.describe({"alone": runs["orphan"]})) == 1


def test_forks_are_drawn_by_themselves(execute, tmp_path):
    made_run(tmp_path / "runs" / "plain")
    fork = {"fork_from": "runs/plain/checkpoints/100352.pt", "fork_step": 100_352}
    made_run(
        tmp_path / "runs" / "cure", TABLE[TABLE.index > 100_352], action_logprob="sampled", **fork
    )
    names, said = execute()
    assert "'cure' is drawn under Forks (fork: action_logprob=sampled)" in said
    assert list(names.by_arm()) == ["no intervention"] and names.branches == {"plain": ["cure"]}
    assert names.events.loc["cure", "arm"] == "fork: action_logprob=sampled"
    assert names.verdicts.index.tolist() == ["cure"] and "above in 0 of 1, p = 1 (one" in said
    whole = names.whole_history("cure", names.runs)
    assert whole.index.tolist() == TABLE.index.tolist()  # its parent's curves come first


def test_the_verdict_on_a_fork(notebook):
    def run(curve, fork_step=0, **flags):
        steps = np.arange(len(curve)) * 25_000 + fork_step + 25_000
        path = {"fork_from": "runs/plain/checkpoints/1.pt", "fork_step": fork_step}
        return ARGS | (path if fork_step else {}) | flags, pd.DataFrame({RETURN: curve}, steps)

    parent = [0.0] * 5 + [100.0] * 95 + [20.0] * 60 + [90.0] * 40  # falls after 2.5 million steps
    runs = {
        "plain": run(parent),
        "early": run([500.0] * 37 + [50.0] * 3, 1_000_000),  # its end alone: 50 against 100
        "long": run([50.0] * 100, 1_000_000),  # ends where its parent is at 20
        "rescue": run([0.0] * 37 + [50.0] * 3, 4_000_000),  # its parent had 20 then, and 90 later
        "silent": run([50.0] * 37 + [np.nan] * 3, 1_000_000),  # no episode ended
    }
    rows = {name: notebook.verdict(name, runs) for name in list(runs)[1:]}
    keys = ("rescue", "return", "against", "above")
    assert [rows["early"][key] for key in keys] == [False, 50, 100, False]
    assert [rows["long"][key] for key in keys] == [False, 50, 20, True]
    assert [rows["rescue"][key] for key in keys] == [True, 50, 20, True]
    assert not rows["silent"]["above"]
    beyond = {"plain": run([50.0] * 40), "beyond": run([80.0] * 40, 1_000_000)}
    row = notebook.verdict("beyond", beyond)  # its parent ended where it began
    assert [row[key] for key in keys] == [False, 80, 50, True]
    assert (rows["early"]["parent"], rows["early"]["from step"]) == ("plain", 1_000_000)


def test_odd_files_are_named_and_the_rest_is_drawn(execute, tmp_path):
    runs, noise = tmp_path / "runs", np.random.default_rng(0).bytes(5000)
    for name in ("good", "args-is-a-folder", "log-is-noise", "cut-log", "noise-in-log"):
        made_run(runs / name)
    log_name, args = "events.out.tfevents.1", json.dumps(ARGS)
    csv = f"# {args}\n{TABLE.iloc[:9].to_csv()}"
    for name, content in {
        "no-json": b"{",
        "other-program": b'{"update_epochs": 10}',
        "half-a-character": json.dumps(ARGS | {"env_id": "\ud800"}).encode(),
        "endless": json.dumps(ARGS | {"total_timesteps": 10**400}).encode(),
        "no-log": args.encode(),
    }.items():
        (runs / name).mkdir()
        (runs / name / "args.json").write_bytes(content)
    (runs / "args-is-a-folder" / "args.json").unlink()
    (runs / "log-is-noise" / log_name).write_bytes(noise)
    for name in ("args-is-a-folder/args.json", "pipe", os.fsdecode(b"\xff")):
        (runs / name).mkdir()
    os.mkfifo(runs / "pipe" / "args.json")
    os.mkfifo(runs / "pipe.csv.gz")
    packed = gzip.compress(csv.encode())
    for name, content in {
        "cut.csv.gz": packed[: len(packed) // 2],
        "words.csv.gz": gzip.compress(re.sub(",0.002", ",word", csv).encode()),
        "twice.csv.gz": gzip.compress(f"# {args}\n{TABLE.iloc[[1, 1, 2]].to_csv()}".encode()),
        "one-row.csv.gz": gzip.compress(f"# {args}\n{TABLE[:1].to_csv()}".encode()),
        "good.csv.gz": packed,  # there is a run of this name
        "notes.txt": b"remember the milk",
    }.items():
        (runs / name).write_bytes(content)
    whole = (runs / "good" / log_name).read_bytes()
    (runs / "cut-log" / log_name).write_bytes(whole[:-100])
    (runs / "noise-in-log" / log_name).write_bytes(whole[:150_000] + noise + whole[150_000:])

    names, said = execute()
    assert list(names.runs) == ["cut-log", "good", "noise-in-log"]
    assert [len(names.runs[name][1]) for name in names.runs] == [146, 147, 95]
    odd = [path.name for path in runs.iterdir() if path.name not in names.runs]
    assert said.count("left out") == len(odd) == 16
    for name in odd:
        assert said.count(f"left out: {name!r}: ") == said.count(repr(name)) == 1, name
    for name in ("cut-log", "noise-in-log"):  # half of them can be read
        assert said.count(f"{name!r}: {log_name} cannot be read from byte") == 1
    assert str(tmp_path) not in said


def test_the_order_of_events(notebook):
    def step(before, at, after):
        return switch(before, at, after, 200)

    up = [0.0] * 5 + [100.0] * 95
    noise = [60.0, 140.0] * 2 + [100.0] + [115.0] * 95 + [0.0] * 100  # what may be chance
    # Smoothed, a step down by d is through a fraction f of d after log(1 - f) / log(0.95) points
    for event, curve, values, expected in (
        ("ratios break", "ratio_max", step(2.0, 50, 1e6), 600),  # the tenth of 20 broken
        ("ratios break", "ratio_max", step(2.0, 50, 9e5), None),
        ("ratios break", "ratio_max", [1e12, 2.0, 2.0] * 66 + [2.0] * 2, None),  # 7 of 20
        ("ratios break", "ratio_max", [1e12, np.nan] * 100, 390),  # gaps are no log points
        ("return falls", "returns", [*up, *[0.0] * 100], 1140),
        ("return falls", "returns", [*up, *[60.0] * 100], None),
        ("return falls", "returns", [*up, *[0.0] * 30, *[90.0] * 70], 1140),  # the first time
        ("return falls", "returns", [*up, 0.0, *[np.nan] * 99], 1140),  # stuck in an episode
        ("return falls", "returns", noise, None),
        ("return falls", "returns", [1000.0 + x for x in (*up, *[0.0] * 100)], 1140),  # the gain
        ("rank falls", "rank", step(20.0, 100, 0.0), 1070),
        ("rank falls", "rank", step(20.0, 100, 14.1), None),
        ("rank falls", "rank", [40.0] * 3 + [10.0] * 197, 130),  # of its peak
        ("neurons die", "dead", step(0.0, 100, 64.0), 1140),
        ("neurons die", "dead", step(0.0, 100, 31.9), None),
        ("actions saturate", "saturated", step(0.0, 100, 0.2), 1140),
        ("actions saturate", "saturated", step(0.0, 100, 0.1), None),
    ):
        found = notebook.order_of_events(log(200, **{curve: values})[0], 64)
        assert found == dict.fromkeys(notebook.MARKS) | {event: expected}, (event, expected)
    narrow = log(200, dead=step(0.0, 100, 31.9))[0]
    assert notebook.order_of_events(narrow, 32)["neurons die"] == 1140
    assert notebook.order_of_events(pd.DataFrame(), 64) == dict.fromkeys(notebook.MARKS)


def test_many_states_contain_the_two_of_figure_5(notebook):
    from ppo_toy import ToyArgs, two_states

    phi, alpha, theta = 0.11631, 3.0, (0.51526, -0.44138)
    inputs = torch.tensor([[phi], [alpha * phi]], dtype=torch.float64)
    trunk, head = torch.eye(1, dtype=torch.float64), torch.tensor([theta], dtype=torch.float64)
    ones = torch.ones(2, dtype=torch.float64)
    sampled, order = torch.zeros(2, 1, dtype=torch.long), torch.tensor([0, 1] * 10)
    figure_5 = inputs, trunk, head, sampled, ones, order
    both = notebook.many_states([figure_5, figure_5], learning_rate=1.5).exp()
    expected = two_states(ToyArgs(), alpha, phi, theta)[0][-1]
    assert both.tolist() == [pytest.approx(expected.tolist(), rel=1e-9)] * 2
    for rank in (1, 5, 16):
        inputs, trunk, *_ = notebook.random_states(rank, seed=1)
        assert torch.linalg.matrix_rank(inputs @ trunk) == rank
        assert (inputs @ trunk).square().sum(1).mean().item() == pytest.approx(1)
    toys = [notebook.random_states(4, seed) for seed in (1, 2)]
    fixed, free, pfo = (notebook.many_states(toys, *x) for x in ((False,), (True,), (True, 100.0)))
    assert (pfo - fixed).abs().mean() < 0.5 * (free - fixed).abs().mean()  # it fixes the features


def test_the_clamp_turns_an_outward_shift_round(notebook):
    clamped, sampled = (notebook.shifted_ratio(0.05, bound=bound) for bound in (7.24773, np.inf))
    assert f"{clamped:.2f} {sampled:.2f}" == "0.02 1.25"
    old, new = torch.distributions.Normal(8.0, 0.1), torch.distributions.Normal(8.05, 0.1)
    for u, ratio in ((torch.tensor(7.24773), clamped), (torch.tensor(8.07), sampled)):
        assert (new.log_prob(u) - old.log_prob(u)).exp().item() == pytest.approx(ratio, rel=1e-3)
    inside = notebook.shifted_ratio(0.05, loc=5.0, bound=7.24773)
    assert inside == pytest.approx(notebook.shifted_ratio(0.05, loc=5.0))


@pytest.mark.parametrize("task, sign", [("Acrobot-v1", " -"), ("CartPole-v1", " ")])
def test_a_kept_checkpoint_is_played_and_drawn(task, sign, tmp_path, monkeypatch, capsys):
    import ppo_toy

    (player,) = (cell for cell in CODE if "CHECKPOINT" in cell.source)

    def run_player(checkpoint, shown):
        monkeypatch.setenv("CHECKPOINT", str(checkpoint))
        run_cells([*FUNCTIONS, player], display=shown.append, COLLAPSE="")
        return capsys.readouterr().out

    args = ppo_toy.Args(env_id=task)
    agent = ppo_toy.Agent(ppo_toy.Envs(args, 1, 0), args)
    state = {"script": "ppo_toy", "args": asdict(args) | {"gone": 1}, "global_step": 10}
    state |= {"agent": agent.state_dict(), "obs_stats": {}}
    torch.save(state, tmp_path / "10.pt")
    said = run_player(tmp_path / "10.pt", shown := [])
    assert re.fullmatch(
        rf"{task}, seed 1, step 10, no intervention, ten episodes:({sign}\d+){{10}}\n", said
    )
    assert len(shown) == 1 and (tmp_path / "10.gif").read_bytes().startswith(b"GIF")

    torch.save(state | {"script": "shutil"}, tmp_path / "20.pt")
    (tmp_path / "30.pt").write_bytes(b"noise")
    for name in ("20.pt", "30.pt", "40.pt"):  # another program's, damaged, missing
        said = run_player(tmp_path / name, shown := [])
        assert said.startswith(f"'{name}' cannot be played: ") and said.count("\n") == 1
        assert not shown and str(tmp_path) not in said
        assert ("a checkpoint of shutil" in said) == (name == "20.pt")


def test_without_runs_and_histories_every_figure_says_what_to_run(execute):
    names, said = execute()
    command = "python ppo_mujoco.py --env-id Hopper-v4 --activation tanh --total-timesteps 5000000"
    assert said.count(f"{command} --seed 25") == 7 and f"{command} --pfo-coef 1 --seed 25" in said
    assert said.count("python ppo_toy.py train --env-id Acrobot-v1") == 3 and "--fork-from" in said


def test_a_figure_whose_runs_are_missing_says_which_command_makes_them(execute, tmp_path):
    made_run(tmp_path / "runs" / "pfo", pfo_coef=1.0)  # nothing without intervention
    made_run(tmp_path / "runs" / "others", pfo_coef=1.0, num_envs=4, lacks=["tf32", "env_threads"])
    _, said = execute()
    command = "python ppo_mujoco.py --env-id Hopper-v4 --activation tanh --total-timesteps 300000"
    lines = re.findall(rf"No runs without intervention.*{command} --num-envs \d --seed 25", said)
    assert len(lines) == 5


def test_the_notebook_runs_head_to_tail_on_the_kept_histories(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CHECKPOINT", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    executed = nbformat.from_dict(json.loads(json.dumps(NOTEBOOK)))
    NotebookClient(executed, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 18
    said = [output for output in outputs if output.output_type == "stream"]
    assert {output.name for output in said} == {"stdout"}  # no warnings
    said = "".join(output.text for output in said)
    assert "hopper-clamped-s25: clamped actions since step 1,454,080" in said
    right, runs = map(int, re.search(r"verdict fits in (\d+) of (\d+) runs", said).groups())
    assert runs == len(list(ROOT.glob(".results/*/*.csv.gz"))) and right > 0.9 * runs
    assert "action_logprob=sampled: above in 5 of 5, p = 0.031" in said
    assert "sampled after the fall: above in 5 of 5, p = 0.031" in said
    assert "No checkpoints" in said and "left out" not in said


def test_the_stored_notebook_is_small_and_holds_its_outputs():
    assert (ROOT / "plots.ipynb").stat().st_size < 900_000
    folded = [cell for cell in CODE if cell.metadata.get("jupyter", {}).get("source_hidden")]
    assert len(folded) == 7 and not any(re.search(r"import ppo_", cell.source) for cell in CODE)
    shown = [cell for cell in CODE if cell not in FUNCTIONS]
    assert "diagnose" in shown[1].source and all(cell.execution_count for cell in CODE)
    outputs = [output for cell in CODE for output in cell.outputs]
    kinds = {"stream", "display_data", "execute_result"}
    assert {output.output_type for output in outputs} <= kinds
    assert not any(output.get("name") == "stderr" for output in outputs)
    said = "".join(
        str(output.get("text", output.get("data", {}).get("text/plain"))) for output in outputs
    )
    assert not re.search(r"/(root|home|tmp|work|Users)\b|Traceback|Warning|\bnan \[", said)
    texts = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown"]
    assert sum("**Look for**" in text for text in texts) == 13
    assert not any("In the kept runs" in text for text in texts)  # said where they are drawn
    kept_runs = [x for x in outputs if "In the kept runs" in str(x.get("data", ""))]
    assert len(kept_runs) == 7 and texts[-1].count("<details>") == 2  # answers

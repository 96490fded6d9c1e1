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
HISTORIES = ROOT / ".results" / "histories"


@pytest.fixture(scope="module")
def notebook():
    """The functions that the notebook defines in its cells tagged "functions"."""
    names = {"plt": plt}
    for cell in CODE:
        if "functions" in cell.metadata.get("tags", []):
            exec(cell.source, names)
    return SimpleNamespace(**names)


@pytest.fixture
def execute(tmp_path, monkeypatch, capsys):
    """execute(): all cells on the runs in tmp_path/runs; their names and what they printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", ""))
    (tmp_path / "runs").mkdir()

    def execute():
        names = {"display": lambda shown: None}
        for cell in CODE:
            exec(cell.source, names)
        plt.close("all")
        return SimpleNamespace(**names), capsys.readouterr().out

    return execute


def series(values, every=10):
    return pd.Series(np.array(values, float), index=np.arange(1, len(values) + 1) * every)


def kept(name="hopper-e10-pfo0-s25"):
    """Arguments and table of a kept history."""
    with gzip.open(HISTORIES / f"{name}.csv.gz", "rt") as file:
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


def test_smoothing_passes_over_gaps(notebook):
    smoothed = notebook.smooth(series([np.nan, 1, np.nan, 3]), alpha=0.5)
    assert np.isnan(smoothed.iloc[0]) and smoothed.iloc[1:].tolist() == [1, 1, 2]


def test_band_is_mean_and_range_at_the_same_step(notebook):
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
    returns = [pd.DataFrame({"charts/episodic_return": x, "other": x}) for x in (steady, seldom)]
    assert notebook.band(returns, "charts/episodic_return", 1.0)["mean"].tolist() == [50] * 6
    other = notebook.band(returns, "other", 1.0)["mean"]
    assert other.tolist() == [50, 50, 50, 100, 100, 100]


def test_the_last_window_is_a_fraction_of_the_planned_run(notebook):
    values = series(range(1, 101))  # steps 10 ... 1000
    assert notebook.last_window(values, 1000) == np.mean([96, 97, 98, 99, 100])
    assert notebook.last_window(values[:50], 1000) == np.mean([46, 47, 48, 49, 50])  # ended early
    values.iloc[-3:] = np.nan
    assert notebook.last_window(values, 1000) == np.mean([96, 97])
    assert np.isnan(notebook.last_window(series([]), 1000))
    assert np.isnan(notebook.last_window(values * np.nan, 1000))


def test_the_excess_ratio_is_of_the_last_window_with_ten_values(notebook):
    values = series(range(1000), every=1)
    assert notebook.excess_ratio(values, 1000) == np.mean(range(950, 1000))
    collapsed = values.copy()
    collapsed.iloc[600:] = np.nan  # nothing leaves the limits any more
    assert notebook.excess_ratio(collapsed, 1000) == np.mean(range(550, 600))
    collapsed.iloc[900:905] = 1e12  # five late values are not ten
    assert notebook.excess_ratio(collapsed, 1000) == np.mean(range(550, 600))
    gaps = values.where(values % 5 == 0)  # exactly ten in a window of 50
    assert notebook.excess_ratio(gaps, 1000) == gaps.dropna().iloc[-10:].mean()
    assert np.isnan(notebook.excess_ratio(values.where(values % 6 == 0), 1000))  # never ten
    assert np.isnan(notebook.excess_ratio(values * np.nan, 1000))
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
    before_the_collapse = notebook.lowest_windows(table, "below", 1000, number=100)
    assert len(before_the_collapse) == 50
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
    for measure, expected in (
        ("kendall", stats.kendalltau(x, y).statistic),
        ("spearman", stats.spearmanr(x, y).statistic),
        ("pearson", stats.pearsonr(x, y).statistic),
        ("L2 distance", np.sqrt(((x - y) ** 2).mean()) / 64),
    ):
        assert agreement[measure].loc["pca_rank", "srank"] == pytest.approx(expected), measure
    collapsed = notebook.rank_agreement(ranks.assign(**{tags["pca_rank"]: 1.0}), "actor", 64)
    assert np.isnan(collapsed["kendall"].loc["pca_rank", "srank"])


def test_the_interquartile_mean_has_an_interval_or_says_that_runs_are_too_few(notebook):
    said = notebook.interquartile_mean([0, 1, 2, 3, 1000, np.nan, np.inf, 5, 6, 7])
    mean, low, high = (float(number) for number in re.findall(r"[\d.e+-]+", said))
    assert mean == np.mean([2, 3, 5, 6]) and low < mean < high
    assert notebook.interquartile_mean([1.0, 2.0, np.nan]) == "too few runs (2)"
    assert notebook.interquartile_mean([]) == "too few runs (0)"
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
    np.testing.assert_allclose(kept_table, table, rtol=1e-4)
    assert notebook.read_runs(tmp_path / "nothing") == {}


def test_every_arm_has_a_name(notebook):
    arms = [
        {"pfo_coef": 1.0},
        {"pfo_coef": 10.0},
        {"pfo_coef": 1.0, "pfo_layers": "all"},
        {"pfo_coef": 1.0, "pfo_reduction": "sum"},
        {"share_trunk": True},
        {"reset_adam": True},
        {"adam_beta2": 0.9},
        {"adam_beta1": 0.5},
        {"reward_keep_prob": 0.1},
        {"action_logprob": "sampled"},
        {"policy": "gaussian"},
    ]
    names = {notebook.arm(ARGS | flags) for flags in arms}
    assert len(names) == 11 and "no intervention" not in names
    assert notebook.arm(ARGS | {"pfo_coef": 1.0}) == "PFO 1"
    off = {"env_id": "ALE/Phoenix-v5", "pfo_layers": "all", "adam_beta1": 0.9}
    assert notebook.arm(ARGS) == notebook.arm(off) == notebook.arm({}) == "no intervention"


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
    doubled = TABLE.assign(**{"charts/episodic_return": TABLE["charts/episodic_return"] * 2})
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
        table = pd.DataFrame({"charts/episodic_return": curve}, index=steps)
        path = {"fork_from": "runs/plain/checkpoints/1.pt", "fork_step": fork_step}
        return ARGS | (path if fork_step else {}) | flags, table

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
    runs = tmp_path / "runs"
    made_run(runs / "good")
    args, csv = json.dumps(ARGS), f"# {json.dumps(ARGS)}\n{TABLE.iloc[:9].to_csv()}"
    for name, content in {
        "no-json": b"{",
        "not-utf8": b"\xff\xfe",
        "a-list": b"[]",
        "deep": b"[" * 100_000,
        "other-program": b'{"update_epochs": 10}',
        "two-states": b'{"alpha": [3.0], "learning_rate": 1.5}',
        "env-is-a-list": json.dumps(ARGS | {"env_id": ["Hopper-v4"]}).encode(),
        "half-a-character": json.dumps(ARGS | {"env_id": "\ud800"}).encode(),
        "no-steps": json.dumps(ARGS | {"total_timesteps": 0}).encode(),
        "steps-in-words": json.dumps(ARGS | {"total_timesteps": "many"}).encode(),
        "endless": json.dumps(ARGS | {"total_timesteps": 10**400}).encode(),
        "epochs-nan": json.dumps(ARGS | {"update_epochs": float("nan")}).encode(),
        "no-log": args.encode(),
    }.items():
        (runs / name).mkdir()
        (runs / name / "args.json").write_bytes(content)
    (runs / "empty-folder").mkdir()
    made_run(runs / "args-is-a-folder")
    (runs / "args-is-a-folder" / "args.json").unlink()
    (runs / "args-is-a-folder" / "args.json").mkdir()
    made_run(runs / "log-is-a-folder")
    (runs / "log-is-a-folder" / "events.out.tfevents.1").unlink()
    (runs / "log-is-a-folder" / "events.out.tfevents.1").mkdir()
    made_run(runs / "log-is-noise")
    noise = np.random.default_rng(0).bytes(5000)
    (runs / "log-is-noise" / "events.out.tfevents.1").write_bytes(noise)
    (runs / "pipe").mkdir()
    os.mkfifo(runs / "pipe" / "args.json")
    os.mkfifo(runs / "pipe.csv.gz")
    packed = gzip.compress(csv.encode())
    for name, content in {
        "not-packed.csv.gz": csv.encode(),
        "cut.csv.gz": packed[: len(packed) // 2],
        "flipped.csv.gz": packed[:500] + bytes([packed[500] ^ 64]) + packed[501:],
        "empty.csv.gz": b"",
        "no-args.csv.gz": gzip.compress(TABLE.to_csv().encode()),
        "words.csv.gz": gzip.compress(re.sub(",0.002", ",word", csv).encode()),
        "backwards.csv.gz": gzip.compress(f"# {args}\n{TABLE[::-1].to_csv()}".encode()),
        "twice.csv.gz": gzip.compress(f"# {args}\n{TABLE.iloc[[1, 1, 2]].to_csv()}".encode()),
        "one-row.csv.gz": gzip.compress(f"# {args}\n{TABLE[:1].to_csv()}".encode()),
        "good.csv.gz": packed,  # there is a run of this name
        "notes.txt": b"remember the milk",
    }.items():
        (runs / name).write_bytes(content)
    (runs / "folder.csv.gz").mkdir()
    (runs / "nowhere").symlink_to(tmp_path / "nothing")
    (runs / os.fsdecode(b"\xff")).mkdir()
    odd = [path.name for path in runs.iterdir() if path.name != "good"]
    for name in ("cut-log", "noise-in-log"):  # half of these can be read
        made_run(runs / name)
    log = runs / "cut-log" / "events.out.tfevents.1"
    log.write_bytes(log.read_bytes()[:-100])
    log = runs / "noise-in-log" / "events.out.tfevents.1"
    log.write_bytes(log.read_bytes()[:150_000] + noise + log.read_bytes()[150_000:])

    names, said = execute()
    assert len(odd) > 30
    for name in odd:
        assert said.count(f"left out: {name!r}: ") == said.count(repr(name)) == 1, name
    assert said.count("left out") == len(odd)
    assert all(
        said.count(f"{name!r}: events.out.tfevents.1 cannot") == 1
        for name in ("cut-log", "noise-in-log")
    )
    assert list(names.runs) == ["cut-log", "good", "noise-in-log"]
    assert [len(names.runs[name][1]) for name in names.runs] == [146, 147, 95]
    assert str(tmp_path) not in said


def events_of(notebook, width=64, **curves):
    """Order of events of made curves of 200 log points, 10 steps apart; the others are calm."""
    tags = {
        "ratio_max": "trust_region/ratio_max",
        "returns": "charts/episodic_return",
        "rank": "representation/actor/pca_rank",
        "dead": "representation/actor/dead_neurons",
        "saturated": "policy/saturated_actions",
    }
    calm = {"ratio_max": [2.0] * 200, "returns": [0.0] * 5 + [100.0] * 195}
    calm |= {"rank": [20.0] * 200, "dead": [0.0] * 200}
    columns = {tags[name]: series(curve) for name, curve in (calm | curves).items()}
    return notebook.order_of_events(pd.DataFrame(columns), width)


def test_the_order_of_events(notebook):
    never = {"ratios break", "return falls", "rank falls", "neurons die", "actions saturate"}

    def switch(before, at, after):
        return [before] * at + [after] * (200 - at)

    assert events_of(notebook) == dict.fromkeys(never)
    ratios = switch(2.0, 50, 1e6)
    assert events_of(notebook, ratio_max=ratios)["ratios break"] == 600  # the tenth of 20 broken
    assert events_of(notebook, ratio_max=switch(2.0, 50, 9e5))["ratios break"] is None
    spikes = [1e12 if i % 3 == 0 else 2.0 for i in range(200)]  # 7 of 20
    assert events_of(notebook, ratio_max=spikes)["ratios break"] is None
    halves = [1e12 if i % 2 == 0 else np.nan for i in range(200)]  # gaps are no log points
    assert events_of(notebook, ratio_max=halves)["ratios break"] == 390

    # Smoothed, a step down by d is through a fraction f of d after log(1 - f) / log(0.95) points
    up = [0.0] * 5 + [100.0] * 95
    assert events_of(notebook, returns=[*up, *[0.0] * 100])["return falls"] == 1140
    assert events_of(notebook, returns=[*up, *[60.0] * 100])["return falls"] is None
    there_and_back = [*up, *[0.0] * 30, *[90.0] * 70]
    assert events_of(notebook, returns=there_and_back)["return falls"] == 1140  # the first time
    assert events_of(notebook, returns=[100.0] * 5 + [50.0] * 195)["return falls"] is None
    assert events_of(notebook, returns=[*up, 0.0, *[np.nan] * 99])["return falls"] == 1140  # stuck
    noise = [60.0, 140.0] * 2 + [100.0] + [115.0] * 95 + [0.0] * 100  # what may be chance
    assert events_of(notebook, returns=noise)["return falls"] is None
    offset = [1000.0 + x for x in (*up, *[0.0] * 100)]
    assert events_of(notebook, returns=offset)["return falls"] == 1140  # of the gain

    assert events_of(notebook, rank=switch(20.0, 100, 0.0))["rank falls"] == 1070
    assert events_of(notebook, rank=switch(20.0, 100, 14.1))["rank falls"] is None
    assert events_of(notebook, rank=[40.0] * 3 + [10.0] * 197)["rank falls"] == 130  # of its peak
    assert events_of(notebook, dead=switch(0.0, 100, 64.0))["neurons die"] == 1140
    assert events_of(notebook, dead=switch(0.0, 100, 31.9))["neurons die"] is None
    assert events_of(notebook, 32, dead=switch(0.0, 100, 31.9))["neurons die"] == 1140
    assert events_of(notebook, saturated=switch(0.0, 100, 0.2))["actions saturate"] == 1140
    assert events_of(notebook, saturated=switch(0.0, 100, 0.1))["actions saturate"] is None
    assert notebook.order_of_events(pd.DataFrame(), 64) == dict.fromkeys(never)


def test_the_kept_hopper_runs_break_their_ratios_first(notebook):
    for name, broken, fallen in (
        ("hopper-tanh-e20-pfo0-s25", 825_344, 2_078_720),
        ("hopper-tanh-e20-sampled-s25", None, None),
    ):
        events = notebook.order_of_events(kept(name)[1], 64)
        assert (events["ratios break"], events["return falls"]) == (broken, fallen)
    row = notebook.row_of("run", {"run": kept("hopper-tanh-e20-pfo0-s25")})
    assert row["actions saturate"] == "not logged" and 40 < row["pca_rank then"] < 46
    assert round(row["gain left"], 2) == -0.06


def test_the_clamp_turns_an_outward_shift_round(notebook):
    clamped, sampled = (notebook.shifted_ratio(0.05, bound=bound) for bound in (7.24773, np.inf))
    assert f"{clamped:.2f} {sampled:.2f}" == "0.02 1.25"
    old, new = torch.distributions.Normal(8.0, 0.1), torch.distributions.Normal(8.05, 0.1)
    for u, ratio in ((torch.tensor(7.24773), clamped), (torch.tensor(8.07), sampled)):
        assert (new.log_prob(u) - old.log_prob(u)).exp().item() == pytest.approx(ratio, rel=1e-3)
    inside = notebook.shifted_ratio(0.05, loc=5.0, bound=7.24773)
    assert inside == pytest.approx(notebook.shifted_ratio(0.05, loc=5.0))


def test_a_kept_checkpoint_is_played_and_drawn(tmp_path, monkeypatch, capsys):
    import ppo_toy

    def run_cells(checkpoint, shown):
        monkeypatch.setenv("CHECKPOINT", str(checkpoint))
        names = {"plt": plt, "display": shown.append, "COLLAPSE": ""}
        for cell in CODE:
            if "functions" in cell.metadata.get("tags", []) or "CHECKPOINT" in cell.source:
                exec(cell.source, names)
        return capsys.readouterr().out

    args = ppo_toy.Args(env_id="Acrobot-v1")
    agent = ppo_toy.Agent(ppo_toy.Envs(args, 1, 0), args)
    state = {"script": "ppo_toy", "args": asdict(args) | {"gone": 1}, "global_step": 10}
    state |= {"agent": agent.state_dict(), "obs_stats": {}}
    torch.save(state, tmp_path / "10.pt")
    said = run_cells(tmp_path / "10.pt", shown := [])
    assert re.fullmatch(
        r"Acrobot-v1, seed 1, step 10, no intervention, ten episodes:( -\d+){10}\n", said
    )
    assert len(shown) == 1 and (tmp_path / "10.gif").read_bytes().startswith(b"GIF")

    torch.save(state | {"script": "shutil"}, tmp_path / "20.pt")
    (tmp_path / "30.pt").write_bytes(b"noise")
    for name in ("20.pt", "30.pt", "40.pt"):  # another program's, damaged, missing
        said = run_cells(tmp_path / name, shown := [])
        assert said.startswith(f"'{name}' cannot be played: ") and said.count("\n") == 1
        assert not shown and str(tmp_path) not in said
        assert ("a checkpoint of shutil" in said) == (name == "20.pt")


def test_without_runs_and_histories_every_figure_says_what_to_run(execute):
    names, said = execute()
    command = "python ppo_mujoco.py --env-id Hopper-v4 --activation tanh --total-timesteps 5000000"
    assert said.count(f"{command} --seed 25") == 7 and f"{command} --pfo-coef 1 --seed 25" in said
    assert said.count("python ppo_toy.py train --env-id Acrobot-v1") == 2 and "--fork-from" in said


def test_a_figure_whose_runs_are_missing_says_which_command_makes_them(execute, tmp_path):
    made_run(tmp_path / "runs" / "pfo", pfo_coef=1.0)  # nothing without intervention
    made_run(tmp_path / "runs" / "others", pfo_coef=1.0, num_envs=4, lacks=["tf32", "env_threads"])
    _, said = execute()
    command = "python ppo_mujoco.py --env-id Hopper-v4 --activation tanh --total-timesteps 300000"
    assert (
        len(re.findall(rf"No runs without intervention.*{command} --num-envs \d --seed 25", said))
        == 5
    )


def test_the_notebook_runs_head_to_tail_on_the_kept_histories(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("CHECKPOINT", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    executed = nbformat.from_dict(json.loads(json.dumps(NOTEBOOK)))
    NotebookClient(executed, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 13
    said = [output for output in outputs if output.output_type == "stream"]
    assert [output.name for output in said] == ["stdout"] * 2  # no warnings
    assert "action_logprob=sampled: above in 5 of 5, p = 0.031" in said[0].text
    assert "sampled after the fall: above in 5 of 5, p = 0.031" in said[0].text
    assert "No checkpoints" in said[1].text


def test_the_stored_notebook_is_small_and_holds_its_outputs():
    assert (ROOT / "plots.ipynb").stat().st_size < 900_000
    assert "two_states" in CODE[0].source and "RUNS" not in CODE[0].source  # needs no data
    folded = [cell for cell in CODE if cell.metadata.get("jupyter", {}).get("source_hidden")]
    assert len(folded) == 4 and not any(re.search(r"import ppo_", cell.source) for cell in CODE)
    assert all(cell.execution_count for cell in CODE)
    outputs = [output for cell in CODE for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {
        "stream",
        "display_data",
        "execute_result",
    }
    assert not any(output.get("name") == "stderr" for output in outputs)
    said = "".join(
        str(output.get("text", output.get("data", {}).get("text/plain"))) for output in outputs
    )
    assert not re.search(r"/(root|home|tmp|work|Users)\b|Traceback|Warning|\bnan \[", said)
    texts = [cell.source for cell in NOTEBOOK.cells if "**Look for**" in cell.source]
    seen = [text for text in texts if "*In the kept runs*" in text or "*Here*" in text]
    assert len(texts) - len(seen) == 1  # the closed-form mechanism

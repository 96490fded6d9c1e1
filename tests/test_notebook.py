"""plots.ipynb: its functions on hand-made data, and the whole notebook on small runs."""

import json
import os
import shutil
from types import SimpleNamespace

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from scipy import stats

NOTEBOOK = nbformat.read(ROOT / "plots.ipynb", 4)


@pytest.fixture(scope="module")
def notebook():
    """The functions that the notebook defines in its cells tagged "functions"."""
    names = {}
    for cell in NOTEBOOK.cells:
        if "functions" in cell.metadata.get("tags", []):
            exec(cell.source, names)
    return SimpleNamespace(**names)


def series(values, every=10):
    return pd.Series(np.array(values, float), index=np.arange(1, len(values) + 1) * every)


def test_smoothing_passes_over_gaps(notebook):
    smoothed = notebook.smooth(series([np.nan, 1, np.nan, 3]), alpha=0.5)
    assert np.isnan(smoothed.iloc[0]) and smoothed.iloc[1:].tolist() == [1, 1, 2]


def test_band_is_mean_and_range_at_the_same_step(notebook):
    a = pd.DataFrame({"x": series([1, 2, 3]), "capacity/actor": series([1, np.nan, 3])})
    b = pd.DataFrame({"x": series([3, 4]), "capacity/actor": series([5, 6])})  # ended early
    lines = notebook.band([a, b], "x", alpha=1.0)
    assert lines["mean"].tolist() == [2, 3, 3] and lines["min"].tolist() == [1, 2, 3] and lines["max"].tolist() == [3, 4, 3]
    halves = notebook.band([a, b], "x", alpha=0.5)
    assert halves["mean"].tolist() == [2, 2.5, 2.75]
    unsmoothed = notebook.band([a, b], "capacity/actor", alpha=0.5)
    assert unsmoothed["mean"].tolist() == [3, 3.5, 3]  # a's gap is filled with what it was
    assert notebook.band([a, b], "missing").empty
    steady, seldom = series([100] * 6), series([0, np.nan, 0, np.nan, np.nan, np.nan])
    returns = [pd.DataFrame({"charts/episodic_return": x, "other": x}) for x in (steady, seldom)]
    assert notebook.band(returns, "charts/episodic_return", 1.0)["mean"].tolist() == [50] * 6
    assert notebook.band(returns, "other", 1.0)["mean"].tolist() == [50, 50, 50, 100, 100, 100]


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
    assert len(notebook.lowest_windows(table, "below", 1000, number=100)) == 50  # those before the collapse
    assert notebook.lowest_windows(table.assign(below=np.nan), "below", 1000).empty
    assert len(notebook.lowest_windows(table.iloc[:25], "below", 1000)) == 3  # ended early


def test_the_share_of_the_gain_that_is_kept(notebook):
    up, down = np.linspace(0, 100, 500), np.full(500, 10.0)
    assert notebook.kept_gain(series(up), 5000) == pytest.approx(1, abs=0.03)
    kept = notebook.kept_gain(series([*up, *down]), 10_000)
    assert kept == pytest.approx(10 / notebook.smooth(series(up)).max())
    gaps = series([*up, *down])
    gaps.iloc[::3] = np.nan
    assert notebook.kept_gain(gaps, 10_000) == pytest.approx(kept, rel=0.05)
    assert np.isnan(notebook.kept_gain(series(-up), 5000)) and np.isnan(notebook.kept_gain(series([]), 100))


def test_rank_agreement_is_that_of_scipy(notebook):
    rng = np.random.default_rng(0)
    ranks = pd.DataFrame({f"representation/actor/{name}": rng.integers(1, 64, 50) for name in notebook.RANKS})
    ranks.loc[3, "representation/actor/srank"] = np.nan
    agreement = notebook.rank_agreement(ranks, "actor", 64)
    x, y = ranks.dropna()[["representation/actor/pca_rank", "representation/actor/srank"]].to_numpy().T
    for measure, expected in (
        ("kendall", stats.kendalltau(x, y).statistic),
        ("spearman", stats.spearmanr(x, y).statistic),
        ("pearson", stats.pearsonr(x, y).statistic),
        ("L2 distance", np.sqrt(((x - y) ** 2).mean()) / 64),
    ):
        assert agreement[measure].loc["pca_rank", "srank"] == pytest.approx(expected), measure
    collapsed = ranks.assign(**{"representation/actor/pca_rank": 1.0})
    assert np.isnan(notebook.rank_agreement(collapsed, "actor", 64)["kendall"].loc["pca_rank", "srank"])


def test_interquartile_mean(notebook):
    mean, low, high = notebook.interquartile_mean([0, 1, 2, 3, 1000, np.nan, np.inf, 5, 6, 7])
    assert mean == np.mean([2, 3, 5, 6]) and low < mean < high
    assert np.isnan(notebook.interquartile_mean([1.0, 2.0])[0])


def test_kept_histories_read_back(notebook, run, tmp_path):
    run("ppo_toy", name="run")
    args, table = notebook.read_runs(tmp_path)["run"]
    notebook.keep_history("run", args, table, tmp_path / "kept")
    (kept_args, kept), *_ = notebook.read_runs(tmp_path / "kept").values()
    assert kept_args == args and kept.columns.tolist() == table.columns.tolist()
    np.testing.assert_allclose(kept, table, rtol=1e-4)
    assert notebook.read_runs(tmp_path / "nothing") == {}


def test_every_arm_has_a_name(notebook):
    import ppo_atari
    import ppo_mujoco

    assert notebook.arm(vars(ppo_mujoco.Args())) == notebook.arm(vars(ppo_atari.Args())) == "no intervention"
    names = {
        notebook.arm(vars(ppo_mujoco.Args(**flags)))
        for flags in (
            {"pfo_coef": 1.0},
            {"pfo_coef": 10.0},
            {"pfo_coef": 1.0, "pfo_layers": "all"},
            {"share_trunk": True},
            {"reset_adam": True},
            {"adam_beta2": 0.9},
            {"reward_keep_prob": 0.1},
            {"action_logprob": "sampled"},
            {"clip_coef": 0.05},
            {"clip_coef": 0.1},
            {"adam_beta1": 0.5},
            {"pfo_coef": 1.0, "pfo_reduction": "sum"},
        )
    }
    assert len(names) == 12 and "no intervention" not in names


def test_runs_of_other_settings_are_told_apart(notebook):
    import ppo_atari
    import ppo_mujoco
    import ppo_toy

    for script in (ppo_mujoco, ppo_atari, ppo_toy):
        apart = script.Args(
            seed=3, update_epochs=2, activation="relu", clip_coef=0.3, pfo_coef=1.0, log_interval=0.5, cuda=False
        )
        assert notebook.settings(vars(apart)) == ""
        assert notebook.settings(vars(script.Args(width=32, learning_rate=1e-2))) == "--learning-rate 0.01 --width 32"
    assert notebook.settings(vars(ppo_atari.Args(sticky=0.0))) == "--sticky 0.0"
    assert notebook.settings(vars(ppo_atari.Args(capacity_steps=512, profile=True))) == "--capacity-steps 512"
    assert notebook.settings(vars(ppo_mujoco.Args(policy="gaussian"))) == "--policy gaussian"


def test_the_notebook_runs_head_to_tail_on_small_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("SMALL_RUN_STEPS", "1024")
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    executed = nbformat.from_dict(json.loads(json.dumps(NOTEBOOK)))
    NotebookClient(executed, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 9
    assert len(list((tmp_path / "runs").iterdir())) == 13


def test_a_figure_whose_runs_are_missing_says_which_command_makes_them(tmp_path, monkeypatch, capsys):
    shutil.copy(ROOT / ".results" / "histories" / "hopper-e10-pfo1-s25.csv.gz", tmp_path)  # nothing without intervention
    monkeypatch.setenv("RUNS", str(tmp_path))
    monkeypatch.chdir(ROOT)
    matplotlib.use("Agg")
    names = {"display": lambda table: None}
    for cell in NOTEBOOK.cells:
        if cell.cell_type == "code" and "--profile" not in cell.source:
            exec(cell.source, names)
    said = capsys.readouterr().out
    command = "python ppo_mujoco.py --env-id Hopper-v4 --activation tanh --total-timesteps 300000"
    assert said.count(f"{command} --seed 25") == 5 and f"{command} --update-epochs 10 --pfo-coef 1 --seed 25" in said


def test_the_notebook_is_short_and_holds_its_outputs():
    code = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
    assert len(code) <= 12
    assert all(cell.execution_count for cell in code) and any(cell.outputs for cell in code)

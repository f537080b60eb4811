"""The command: every form, its files, and tables that it refuses in one line."""

import json
from dataclasses import replace

import numpy as np
import pytest

from mm_train.scaling_law.__main__ import main
from mm_train.scaling_law.law import PUBLISHED, load_law
from tests.mm_train.scaling_law.synthetic import sweep, write


def test_a_joint_fit_is_written_and_planned_with(tmp_path, capsys):
    path = write(sweep(0.0076, seed=1), tmp_path / "runs.csv")
    assert main(["fit", str(path), "--out", str(tmp_path / "law"), "--bootstrap", "3"]) == 0
    text = capsys.readouterr().out
    assert "RMSE 0.00" in text
    assert "left out and predicted by the rest" in text
    assert sorted(f.name for f in (tmp_path / "law").iterdir()) == ["isoflop.svg", "law.json", "loss.svg", "pareto.svg"]
    law = load_law(str(tmp_path / "law/law.json"))
    assert (law.unit, law.expansions, len(law.draws)) == (1e9, (1, 2, 4, 8, 16, 32), 3)
    truth = sweep()
    said = law.loss(truth.active_params, truth.tokens, truth.expansion)
    assert np.abs(said - truth.loss).max() < 0.01
    words = ["--memory-gib", "5", "--train-flops", "3.3e20", "--active-max", "0.3e9"]
    assert main(["plan", *words, "--coefficients", str(tmp_path / "law/law.json")]) == 0
    assert "95 % of the bootstrap" in capsys.readouterr().out


def test_reduced_forms_hold_c_and_make_groups(tmp_path, capsys):
    fine, coarse = sweep(expansions=(8,)), sweep(expansions=(8,))
    coarse = replace(coarse, granularity=np.ones(len(coarse)), loss=coarse.loss + 0.05)
    both = replace(fine, **{k: np.concatenate([getattr(fine, k), getattr(coarse, k)]) for k in vars(fine)})
    path = write(both, tmp_path / "runs.csv")
    words = [str(path), "--out", str(tmp_path / "law"), "--bootstrap", "0", "--form", "granularity"]
    assert main(["fit", *words, "--c", "1.973"]) == 0
    values = json.loads((tmp_path / "law/law.json").read_text())
    assert [fit["label"] for fit in values["fits"]] == ["granularity 1", "granularity 8"]
    k, want = values["fits"][1]["coefficients"], PUBLISHED.reduced(8)
    assert [k["A"], k["alpha"], k["c"]] == pytest.approx([want.A, want.alpha, want.c], rel=0.05)
    assert (
        main(["plan", "--memory-gib", "5", "--train-flops", "1e21", "--coefficients", str(tmp_path / "law/law.json")])
        == 2
    )
    assert "needs the joint one" in capsys.readouterr().err


def test_expansions_that_lack_runs_are_left_out_with_a_word(tmp_path, capsys):
    runs = sweep(expansions=(2, 8))
    runs = runs.where((runs.expansion == 8) | (runs.tokens <= 200e9))
    path = write(runs, tmp_path / "runs.csv")
    assert main(["fit", str(path), "--out", str(tmp_path / "law"), "--bootstrap", "0", "--form", "fixed-e"]) == 0
    assert "expansion 2: left out, 2 distinct token budgets" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words", "says"),
    [
        (lambda runs: runs.where(runs.active_params == 0.5e9), (), "too little to fit joint: 1 distinct sizes"),
        (lambda runs: runs.where(runs.expansion < 4), (), "2 distinct expansions"),
        (lambda runs: replace(runs, loss=np.where(runs.tokens > 4e11, np.nan, runs.loss)), (), "not finite"),
        (lambda runs: replace(runs, shared=(runs.tokens > 3e11).astype(float)), (), "the runs mix shared 0, 1"),
        (lambda runs: replace(runs, granularity=np.where(runs.tokens > 3e11, 4, 8)), (), "choose one: --granularity 8"),
        (lambda runs: runs, ("--granularity", "3"), "it has 8"),
        (lambda runs: runs, ("--form", "granularity"), "give --c"),
        (lambda runs: runs, ("--form", "granularity", "--c", "2"), "the runs mix expansion"),
        (lambda runs: runs.where(runs.expansion == 1), ("--form", "shared", "--c", "2"), "no runs with experts"),
        (lambda runs: runs, ("--unit", "0"), "--unit is 0.0"),
        (lambda runs: runs, ("--bootstrap", "-1"), "must not be negative"),
    ],
)
def test_what_cannot_be_fitted_is_one_line(change, words, says, tmp_path, capsys):
    path = write(change(sweep()), tmp_path / "runs.csv")
    assert main(["fit", str(path), "--out", str(tmp_path / "law"), *words]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "law").exists()

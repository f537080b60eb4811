"""Real trainings of a small sweep: collected, gone on with, never redone, and what is said when one fails."""

import csv
import re
import signal
import subprocess
import sys
import time

import pytest

from mm_train.metrics import read_metrics
from mm_train.scaling_law.__main__ import main
from mm_train.scaling_law.sweep import COLUMNS
from mm_train.stopping import STOPPED

POINTS = "points: [{expansion: [1, 2]}]\n"


def rows(out):
    with (out / "runs.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.timeout(300)
def test_a_sweep_trains_collects_and_goes_on(spec, data_set, tmp_path, capsys):
    out = tmp_path / "out"
    path = spec(POINTS, data_set)
    assert main(["sweep", str(path), "--rank", "0", "--world", "2"]) == 0  # the first task of two
    assert "1 of 2 runs" in capsys.readouterr().out
    finished = (out / "w32-dense-384-seed0" / "DONE").stat().st_mtime_ns
    assert main(["sweep", str(path), "--jobs", "2"]) == 0
    assert (out / "w32-dense-384-seed0" / "DONE").stat().st_mtime_ns == finished  # not trained again
    dense, moe = rows(out)
    assert tuple(dense) == COLUMNS
    assert (dense["expansion"], dense["granularity"], dense["shared"]) == ("1", "1", "0")
    assert (moe["expansion"], moe["granularity"], moe["shared"], moe["tokens"]) == ("2", "8", "1", "384")
    (score,) = (r for r in read_metrics(out / moe["name"])["validation"] if r["step"] == 3)
    assert float(moe["loss"]) == pytest.approx(score["loss"], abs=1e-6)
    assert float(moe["bits_per_byte"]) == pytest.approx(score["bits_per_byte"], abs=1e-6)

    assert main(["sweep", str(spec(POINTS.replace("}", ", overrides: [optim.lr=1e-3]}"), data_set))]) == 2
    assert "was begun with another configuration" in capsys.readouterr().err


@pytest.mark.timeout(300)
def test_a_run_that_fails_is_named_and_the_others_go_on(spec, data_set, tmp_path, capsys):
    # The second network's vocabulary is smaller than the tokenizer's.
    points = "points: [{variant: bad, overrides: [model.vocab_size=64]}, {expansion: [1]}]\n"
    assert main(["sweep", str(spec(points, data_set))]) == 1
    err = capsys.readouterr().err
    assert "w32-e8-g8-shared-bad-384-seed0 failed: exit status 2: error:" in err
    assert "Traceback" not in err
    assert [row["name"] for row in rows(tmp_path / "out")] == ["w32-dense-384-seed0"]


def test_a_dry_run_lists_and_trains_nothing(spec, tmp_path, capsys):
    assert main(["sweep", str(spec(POINTS)), "--dry-run"]) == 0
    assert "2 runs, 768 tokens" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--jobs", "0"], ["--rank", "2", "--world", "2"], ["--world", "0"]])
def test_flags_that_cannot_work(spec, capsys, flags):
    assert main(["sweep", str(spec(POINTS)), *flags]) == 2
    assert "error: --jobs" in capsys.readouterr().err


@pytest.mark.timeout(300)
def test_a_sweep_that_is_asked_to_stop_lets_its_run_save(spec, data_set, tmp_path):
    """As a batch system does before the time limit; the same command would go on."""
    path = spec("points: [{expansion: [1], overrides: [checkpoint.every=1000, log.every=1]}]\n", data_set)
    path.write_text(path.read_text().replace("tokens: [384]", "tokens: [1280000]"))
    process = subprocess.Popen([sys.executable, "-m", "mm_train.scaling_law", "sweep", str(path)])
    log = tmp_path / "out/w32-dense-1.28M-seed0.log"
    while process.poll() is None and not (log.exists() and re.search(r"step +1/", log.read_text())):
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == STOPPED
    assert list((tmp_path / "out/w32-dense-1.28M-seed0/checkpoints").glob("step-*"))

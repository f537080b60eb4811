"""Differences within seeds, and the table and figure made of them."""

import xml.etree.ElementTree as ET

import pytest

from mm_train.cli import UserError
from mm_train.scaling_law.__main__ import main
from mm_train.scaling_law.ablation import Difference, difference, find, read

HEAD = "name,active_params,total_params,tokens,expansion,granularity,shared,variant,seed,loss\n"
BODY = """\
a0,10,80,1000,8,8,1,,0,3.0
a1,10,80,1000,8,8,1,,1,3.2
a2,10,80,1000,8,8,1,,2,3.4
d0,10,10,1000,1,1,0,,0,3.1
d1,10,10,1000,1,1,0,,1,3.31
d2,10,10,1000,1,1,0,,2,3.49
z0,10,80,1000,8,8,1,no-z-loss,0,3.01
z1,10,80,1000,8,8,1,no-z-loss,1,3.19
n0,10,80,1000,8,8,0,,0,2.9
g0,10,80,1000,8,4,0,,0,2.95
"""


@pytest.fixture
def runs_csv(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text(HEAD + BODY)
    return path


def test_seeds_are_compared_with_themselves(runs_csv):
    settings = read(runs_csv)
    reference, dense, z_loss = settings[:3]
    assert reference.mean == pytest.approx(3.2)
    assert difference(dense, reference).by_seed == pytest.approx((0.1, 0.11, 0.09))
    assert difference(dense, reference).verdict == "worse"  # though the seeds are 0.2 apart
    assert difference(z_loss, reference).by_seed == pytest.approx((0.01, -0.01))


@pytest.mark.parametrize(
    ("by_seed", "verdict"),
    [
        ((0.1,), "within the noise"),  # one seed shows nothing
        ((0.1, 0.11), "worse"),
        ((-0.1, -0.11), "better"),
        ((-0.01, 0.2, 0.2), "within the noise"),
        ((0.001, 0.3), "within the noise"),
    ],
)
def test_what_is_called_a_difference(by_seed, verdict):
    assert Difference(by_seed).verdict == verdict


def test_table_and_figure(runs_csv, tmp_path, capsys):
    assert main(["ablation", str(runs_csv), "--out", str(tmp_path / "made" / "page")]) == 0
    text = (tmp_path / "made" / "page.md").read_text()
    assert "| dense | 10 | 10 | 3.1000 3.3100 3.4900 | 3.3000 | +0.1000 ± 0.0058 | worse |" in text
    figure = (tmp_path / "made" / "page.svg").read_bytes()
    words = {element.text for element in ET.fromstring(figure).iter() if element.text}
    assert {"dense", "E=8 g=8", "E=8 g=8 shared, no-z-loss", "held-out loss, nats a token"} <= words
    assert main(["ablation", str(runs_csv), "--out", str(tmp_path / "made" / "page")]) == 0
    assert (tmp_path / "made" / "page.svg").read_bytes() == figure  # the same runs, the same bytes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no runs"),
        ("name,loss\na,1\n", "has no column active_params"),
        (HEAD + "a,10,80,1000,8,8,1,,0,three\n", "line 2: could not convert"),
        (HEAD + "a,10,80,1000,8,8,1,,0,3\nb,11,80,1000,8,8,1,,1,3\n", "line 3: b is a second size"),
        (HEAD + "a,10,80,1000,8,8,1,,0,3\nb,10,80,1000,8,8,1,,0,3\n", "line 3: b is a second size"),
    ],
)
def test_runs_that_cannot_be_compared(tmp_path, text, message):
    (tmp_path / "runs.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "runs.csv")


def test_a_reference_that_is_not_there(runs_csv, tmp_path, capsys):
    settings = read(runs_csv)
    for words, message in (("8,8", "must be expansion,granularity,shared"), ("4,8,1", "no run has expansion 4")):
        with pytest.raises(UserError, match=message):
            find(settings, words)
    assert main(["ablation", str(tmp_path / "none.csv"), "--out", str(tmp_path / "x")]) == 2
    assert "cannot read" in capsys.readouterr().err

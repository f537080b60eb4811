import json
import subprocess
import sys

import numpy as np
import pytest

from eval import expert_use
from eval.item_log import Used


def used(shares: list[float], requests: int = 10) -> Used:
    read = np.array([shares, shares[::-1]])
    return Used(requests, np.stack([read, read // 2]).astype(np.int64))


def found(**tasks: Used) -> dict:
    return expert_use.facts(tasks, dict.fromkeys(tasks, 10), "a model", 2)


def test_facts_of_even_and_uneven_use():
    facts = found(even=used([20, 20, 20, 20]), one=used([0, 0, 80, 0]))
    assert facts["layers"] == 2
    assert facts["experts"] == 4
    assert facts["tasks"]["even"]["effective_experts"] == 4
    assert facts["tasks"]["one"]["effective_experts"] == 1
    assert facts["tasks"]["even"]["read"] == {"tokens": 40, "counts": [[20] * 4] * 2}
    assert facts["tasks"]["even"]["scored"]["tokens"] == 20
    assert facts["similarity"] == [[1, 0.25], [0.25, 1]]


def test_counts_of_more_or_fewer_requests_are_told():
    facts = found(some=used([1, 1, 1, 1], 4), all=used([1, 1, 1, 1]), more=used([1, 1, 1, 1], 12))
    remarks = expert_use.notes(facts)[1:]
    assert len(remarks) == 2
    assert "some: experts counted for 4 of 10 requests" in remarks[0]
    assert "more: experts counted for 12 requests" in remarks[1]


def test_files_and_the_section_of_the_page(tmp_path):
    facts = found(even=used([20, 20, 20, 20]), one=used([0, 0, 80, 0]))
    expert_use.write(tmp_path, facts)
    assert json.loads((tmp_path / expert_use.FACTS).read_text()) == facts
    drawn = (tmp_path / expert_use.FIGURE).read_text()
    for word in ("layer 0", "layer 1", "overlap of benchmarks", "even", "one"):
        assert word in drawn
    section = expert_use.section(tmp_path)
    assert section.count("<svg") == 1
    assert "<?xml" not in section
    assert "2 of 4 experts" in section
    expert_use.write(tmp_path, found())  # nothing was counted
    assert list(tmp_path.iterdir()) == []
    assert expert_use.section(tmp_path) == ""


def test_without_matplotlib_there_are_facts_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    expert_use.write(tmp_path, found(even=used([20, 20, 20, 20])))
    assert [file.name for file in tmp_path.iterdir()] == [expert_use.FACTS]
    assert "no experts.svg" in capsys.readouterr().err
    assert "<svg" not in expert_use.section(tmp_path)


@pytest.mark.parametrize("layers", [1, 9])
def test_any_number_of_layers_is_drawn(layers):
    counts = np.ones((2, layers, 8), dtype=np.int64)
    drawn = expert_use.figure(found(a=Used(1, counts), b=Used(1, counts))).decode()
    assert f"layer {layers - 1}" in drawn


def test_figures_are_drawn_without_torch():
    code = "import sys, eval.expert_use; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

import json
from pathlib import Path

import pytest

from eval.compare import holm, main


def write(folder: Path, scores: dict[str, list[float]], prompt: str = "p") -> Path:
    """What eval.run leaves behind."""
    (folder / "items").mkdir(parents=True)
    tasks = {}
    for name, values in scores.items():
        tasks[name] = {"status": "ok"}
        records = []
        for index, value in enumerate(values):
            record = {
                "task": name,
                "item": index,
                "prompt": f"{prompt}{index}",
                "score": value,
                "context": f"Q{index}?",
            }
            if name == "drop":
                record |= {"answer": f"wrote {value}", "target": "7\u2028"}
            else:
                record |= {"choices": [" yes", " no"], "nats": [-1.0, -2.0], "gold": 1}
            records.append(json.dumps(record, ensure_ascii=False) + "\n")
        (folder / "items" / f"{name}.jsonl").write_text("".join(records))
    tasks["bbh"] = {"status": "missing"}
    (folder / "results.json").write_text(json.dumps({"model": folder.name, "format": "bf16", "tasks": tasks}))
    return folder


def test_scores_are_compared_item_by_item(tmp_path, capsys):
    a = write(tmp_path / "a", {"piqa": [1.0, 0.0] * 20, "drop": [0.5] * 30, "boolq": [1.0] * 4})
    b = write(tmp_path / "b", {"piqa": [1.0, 1.0] * 20, "drop": [0.5] * 29 + [0.75]})
    assert main([str(a), str(b), "--show", "drop"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["A: a (bf16)", "B: b (bf16)"]
    assert lines[4].split()[:5] == ["piqa", "40", "50.0", "100.0", "+50.0"]
    assert lines[4].split()[-4:] == ["20", "0", "0.0000", "*"]
    assert lines[5].split()[:4] == ["drop", "30", "50.0", "50.8"]
    assert not lines[5].endswith("*")
    assert "not in both, or with other prompts: boolq" in lines
    assert "drop: 1 of 30 items differ" in lines
    assert "    B: wrote 0.75" in lines


def test_disagreements_show_every_choice(tmp_path, capsys):
    a, b = write(tmp_path / "a", {"piqa": [1.0, 0.0]}), write(tmp_path / "b", {"piqa": [0.0, 0.0]})
    assert main([str(a), str(b), "--show", "piqa"]) == 0
    assert "    A    -2.000  B    -2.000   no (right)" in capsys.readouterr().out


def test_other_prompts_are_not_compared(tmp_path, capsys):
    a, b = write(tmp_path / "a", {"piqa": [1.0]}), write(tmp_path / "b", {"piqa": [1.0]}, prompt="other")
    assert main([str(a), str(b)]) == 2
    assert "have no item in common" in capsys.readouterr().err


def test_bad_input_is_one_line(tmp_path, capsys):
    a = write(tmp_path / "a", {"piqa": [1.0]})
    assert main([str(a), str(tmp_path)]) == 2
    assert "give the --out folder of an eval.run" in capsys.readouterr().err
    (a / "items/piqa.jsonl").write_text("{")
    assert main([str(a), str(a)]) == 2
    assert "piqa.jsonl cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("p", "stays"),
    [([0.01, 0.04], [True, True]), ([0.03, 0.04], [False, False]), ([0.9, 0.001, 0.04], [False, True, False])],
)
def test_holm(p, stays):
    assert holm(p) == stays

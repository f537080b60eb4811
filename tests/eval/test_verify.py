import pytest

from eval import verify
from eval.suite import load_suites
from eval.verify import compare

BENCHMARKS = {b.name: b for b in load_suites()["paper14"].benchmarks}


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "bbh"])
def test_every_benchmark_equals_lm_evals_own_path(name, mirror, lm, theirs):
    found = compare(BENCHMARKS[name], mirror, lm, theirs, items=4, max_new=20)
    assert found.equal, found
    if name not in ("mmlu", "drop", "gsm8k"):  # their prompts are cut to the context, and have no common beginning
        assert found.our_tokens < found.their_tokens


def test_a_difference_is_found(mirror, lm, theirs, moe, capsys):
    """Verification can fail: another model on one side."""
    moe.model.norm.weight.data.mul_(1.01)
    try:
        found = compare(BENCHMARKS["piqa"], mirror, lm, theirs, items=3, max_new=20)
        assert not found.equal
        assert "DIFFERENT" in verify.line("piqa", found)
    finally:
        moe.model.norm.weight.data.fill_(1.0)


def test_more_text_than_the_context_holds_is_shortened_for_both(mirror, lm, theirs, monkeypatch):
    """lm-eval refuses a benchmark that asks for as many tokens as the context has."""
    monkeypatch.setattr(lm.engine, "context", 128)
    monkeypatch.setattr(theirs.lm, "_max_length", 128)
    found = compare(BENCHMARKS["gsm8k"], mirror, lm, theirs, items=1)
    assert found.equal, found
    assert found.note == "of 256 tokens to write 64, for want of context"
    assert verify.line("gsm8k", found).endswith(found.note)


def test_the_command(mirror, moe_release, capsys):
    options = ["--model", str(moe_release), "--data", str(mirror.folder), "--items", "2", "--tasks", "piqa,bbh"]
    assert verify.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:3] == ["piqa", "2", "4"]
    assert lines[3].startswith("bbh            missing: ")


def test_a_run_is_not_what_transformers_can_load(tmp_path, capsys):
    assert verify.main(["--model", str(tmp_path)]) == 2
    assert "give a release" in capsys.readouterr().err

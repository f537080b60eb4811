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


def test_the_command(mirror, moe_release, capsys):
    options = ["--model", str(moe_release), "--data", str(mirror.folder), "--items", "2", "--tasks", "piqa,bbh"]
    assert verify.main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:3] == ["piqa", "2", "4"]
    assert lines[3].startswith("bbh            missing: ")


def test_a_run_is_not_what_transformers_can_load(tmp_path, capsys):
    assert verify.main(["--model", str(tmp_path)]) == 2
    assert "give a release" in capsys.readouterr().err

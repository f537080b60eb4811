"""The benchmark keeps its promises: what is right, what is measured, what is said. No timing is asserted."""

import json

import pytest
import torch

from kernels import bench, bench_cases, bench_step
from kernels.bench_cases import COMPILED, OURS, REFERENCE, Case, cases
from kernels.bench_measure import error, measure
from kernels.bench_peers import liger_budget, liger_chunk
from kernels.bench_run import results, run_case
from kernels.bench_step import train_step
from kernels.sizes import Size

CPU = torch.device("cpu")
MACHINE = {"bytes": 1e9, "flops": 1e9}
SMALL = Size(width=32, hidden=16, experts=8, top_k=2, classes=48)
NAMES = ["router", "plan", "plan, capacity", "permute", "unpermute", "mixture", "experts", "cross-entropy"]


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_the_reference_path_on_a_cpu(on_cpu, tmp_path, capsys):
    path = tmp_path / "new" / "facts.json"
    assert bench.main(["--tokens", "16,32", "--no-compile", "--no-step", "--json", str(path)]) == 0
    facts = json.loads(path.read_text())
    assert (facts["device"], facts["on_gpu"], facts["path"], facts["size"]) == ("cpu", False, "reference", "tiny")
    assert facts["torch"] == torch.__version__
    assert len(facts["date"]) == 10
    assert facts["machine"].keys() == {"bytes", "flops"}
    assert [(one["tokens"], one["kernel"]) for one in facts["kernels"]] == [(n, k) for n in (16, 32) for k in NAMES]
    for one in facts["kernels"]:
        for name, passes in one["passes"].items():
            ours = passes["ways"][OURS]
            assert ours["right"], (one["kernel"], name)
            assert ours["repeats"]
            assert ours["ms"] > 0
            assert ours["rate"] == pytest.approx(passes["necessary"] / ours["ms"] * 1000)
            assert ours["of_machine"] == pytest.approx(ours["rate"] / facts["machine"][one["unit"]])
            theirs = passes["ways"][REFERENCE]
            assert theirs["times_ours"] == pytest.approx(theirs["ms"] / ours["ms"])
            assert passes["ways"][COMPILED]["absent"]
    printed = capsys.readouterr().out
    assert printed.startswith("NO GPU: this is the reference path at a small size (tiny, float32) on cpu")
    for name in NAMES:
        assert f"\n{name} " in printed
    assert "SonicMoE: not installed (mixture 16, mixture 32)" in printed


def test_every_way_computes_the_same():
    for case in cases(SMALL, 24, torch.float32, CPU):
        expected = results(case, case.exact, torch.float32)
        for way, function in case.ways.items():
            for found, wanted in zip(results(case, function), expected, strict=True):
                assert error(found, wanted) <= case.tolerance, (case.name, way)


def test_the_work_that_is_counted():
    """By hand, for 24 tokens: 48 rows of 32 float32 values."""
    found = {case.name: (case.forward, case.backward) for case in cases(SMALL, 24, torch.float32, CPU)}
    assert found["router"] == (24 * 8 * 4 + 48 * 12, 24 * 8 * 8 + 48 * 8)
    assert found["plan"] == (48 * 16, 0)
    assert found["permute"] == (4 * 72 * 32 + 4 * 48,) * 2
    assert found["unpermute"] == (4 * 72 * 32 + 8 * 48, 4 * 120 * 32 + 12 * 48)
    assert found["mixture"] == found["experts"] == (6 * 48 * 32 * 16, 12 * 48 * 32 * 16)
    assert found["cross-entropy"] == (6 * 24 * 32 * 48, 0)


def double(x):
    return (2 * x,)


def case_of(**ways) -> Case:
    x = torch.randn(4, 4, requires_grad=True)
    return Case("doubled", bench_cases.BYTES, 128.0, 128.0, (x,), {REFERENCE: double, **ways}, double, 1e-4)


def test_what_fails_is_an_entry_and_no_end():
    def broken(x):
        raise RuntimeError("no compiler\nat all")

    found = run_case(case_of(ours=double, Peer=broken), CPU, MACHINE, compiled="left out")
    for facts in found["passes"].values():
        assert facts["ways"]["Peer"] == {"absent": "RuntimeError: no compiler"}
        assert facts["ways"][OURS]["right"]
    assert bench.failures({"kernels": [{"tokens": 4} | found]}) == []


@pytest.mark.parametrize(
    ("ours", "said"),
    [
        (lambda x: (2.001 * x,), "beyond 0.0001"),
        (lambda x: (2 * x + x.new_tensor(float("nan")),), "error None is beyond"),
        (lambda x: (2 * x + torch.rand(()) * 1e-6,), "two runs differ"),
        (lambda x: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_kernel_of_ours_that_is_wrong_is_a_failure(ours, said):
    found = run_case(case_of(ours=ours), CPU, MACHINE, compiled="left out")
    lines = bench.failures({"kernels": [{"tokens": 4} | found]})
    assert len(lines) == 2  # forward and backward
    assert all(said in line for line in lines)


def test_others_are_left_out_when_time_is_over():
    found = run_case(case_of(ours=double, Peer=double), CPU, MACHINE, only="no time left")
    ways = found["passes"]["forward"]["ways"]
    assert "ms" in ways[OURS]
    assert ways["Peer"] == ways[REFERENCE] == ways[COMPILED] == {"absent": "no time left"}


def test_a_measurement_calls_what_it_measures():
    calls = []
    taken = measure(lambda: calls.append(1), CPU, seconds=0.001)
    assert len(calls) >= 7
    assert 0 < taken.fastest <= taken.seconds < 0.1
    assert taken.peak_bytes is None


@pytest.mark.parametrize(("tokens", "classes", "width"), [(8192, 128256, 768), (32768, 128256, 1280), (100, 50, 16)])
def test_liger_gets_the_largest_chunks_that_are_not_larger_than_ours(tokens, classes, width):
    rows = 2**29 // classes
    budget = liger_budget(tokens, classes, width, rows)
    assert rows / 2 < liger_chunk(tokens, classes, width, budget) <= rows or rows > tokens


@pytest.mark.parametrize("words", [["--tokens", "many"], ["--tokens", "0"], ["--size", "xl"]])
def test_bad_arguments_are_refused(words, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(words)
    assert ended.value.code == 2
    assert words[1] in capsys.readouterr().err.splitlines()[-1]


def test_a_training_step_that_fails_says_why():
    assert train_step("nothing", "dropless", on_gpu=False)["absent"].count("nothing.yaml") == 1


def test_a_training_step_is_measured():
    step = bench_step._measure("tiny", "drop_and_pad", 256, 256, "float32", 240)
    assert step.get("absent") is None
    assert step["tokens_per_second"] > 0
    assert step["mfu"] is None
    assert step["memory_gib"]["host"] > 0
    assert step["loss"] == pytest.approx(7.6, abs=0.5)  # log 2048: nothing is learnt yet


def test_a_micro_batch_is_halved_until_it_fits(monkeypatch):
    tried = []

    def step(size, dispatch, tokens, context, dtype, seconds):
        tried.append(tokens)
        return {"absent": "CUDA out of memory. Tried"} if tokens > 8192 else {"micro_batch_tokens": tokens}

    monkeypatch.setattr(bench_step, "_measure", step)
    assert bench_step.train_step("s", "dropless", on_gpu=True) == {"micro_batch_tokens": 8192, "lowered": True}
    assert tried == [32768, 16384, 8192]

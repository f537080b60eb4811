"""Every Triton kernel compiles for GPUs that are not here, and keeps within registers and shared memory."""

import json
import os
import subprocess
import sys

import pytest

from kernels.compile_ahead import MAX_SPILLS, SHARED_KIB, Compiled

KERNELS = {
    "route_forward", "route_backward", "scan", "rows", "scatter", "gather", "tile_table", "gate_up", "down_backward",
    "rows_kernel", "weights_kernel", "softmax_gradient",
}  # fmt: skip
PRODUCTS = {"gate_up", "down_backward", "rows_kernel", "weights_kernel"}

pytest.importorskip("triton")


def compile_ahead(*words: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, because this one may have Triton's interpreter on."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.compile_ahead", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)


def test_all_kernels_fit_an_ampere(tmp_path):
    run = compile_ahead("--size", "s", "--arch", "80", "--json", str(tmp_path / "facts.json"))
    assert run.returncode == 0, run.stdout + run.stderr
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert facts["broken"] == []
    assert {one["kernel"] for one in facts["kernels"]} == KERNELS
    assert {one["kernel"] for one in facts["kernels"] if one["has_dot"]} == PRODUCTS
    # Ampere takes narrower blocks than Hopper (experts_triton._block_f).
    assert {"BLOCK_F=64" in one["constants"] for one in facts["kernels"] if one["kernel"] == "gate_up"} == {True}


def test_all_kernels_fit_a_hopper_and_a_limit_that_is_too_low_is_a_failure(tmp_path):
    """Compiled once, with less shared memory than the largest kernels take: the limits themselves are held below."""
    low = 140
    run = compile_ahead(
        "--size", "s", "--arch", "90", "--max-shared-kib", str(low), "--json", str(tmp_path / "facts.json")
    )
    facts = json.loads((tmp_path / "facts.json").read_text())
    compiled = [Compiled(**one) for one in facts["kernels"]]
    assert {one.kernel for one in compiled} == KERNELS
    too_large = {one.kernel for one in compiled if one.shared > low * 1024}
    assert too_large, "no kernel takes as much: take a lower limit"
    assert run.returncode == 1
    assert {line.split()[0] for line in facts["broken"]} == too_large
    for name in too_large:
        assert f"LIMIT BROKEN: {name} (" in run.stdout
    assert [one.broken(MAX_SPILLS, SHARED_KIB[90] * 1024) for one in compiled] == [[]] * len(compiled)
    assert {one.kernel for one in compiled if one.uses_wgmma} == PRODUCTS


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"spills": 65}, "spills 65 bytes"),
        ({"shared": 227 * 1024 + 1}, "takes 232,449 bytes of shared memory (limit 232,448)"),
        ({"uses_wgmma": False}, "multiplies matrices without wgmma"),
    ],
)
def test_each_limit_can_be_broken(change, said):
    good = Compiled("gate_up", "D=768", 90, 8, 3, 187, 64, 227 * 1024, True, True, ["s"])
    assert good.broken(64, 227 * 1024) == []
    (line,) = good._replace(**change).broken(64, 227 * 1024)
    assert line.startswith(said)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--size", "xl"], "there is no size 'xl'; sizes are tiny, s, m, l"),
        (["--arch", "75"], "--arch 75: no limits are known for 75; known are 90 and 80"),
        (["--arch", "hopper"], "invalid literal for int() with base 10: 'hopper'"),
    ],
)
def test_bad_arguments_are_one_line(words, message, monkeypatch, capsys):
    from kernels.compile_ahead import main

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]

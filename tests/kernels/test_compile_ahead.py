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


LOW_KIB = 140  # less shared memory than the largest kernels for Hopper take


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """arch -> (exit status, what was printed, facts) of S, both at once and each in a process of its own: this one may
    have Triton's interpreter on. For Hopper under a limit that is too low."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.compile_ahead", "--size", "s"]
    running = {}
    for arch, words in ((80, []), (90, ["--max-shared-kib", str(LOW_KIB)])):
        file = folder / f"{arch}.json"
        running[arch] = file, subprocess.Popen(
            [*command, "--arch", str(arch), "--json", str(file), *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )  # fmt: skip
    found = {}
    for arch, (file, process) in running.items():
        printed, _ = process.communicate(timeout=550)
        assert file.exists(), printed
        found[arch] = process.returncode, printed, json.loads(file.read_text())
    return found


def test_all_kernels_fit_an_ampere(compiled):
    status, printed, facts = compiled[80]
    assert status == 0, printed
    assert facts["broken"] == []
    assert {one["kernel"] for one in facts["kernels"]} == KERNELS
    assert {one["kernel"] for one in facts["kernels"] if one["has_dot"]} == PRODUCTS
    # Ampere takes narrower blocks than Hopper (experts_triton._block_f).
    assert {"BLOCK_F=64" in one["constants"] for one in facts["kernels"] if one["kernel"] == "gate_up"} == {True}


def test_all_kernels_fit_a_hopper_and_a_limit_that_is_too_low_is_a_failure(compiled):
    status, printed, facts = compiled[90]
    kernels = [Compiled(**one) for one in facts["kernels"]]
    assert {one.kernel for one in kernels} == KERNELS
    assert [one.broken(MAX_SPILLS, SHARED_KIB[90] * 1024) for one in kernels] == [[]] * len(kernels)
    assert {one.kernel for one in kernels if one.uses_wgmma} == PRODUCTS
    too_large = {one.kernel for one in kernels if one.shared > LOW_KIB * 1024}
    assert too_large, "no kernel takes as much: take a lower limit"
    assert status == 1
    assert {line.split()[0] for line in facts["broken"]} == too_large
    for name in too_large:
        assert f"LIMIT BROKEN: {name} (" in printed


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

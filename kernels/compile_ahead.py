"""Compile every Triton kernel for GPUs that need not be there, and hold registers and shared memory to limits.

python -m kernels.compile_ahead                        # S, M and L for Hopper (90) and Ampere (80)
python -m kernels.compile_ahead --size s --arch 90 --json runs/compile.json

What is compiled is what the launchers launch (kernels/launches.py). For each kernel ptxas tells the registers of a
thread and the bytes that did not fit into them (spills); Triton tells the shared memory of a program. Matrix products
for Hopper have to use its warp-group instruction (wgmma). Exit status 1 when a limit is broken, 2 for bad arguments.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kernels.sizes import SIZES, sizes_named

SHARED_KIB = {90: 227, 80: 163}  # what a program can have, by compute capability (CUDA programming guide)
MAX_SPILLS = 64  # bytes a thread
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Compiled(NamedTuple):
    """One kernel for one device."""

    kernel: str
    constants: str
    arch: int
    num_warps: int
    num_stages: int
    registers: int  # of a thread
    spills: int  # bytes a thread, stored and loaded again
    shared: int  # bytes a program
    has_dot: bool
    uses_wgmma: bool
    sizes: list[str]  # of the networks that launch it

    def broken(self, max_spills: int, max_shared: int) -> list[str]:
        """The limits that it breaks, in words."""
        found = []
        if self.spills > max_spills:
            found.append(f"spills {self.spills} bytes of registers (limit {max_spills})")
        if self.shared > max_shared:
            found.append(f"takes {self.shared:,} bytes of shared memory (limit {max_shared:,})")
        if self.arch >= 90 and self.has_dot and not self.uses_wgmma:
            found.append("multiplies matrices without wgmma")
        return found


def compile_launch(launch: Any, arch: int) -> Compiled:
    """Compile one kernels.launches.Launch; `sizes` is still empty."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    source = ASTSource(
        fn=launch.kernel,
        signature=launch.signature,
        constexprs=launch.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    ptx = compiled.asm["ptx"]
    registers, spills = _assemble(ptx, arch)
    return Compiled(
        launch.name,
        launch.says,
        arch,
        compiled.metadata.num_warps,
        compiled.metadata.num_stages,
        registers,
        spills,
        compiled.metadata.shared,
        "tt.dot" in compiled.asm["ttir"],
        "wgmma.mma_async" in ptx,
        [],
    )


def _assemble(ptx: str, arch: int) -> tuple[int, int]:
    """(registers, spilled bytes) of a thread, as Triton's own assembler reports them."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        target = f"-arch=sm_{arch}{'a' if arch >= 90 else ''}"
        run = subprocess.run(
            [get_ptxas(arch).path, "-v", target, str(path), "-o", os.devnull], capture_output=True, text=True
        )
    registers = re.search(r"Used (\d+) registers", run.stderr)
    spills = re.search(r"(\d+) bytes spill stores", run.stderr)
    if run.returncode or not registers or not spills:
        raise RuntimeError(f"ptxas {target}: {run.stderr.strip()[-500:]}")
    return int(registers[1]), int(spills[1])


def compile_all(names: Sequence[str], archs: Sequence[int], dtype: torch.dtype) -> list[Compiled]:
    """Every kernel of these sizes for these devices, each once."""
    from kernels.launches import launches

    found: dict[tuple[int, str, str], Compiled] = {}
    for arch in archs:
        for name in names:
            for launch in launches(SIZES[name], dtype, divmod(arch, 10)):
                key = arch, launch.name, repr(launch[1:])
                if key not in found:
                    found[key] = compile_launch(launch, arch)
                    print(f"\r{len(found)} kernels compiled", end="", file=sys.stderr, flush=True)
                found[key].sizes.append(name)
    print(file=sys.stderr)
    return list(found.values())


def table(compiled: Sequence[Compiled]) -> str:
    """One line a kernel."""
    lines = [
        f"{'sm':>3s} {'size':5s} {'kernel':17s} {'warps':>5s} {'stages':>6s} {'registers':>9s} {'spills':>6s}"
        f" {'shared KiB':>10s} {'wgmma':>5s}  constants"
    ]
    for one in compiled:
        wgmma = ("yes" if one.uses_wgmma else "no") if one.has_dot else "-"
        lines.append(
            f"{one.arch:3d} {','.join(one.sizes):5s} {one.kernel:17s} {one.num_warps:5d} {one.num_stages:6d}"
            f" {one.registers:9d} {one.spills:6d} {one.shared / 1024:10.1f} {wgmma:>5s}  {one.constants}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.compile_ahead", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="90,80", help="compute capabilities (default %(default)s)")
    parser.add_argument("--size", default="s,m,l", help="networks (default %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of activations (default %(default)s)")
    parser.add_argument("--max-spills", type=int, default=MAX_SPILLS, help="bytes a thread (default %(default)s)")
    parser.add_argument("--max-shared-kib", type=int, help="of a program (default: what the device has)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the facts there too")
    args = parser.parse_args(argv)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as it was always; 3.9 warns where it is not said
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set, so that there is nothing to compile: unset it")
    try:
        names, archs = list(sizes_named(args.size)), [int(word) for word in args.arch.split(",")]
    except ValueError as error:
        parser.error(str(error))
    if unknown := set(archs) - SHARED_KIB.keys():
        parser.error(f"--arch {args.arch}: no limits are known for {min(unknown)}; known are 90 and 80")
    try:
        import triton
    except ImportError:
        parser.error("triton is not installed: pip install 'mobilemoe-train[kernels]'")

    compiled = compile_all(names, archs, DTYPES[args.dtype])
    broken = []
    for one in compiled:
        shared = (args.max_shared_kib if args.max_shared_kib is not None else SHARED_KIB[one.arch]) * 1024
        where = f"{one.kernel} ({one.constants}) for sm_{one.arch}"
        broken += [f"{where} {what}" for what in one.broken(args.max_spills, shared)]
    print(f"triton {triton.__version__}, {args.dtype}")
    print(table(compiled))
    if args.json:
        facts = {
            "triton": triton.__version__,
            "torch": torch.__version__,
            "dtype": args.dtype,
            "kernels": [one._asdict() for one in compiled],
            "broken": broken,
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for line in broken:
        print(f"LIMIT BROKEN: {line}")
    print(f"{len(compiled)} kernels, {len(broken)} broken limits")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())

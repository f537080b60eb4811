"""Export a checkpoint, as a release folder, for llama.cpp or for ExecuTorch: the step between training and a device.

python -m mm_train.export --checkpoint runs/quickstart/qat --out runs/quickstart/export
python -m mm_train.export --checkpoint runs/quickstart/sft --out out/ --format bf16
python -m mm_train.export --checkpoint runs/device/qat --out out/ --format gguf          # or executorch
python -m mm_train.export verify out/ --reference runs/device/qat
"""

import argparse
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mm_train import config
from mm_train.checkpoint.folders import find
from mm_train.checkpoint.format import open_checkpoint
from mm_train.cli import UserError, command
from mm_train.export.source import ExportSource
from mm_train.files import is_file
from mm_train.model_folder import find_tokenizer
from mm_train.release import write_release
from mm_train.release_files import read_json
from mm_train.release_format import MARK, stored_tensors
from mm_train.run_facts import run_facts
from mm_train.tokenizer import Tokenizer, load_tokenizer

FORMATS = ("int4", "bf16", "gguf", "executorch")
QUANTISATION_AWARE, POST_TRAINING = "quantisation-aware training", "post-training quantisation"
AFTER_TRAINING = (
    "note: this checkpoint is not from quantisation-aware training; its weights were quantised after training"
)


def export(
    path: Path, out: Path, format: str, license: str | None = None, requantise: bool = False
) -> tuple[list[Path], ExportSource]:
    """Write the newest checkpoint of `path` (a run or checkpoint folder), or a bf16 release, to `out`; `license` is
    that of the weights.

    Returns the weight files and what they were made of.

    From quantisation-aware training the int4 codes and scales are those that training computed with: the same
    function quantises the same float32 weights. From any other checkpoint it is post-training quantisation.

    Raises UserError when there is no checkpoint, and when the experts were trained for another group axis and
    `requantise` is not set.
    """
    if is_file(path / "config.json"):
        return from_release(path, out, format, license)
    folder = find(path)
    saved = open_checkpoint(folder)
    cfg = saved.run_config
    if format == "int4" and cfg.quant.enabled and cfg.quant.expert_group_axis != "out" and not requantise:
        raise UserError(
            f"{path} was trained with quant.expert_group_axis={cfg.quant.expert_group_axis}; the int4 release groups"
            " experts along out: train with quant.expert_group_axis=out, or accept the loss of quantising twice with"
            " --requantise"
        )
    tokenizer = load_tokenizer(find_tokenizer(path))
    facts = {"stage": cfg.run.stage, "step": saved.step, "quantisation": how(cfg, format)}
    facts |= {"license": license} if license else {}
    facts |= run_facts(path)
    source = ExportSource(folder)
    return _write(source, out, format, tokenizer, facts), source


def from_release(path: Path, out: Path, format: str, license: str | None) -> tuple[list[Path], ExportSource]:
    """A bf16 release as an int4 one. Raises UserError for anything else: it would be a copy, or worse than that."""
    source = ExportSource(path)
    if source.expert_axis is not None or format != "int4":
        what, to = "a bf16", "int4, gguf or executorch"
        if source.expert_axis is not None:
            what, to = "an int4", "gguf or executorch with --requantise"
        raise UserError(f"{path} is {what} release: it exports as {to}, not {format}")
    facts = read_json(path / "config.json").get(MARK)
    facts = {key: value for key, value in (facts if isinstance(facts, dict) else {}).items() if key != "name"}
    facts |= {"quantisation": POST_TRAINING} | ({"license": license} if license else {})
    return _write(source, out, format, load_tokenizer(find_tokenizer(path)), facts), source


def _write(source: ExportSource, out: Path, format: str, tokenizer: Tokenizer, facts: dict[str, Any]) -> list[Path]:
    total = sum(stored.bytes for stored in stored_tensors(source.shape, format))
    with tqdm(desc=out.name, total=total, unit="B", unit_scale=True, dynamic_ncols=True) as bar:
        return write_release(source, out, format, tokenizer, facts=facts, progress=bar.update)


def how(cfg: config.Config, format: str) -> str:
    """Where the numbers of the exported weights come from."""
    if format == "bf16":
        return "none"
    return QUANTISATION_AWARE if cfg.quant.enabled else POST_TRAINING


def to_gguf(source: ExportSource, tokenizer: Tokenizer, args: argparse.Namespace) -> Path:
    """Write a model as GGUF; returns the file. Raises UserError."""
    from mm_train.gguf.export import export_gguf, llama_cpp_flags

    facts = {"name": source.shape.name} | ({"license": args.license} if args.license else {})
    file = export_gguf(source, tokenizer, args.out, facts, args.requantise, args.float32)
    if flags := llama_cpp_flags(source.shape):
        print(f"IMPORTANT: run it with {flags}, or its output is silently wrong (see {args.out / 'README.md'})")
    return file


def to_pte(source: ExportSource, tokenizer: Tokenizer, args: argparse.Namespace) -> Path:
    """Write a model as an ExecuTorch program; returns the file. Raises UserError."""
    from mm_train.pte.export import export_pte

    return export_pte(source, tokenizer, args.out, args.requantise)


def report(files: list[Path], source: ExportSource, args: argparse.Namespace, seconds: float) -> None:
    """Say what was written, and what it cost."""
    size = sum(file.stat().st_size for file in files)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    kind = {"gguf": "GGUF", "executorch": "ExecuTorch program"}.get(args.format, f"{args.format} release")
    print(f"{kind}: {', '.join(map(str, files))} ({size:,} bytes), {seconds:.0f} s, at most {peak:.2f} GiB of memory")
    if source.errors:
        worst = max(source.errors, key=source.errors.__getitem__)
        mean = sum(source.errors.values()) / len(source.errors)
        print(
            f"note: the experts were quantised a second time, along another axis: relative error {mean:.3f} on average,"
            f" {source.errors[worst]:.3f} at most ({worst})"
        )
    elif source.expert_axis is None and args.format != "bf16" and not args.float32:
        print(AFTER_TRAINING)


@command
def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["verify"]:
        from mm_train.export.verify import main as verify

        return verify(argv[1:])
    parser = argparse.ArgumentParser(
        prog="python -m mm_train.export",
        description="Write a checkpoint as a release folder (int4, bf16), or for llama.cpp (gguf) or ExecuTorch.",
        epilog="python -m mm_train.export verify --help: compare what was written with what was trained",
    )
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--checkpoint", type=Path, help="run, checkpoint or release folder")
    weights.add_argument(
        "--random-weights",
        type=Path,
        metavar="MODEL.yaml",
        help="gguf, executorch: an untrained network, to measure speed with",
    )
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--format", default="int4", choices=FORMATS, help="default: %(default)s")
    parser.add_argument("--license", help="of the weights, as the model card shall name it, e.g. apache-2.0")
    parser.add_argument(
        "--requantise", action="store_true", help="quantise experts anew whose groups lie along another axis"
    )
    parser.add_argument(
        "--tokenizer", help='gguf, executorch: folder or "llama3" (default: the run\'s own; llama3 with random weights)'
    )
    parser.add_argument("--float32", action="store_true", help="gguf: do not quantise at all, to compare runtimes")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    if args.float32 and args.format != "gguf":
        raise UserError(f"--float32 is for --format gguf, not {args.format}")
    if args.format in ("gguf", "executorch"):
        if args.random_weights:
            source, tokenizer = ExportSource.random(args.random_weights), args.tokenizer or "llama3"
        else:
            source = ExportSource(args.checkpoint)
            tokenizer = args.tokenizer or find_tokenizer(args.checkpoint)
        write = to_gguf if args.format == "gguf" else to_pte
        files = [write(source, load_tokenizer(tokenizer), args)]
    else:
        for flag in ("random_weights", "tokenizer"):
            if getattr(args, flag):
                raise UserError(f"--{flag.replace('_', '-')} is for --format gguf and executorch, not {args.format}")
        files, source = export(args.checkpoint, args.out, args.format, args.license, args.requantise)
    report(files, source, args, time.perf_counter() - started)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Export a checkpoint as a release folder: the step between training and a device.

python -m mm_train.export --checkpoint runs/quickstart/qat --out runs/quickstart/export
python -m mm_train.export --checkpoint runs/quickstart/sft --out out/ --format bf16
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mm_train import config
from mm_train.checkpoint.folders import find
from mm_train.checkpoint.format import open_checkpoint
from mm_train.cli import UserError, command
from mm_train.model_folder import find_tokenizer, load_model
from mm_train.release import save_release
from mm_train.run_facts import run_facts
from mm_train.tokenizer import load_tokenizer

QUANTISATION_AWARE, POST_TRAINING = "quantisation-aware training", "post-training quantisation"


def export(source: Path, out: Path, format: str, license: str | None = None) -> tuple[list[Path], str]:
    """Write the newest checkpoint of `source` (a run or checkpoint folder) to `out`; `license` is that of the weights.

    Returns the weight files and how its numbers came about.

    From quantisation-aware training the int4 codes and scales are those that training computed with: the same
    function quantises the same float32 weights. From any other checkpoint it is post-training quantisation.

    Raises UserError when there is no checkpoint, or when the experts were trained for another group axis.
    """
    folder = find(source)
    saved = open_checkpoint(folder)
    cfg = saved.run_config
    if format == "int4" and cfg.quant.enabled and cfg.quant.expert_group_axis != "out":
        raise UserError(
            f"{source} was trained with quant.expert_group_axis={cfg.quant.expert_group_axis}; the int4 release groups"
            " experts along out, and quantising anew would cost accuracy: train with quant.expert_group_axis=out"
        )
    tokenizer = load_tokenizer(find_tokenizer(source))
    quantisation = how(cfg, format)
    facts = {"stage": cfg.run.stage, "step": saved.step, "quantisation": quantisation}
    facts |= {"license": license} if license else {}
    facts |= run_facts(source)
    return save_release(load_model(folder), out, format, tokenizer, facts=facts), quantisation


def how(cfg: config.Config, format: str) -> str:
    """Where the numbers of the exported weights come from."""
    if format == "bf16":
        return "none"
    return QUANTISATION_AWARE if cfg.quant.enabled else POST_TRAINING


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mm_train.export",
        description="Write a checkpoint as a release folder: weights, config, tokenizer, model card, code for others.",
    )
    parser.add_argument("--checkpoint", required=True, type=Path, help="run or checkpoint folder")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument("--format", default="int4", choices=("int4", "bf16"), help="default: %(default)s")
    parser.add_argument("--license", help="of the weights, as the model card shall name it, e.g. apache-2.0")
    args = parser.parse_args(argv)
    files, quantisation = export(args.checkpoint, args.out, args.format, args.license)
    size = sum(file.stat().st_size for file in files)
    print(f"{args.format} release: {', '.join(map(str, files))} ({size:,} bytes)")
    if quantisation == POST_TRAINING:
        print(
            "note: this checkpoint is not from quantisation-aware training; its weights were quantised after training"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())

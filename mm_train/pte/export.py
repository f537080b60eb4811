"""A folder with a network as an ExecuTorch program: model.pte, the tokenizer, how to run it, and the hashes."""

from pathlib import Path

from mm_train import config
from mm_train.cli import UserError
from mm_train.export.source import ExportSource
from mm_train.output_folder import SUMS, foreign_to, output_folder, write_sums
from mm_train.pte.program import write_program
from mm_train.tokenizer import Tokenizer, check_vocabulary

MODEL, CARD = "model.pte", "README.md"
OWN_FILES = {MODEL, CARD, SUMS, "tokenizer.json", "tokenizer_config.json"}


def export_pte(source: ExportSource, tokenizer: Tokenizer, out: Path, requantise: bool = False) -> Path:
    """Write the folder `out` and return its program.

    Raises UserError when the experts' groups lie along another axis than a device's and `requantise` is not set, for
    a network that ExecuTorch's operator does not compute, without executorch, and where `out` cannot be written.
    """
    if source.expert_axis == "out" and source.shape.num_local_experts and not requantise:
        raise UserError(
            f"{source.path} groups its experts along out (the int4 release's axis), and ExecuTorch needs groups along"
            " in: train with quant.expert_group_axis=in, or accept the loss of quantising twice with --requantise"
        )
    check_vocabulary(tokenizer, source.shape)
    with output_folder(out, foreign_to(OWN_FILES), "the ExecuTorch folder") as folder:
        write_program(folder / MODEL, source, tokenizer)
        tokenizer.save(folder)
        (folder / CARD).write_text(card(source.shape), encoding="utf-8")
        write_sums(folder)
    return out / MODEL


def card(model: config.Model) -> str:
    """README.md of the folder."""
    return "\n".join(
        [
            f"# {' '.join(model.name.split())}, ExecuTorch",
            "",
            f"`{MODEL}` takes tokens [1, T] and the position of the first of them [1], keeps keys and values itself,",
            "and gives the logits of the last token, as ExecuTorch's own text runner expects. It needs XNNPACK and the",
            "custom operators of ExecuTorch's extension/llm; experts are fast in builds for aarch64 with",
            "EXECUTORCH_BUILD_KERNELS_LLM_QUANTIZED_MOE_OPTIMIZED=ON, and computed by plain loops elsewhere.",
            "",
            f"`sha256sum -c {SUMS}` checks the files.",
            "",
        ]
    )

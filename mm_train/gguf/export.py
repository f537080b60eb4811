"""A folder with a network as GGUF: model.gguf, how to run it, and the hashes of both."""

import re
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from mm_train import config
from mm_train.cli import UserError
from mm_train.export.source import ExportSource
from mm_train.gguf import layout
from mm_train.gguf.write import write
from mm_train.output_folder import SUMS, foreign_to, output_folder, write_sums
from mm_train.tokenizer import Tokenizer, check_vocabulary

MODEL, CARD = "model.gguf", "README.md"
OWN_FILES = {MODEL, CARD, SUMS}


def export_gguf(
    source: ExportSource,
    tokenizer: Tokenizer,
    out: Path,
    facts: Mapping[str, str],
    requantise: bool = False,
    as_float32: bool = False,
) -> Path:
    """Write the folder `out` and return its model file; `facts` become keys "general.*" of it.

    Raises UserError when the experts' groups lie along another axis than a device's and `requantise` is not set, for
    a network that llama.cpp has not, and where `out` cannot be written or holds what this project did not write.
    """
    if source.expert_axis == "out" and source.shape.num_local_experts and not (requantise or as_float32):
        raise UserError(
            f"{source.path} groups its experts along out (the int4 release's axis), and GGUF needs groups along in:"
            " train with quant.expert_group_axis=in, or accept the loss of quantising twice with --requantise"
        )
    check_vocabulary(tokenizer, source.shape)
    total = sum(tensor.bytes for tensor in layout.tensors(source.shape))
    with (
        output_folder(out, foreign_to(OWN_FILES), "the GGUF folder") as folder,
        tqdm(desc=MODEL, total=total, unit="B", unit_scale=True, dynamic_ncols=True) as bar,
    ):
        write(folder / MODEL, source, tokenizer, dict(facts), as_float32=as_float32, progress=bar.update)
        (folder / CARD).write_text(card(source.shape), encoding="utf-8")
        write_sums(folder)
    return out / MODEL


def llama_cpp_flags(model: config.Model) -> str:
    """What llama.cpp has to be told on its command line for this network; "" for nothing."""
    return " ".join(f"--{flag} {number:g}" for flag, number in layout.rope_flags(model).items())


def card(model: config.Model) -> str:
    """README.md of the folder."""
    flags = llama_cpp_flags(model)
    name = re.sub(r"\s+", " ", model.name)
    lines = [f"# {name}, GGUF", "", "```bash", f"llama-cli -m {MODEL} {flags}".rstrip(), "```", ""]
    if flags:
        lines += [
            f"**The flags `{flags}` are part of the model.** Its positions are scaled as Llama 3.1's are, with a hard"
            " switch; llama.cpp does not read the switch from the file, and without the flags its answers are wrong"
            " without a word of warning, the more so the longer the text.",
            "",
        ]
    lines += [f"`sha256sum -c {SUMS}` checks the files.", ""]
    return "\n".join(lines)

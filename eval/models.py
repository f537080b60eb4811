"""Finds and loads what is to be evaluated: release, run or checkpoint of this project, GGUF, or Hugging Face folder."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from eval.lm import Engine, OwnCodec
from eval.packed import PackedEngine
from mm_train.cli import UserError
from mm_train.export.runtimes import gguf_file

HUGGING_FACE = "hf:"
# Files on which answers depend: of this project's models and those of transformers, and of GGUF files
OWN_CODE = (
    "kernels/*.py",
    *(f"mm_train/{name}.py" for name in ("decode", "kv_cache", "model", "moe", "dispatch", "quant", "release")),
    *(f"eval/{name}.py" for name in ("sequences", "tries", "packed", "hugging_face", "lm")),
)
GGUF_CODE = ("mm_train/gguf/runtime.py", *(f"eval/{name}.py" for name in ("sequences", "llama_cpp", "lm")))
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 2048, 32768  # a batch that stays in the cache is the faster one on a CPU


class Subject(NamedTuple):
    """A loaded model behind an engine, and what there is to know of it; `key` stands for all that answers depend on."""

    engine: Engine
    facts: dict[str, Any]
    key: str


def newest_run(folder: Path) -> Path:
    """The run below `folder` that finished last. Raises UserError when there is none."""
    finished = [file for depth in ("*", "*/*", "*/*/*") for file in folder.glob(f"{depth}/DONE")]
    if not finished:
        raise UserError(
            f"no finished run in {folder}: give --model (a release, run or checkpoint folder, GGUF, or hf:FOLDER)"
        )
    return max(finished, key=lambda file: file.stat().st_mtime_ns).parent


def folder_of(model: str) -> Path:
    """The folder or .gguf file that --model means. Raises UserError when it is not there."""
    folder = Path(model.removeprefix(HUGGING_FACE))
    if folder.suffix == ".gguf" and folder.is_file():
        return folder
    if not folder.is_dir():
        raise UserError(f"--model {model}: no such folder")
    return folder


def open_model(model: str, batch_tokens: int | None, device: str) -> Subject:
    """Load a model: bfloat16 on a GPU, else float32; GGUF in llama.cpp, on the CPU.

    Raises UserError when the folder holds none.
    """
    if not model.startswith(HUGGING_FACE) and (file := gguf_file(folder_of(model))) is not None:
        return open_gguf(file)
    folder, on_gpu = folder_of(model), device != "cpu"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    batch_tokens = batch_tokens or (GPU_BATCH_TOKENS if on_gpu else CPU_BATCH_TOKENS)
    engine: Engine
    if model.startswith(HUGGING_FACE):
        from eval.hugging_face import HuggingFaceEngine, load

        loaded, codec = load(folder, dtype, device)
        engine, network, fake = HuggingFaceEngine(loaded, codec, batch_tokens), loaded, False
    else:
        from mm_train.model_folder import find_tokenizer, load_model
        from mm_train.tokenizer import check_vocabulary, load_tokenizer

        network = load_model(folder, dtype, device).eval()
        tokenizer = load_tokenizer(find_tokenizer(folder))
        check_vocabulary(tokenizer, network.config)
        engine = PackedEngine(network, OwnCodec(tokenizer), batch_tokens)
        fake = any(getattr(module, "fake_quant", None) is not None for module in network.modules())
    facts = {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "context": engine.context,
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.partition(":")[0],
        "fake_quantised": fake,  # a run of quantisation-aware training computes as it trains
        "weights_sha256": weights_sha256(network),
        "tokenizer_sha256": engine.codec.sha256,
        "format": format_of(model),
    }
    names = ("context", "dtype", "device", "fake_quantised", "weights_sha256", "tokenizer_sha256")
    key = [type(engine).__name__, *(str(facts[name]) for name in names), config_of(network), code_sha256()]
    return Subject(engine, facts, hashlib.sha256(json.dumps(key).encode()).hexdigest())


def open_gguf(file: Path) -> Subject:
    """Load a GGUF file, with as many threads as torch would use. Raises UserError when llama.cpp cannot.

    Attention and cache are in float32, as `mm_train.export verify` has them: scores do not depend on the processor's
    fast paths, and what is measured is the weights' and activations' rounding alone.
    """
    from eval.llama_cpp import LlamaCppEngine
    from mm_train.gguf.read import read_model
    from mm_train.gguf.runtime import LlamaCpp, version
    from mm_train.output_folder import sha256

    known = read_model(file)
    loaded = LlamaCpp(file, known.context, torch.get_num_threads(), exact=True, known=known)
    engine = LlamaCppEngine(loaded, OwnCodec(known.tokenizer()))
    facts = {
        "parameters": known.parameters,
        "context": engine.context,
        "dtype": "Q4_0" if known.quantised else "float32",
        "device": "cpu",
        "fake_quantised": False,
        "weights_sha256": sha256(file),
        "tokenizer_sha256": engine.codec.sha256,
        "format": "gguf",
        "runtime": f"xllamacpp {version()}",
        "yarn_betas": loaded.yarn_betas,
    }
    names = ("context", "weights_sha256", "tokenizer_sha256", "runtime", "yarn_betas")
    key = [type(engine).__name__, *(str(facts[name]) for name in names), code_sha256(GGUF_CODE)]
    return Subject(engine, facts, hashlib.sha256(json.dumps(key).encode()).hexdigest())


def config_of(network: Any) -> str:
    """What weights do not say of a network: its shape and switches."""
    config = network.config
    return json.dumps(config.to_dict(), sort_keys=True, default=str) if hasattr(config, "to_dict") else repr(config)


def format_of(model: str) -> str:
    """What the folder holds: "int4" or "bf16" (releases), "run" (training checkpoints), "gguf" or "hf"."""
    if model.startswith(HUGGING_FACE):
        return "hf"
    if gguf_file(folder_of(model)) is not None:
        return "gguf"
    config = folder_of(model) / "config.json"
    if not config.is_file():
        return "run"
    return "int4" if "quantization" in json.loads(config.read_text(encoding="utf-8")) else "bf16"


def weights_sha256(network: Any) -> str:
    """Hash of all weights, so that an answer is never taken for that of another model."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def code_sha256(patterns: Sequence[str] = OWN_CODE) -> str:
    """Hash of the code that answers depend on, so that they do not outlive the repair of a fault."""
    root = Path(__file__).parent.parent
    files = [file for pattern in patterns for file in sorted(root.glob(pattern))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()

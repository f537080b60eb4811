"""From a checkpoint to a .pte: export, hand linears to XNNPACK, serialise. Needs the package executorch."""

import contextlib
import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from mm_train.cli import UserError
from mm_train.export.source import ExportSource
from mm_train.pte.network import Network
from mm_train.tokenizer import Tokenizer

PLACES = 4096  # of the cache, or what the model was made for
TOKENS = 256  # read at once, at most: buffers are planned for so many


def load_library() -> None:
    """Register the operators. Raises UserError where executorch is not installed."""
    # torchao looks for kernels that its x86 wheel has not, and says so at length.
    os.environ.setdefault("TORCHAO_FORCE_SKIP_LOADING_SO_FILES", "1")
    try:
        with quiet():
            for module in ("executorch.extension.llm.custom_ops.custom_ops", "executorch.kernels.quantized", "torchao"):
                importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"ExecuTorch needs packages that are not here ({error}): pip install 'mobilemoe-train[executorch]'"
        ) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that libraries address to their own authors."""
    level = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


def write_program(path: Path, source: ExportSource, tokenizer: Tokenizer) -> None:
    """Write `path`. The whole network is in memory several times. Raises UserError for one that cannot be."""
    load_library()
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackDynamicallyQuantizedPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from torchao.utils import unwrap_tensor_subclass

    places = min(PLACES, source.shape.max_position_embeddings)
    facts = {
        "get_vocab_size": source.shape.vocab_size,
        "get_max_context_len": places,
        "get_max_seq_len": min(TOKENS, places),
        "get_bos_id": tokenizer.bos_id,
        "get_eos_ids": list(tokenizer.stop_ids),
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }
    with quiet(), torch.no_grad():
        network = Network(source, places).eval()
        unwrap_tensor_subclass(network)
        example = (torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, dtype=torch.long))
        shapes = ({1: torch.export.Dim("tokens", min=1, max=min(TOKENS, places))}, None)
        program = torch.export.export(network, example, dynamic_shapes=shapes, strict=True)
        lowered = to_edge_transform_and_lower(
            program,
            partitioner=[XnnpackDynamicallyQuantizedPartitioner()],
            constant_methods=facts,
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
        )
        made = lowered.to_executorch(ExecutorchBackendConfig(extract_delegate_segments=True))
    with path.open("wb") as file:
        made.write_to_file(file)

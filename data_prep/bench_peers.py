"""One preparation of JSON lines into token files, by this project or as others do it: what data_prep.bench measures.

Each runs in a process of its own. The other pipelines are given what their documentation shows: megatron-core's
IndexedDatasetBuilder with a Hugging Face tokenizer, a document at a time, as its preprocess_data does; datatrove's
reader and DocumentTokenizer under its local executor.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from data_prep import run


def ours(corpus: Path, tokenizer: Path, out: Path, mirror: str = "") -> None:
    """data_prep.run with one worker: read, drop duplicates, tokenise, write, hash."""
    source = {"kind": "files", "paths": [f"{corpus}/*.jsonl"], "licence": "LicenseRef-benchmark", "domain": "web"}
    config = {
        "out": str(out),
        "validation_fraction": 0.0,
        "tokenizer": {"kind": "folder", "path": str(tokenizer)},
        "benchmarks": {"mirror": mirror or None},
        "sources": {"text": source},
    }
    out.mkdir(parents=True)
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    if run.main([str(file), "--workers", "1"]):
        raise SystemExit(2)


def ours_decontaminated(corpus: Path, tokenizer: Path, out: Path) -> None:
    """The same, and every text compared with the benchmarks in data/eval."""
    ours(corpus, tokenizer, out, "data/eval")


def megatron(corpus: Path, tokenizer: Path, out: Path) -> None:
    """megatron-core: JSON lines -> Hugging Face tokenizer -> .bin and .idx."""
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    out.mkdir(parents=True)
    builder = IndexedDatasetBuilder(str(out / "text.bin"), dtype=np.int32)
    for file in sorted(corpus.glob("*.jsonl")):
        for line in file.open(encoding="utf-8"):
            ids = [*loaded(json.loads(line)["text"]).input_ids, loaded.eos_token_id]
            builder.add_document(torch.tensor(ids, dtype=torch.int32), [len(ids)])
    builder.finalize(str(out / "text.idx"))


def datatrove(corpus: Path, tokenizer: Path, out: Path) -> None:
    """datatrove: JsonlReader -> DocumentTokenizer, no shuffling."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    steps = [
        JsonlReader(str(corpus), glob_pattern="*.jsonl"),
        DocumentTokenizer(
            str(out),
            tokenizer_name_or_path=str(tokenizer / "tokenizer.json"),
            eos_token="<|end_of_text|>",
            shuffle_documents=False,
        ),
    ]
    LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=str(out.with_suffix(".logs"))).run()


PIPELINES: dict[str, Callable[[Path, Path, Path], None]] = {
    "ours": ours,
    "ours, benchmarks compared": ours_decontaminated,
    "megatron-core + Hugging Face": megatron,
    "datatrove DocumentTokenizer": datatrove,
}


if __name__ == "__main__":
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    PIPELINES[sys.argv[1]](*map(Path, sys.argv[2:5]))

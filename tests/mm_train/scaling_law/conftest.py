"""Sweep files for tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

HEAD = """
out: {out}
configs: [configs/model/tiny.yaml, configs/stage/tiny/pretrain.yaml]
overrides:
  - data.path={data}
  - "data.mixture={{code: 1, docs: 0}}"
  - data.validation=[code]
  - data.seq_len=64
  - train.global_batch_tokens=128
  - train.micro_batch_size=2
  - train.validation_tokens=256
  - optim.warmup_steps=1
  - model.vocab_size=512
  - log.wandb=disabled
shapes:
  w32: [model.hidden_size=32, model.num_hidden_layers=1, model.intermediate_size=0, model.intermediate_size_mlp=256,
        model.num_local_experts=0, model.num_experts_per_tok=0]
tokens: [384]
seeds: [0]
"""


@pytest.fixture
def spec(tmp_path) -> Callable[..., Path]:
    """Write a sweep file that ends with `text`; runs go to tmp_path/out and read the data set `data`."""

    def write(text: str, data: Path | str = "data") -> Path:
        path = tmp_path / "sweep.yaml"
        path.write_text(HEAD.format(out=tmp_path / "out", data=data) + text)
        return path

    return write

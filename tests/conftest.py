"""A small real data set and small configs that many tests share."""

import os
import sys
import sysconfig
from pathlib import Path

# Before torch loads: sums depend on the number of threads, and some tests compare processes bit for bit.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

from mm_train import config
from mm_train.shards import ShardWriter
from mm_train.tokenizer import Tokenizer, assemble

if not torch.cuda.is_available():
    # Triton's kernels run in its interpreter then, which has to be chosen before one of them is imported.
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("no deadline", deadline=None)  # machines that run tests are busy
settings.load_profile("no deadline")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True)
def seed() -> None:
    """A test draws the same numbers whichever tests ran before it, in whichever process."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where Triton's kernels run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """Bytes and control tokens, no merges: exact and instant."""
    from tokenizers.pre_tokenizers import ByteLevel

    return assemble({char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}, [])


@pytest.fixture(scope="session")
def data_set(tmp_path_factory, byte_tokenizer) -> Path:
    """Two sources of real text (standard-library modules) in the shard format: `code`, and `chat` packed with masks."""
    folder = tmp_path_factory.mktemp("data")
    byte_tokenizer.save(folder)
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [(library / f"{name}.py").read_text()[:6000] for name in ("textwrap", "bisect", "heapq", "shlex", "queue")]
    facts = {"tokenizer_sha256": byte_tokenizer.sha256, "vocab_size": byte_tokenizer.vocab_size}
    for split, documents in (("train", texts[:4]), ("val", texts[4:])):
        code = ShardWriter(folder, "code", split, licence="PSF-2.0", domain="code", shard_tokens=9000, **facts)
        for text in documents:
            ids = [byte_tokenizer.bos_id, *byte_tokenizer.encode(text), byte_tokenizer.eos_id]
            code.add(ids, num_bytes=len(text.encode()))
        code.close()
        chat = ShardWriter(
            folder,
            "chat",
            split,
            licence="PSF-2.0",
            domain="chat",
            layout="packed",
            row_length=65,
            has_mask=True,
            **facts,
        )
        for line in "".join(documents).splitlines():
            ids, mask = byte_tokenizer.render_chat(
                [{"role": "user", "content": "next?"}, {"role": "assistant", "content": line[:16] or "-"}]
            )
            chat.add(ids, mask, num_bytes=len(line.encode()))
            chat.end_row(byte_tokenizer.pad_id)
        chat.close()
    return folder


@pytest.fixture(scope="session")
def small_model() -> config.Model:
    """The tiny model's shape, smaller still."""
    return config.Model(
        name="small",
        vocab_size=512,
        hidden_size=64,
        intermediate_size=32,
        intermediate_size_mlp=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=256,
    )


@pytest.fixture
def small_config(small_model, data_set, tmp_path) -> config.Config:
    """A run of 12 steps on the shared data."""
    cfg = config.Config(model=small_model)
    cfg.data = config.Data(path=str(data_set), mixture={"code": 3, "chat": 1}, validation=["code", "chat"], seq_len=64)
    cfg.train = config.Train(tokens=12 * 512, global_batch_tokens=512, micro_batch_size=2)
    cfg.optim = config.Optim(lr=1e-3, warmup_steps=2)
    cfg.checkpoint.every = 4
    cfg.log = config.Log(every=1, wandb="disabled")
    cfg.run = config.Run(dir=str(tmp_path / "run"), stage="pretrain")
    config.validate(cfg)
    return cfg


@pytest.fixture(scope="session")
def python() -> str:
    return sys.executable

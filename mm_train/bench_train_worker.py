"""A process of mm_train.bench_train: builds one way of training, then trains as many steps as each line asks for.

Lines of JSON come on stdin and answers go to what was stdout; anything that libraries print goes to stderr.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from kernels.cross_entropy import IGNORE
from mm_train import config
from mm_train.cli import UserError, command
from mm_train.data import Batch, Loader
from mm_train.engine import set_learning_rate
from mm_train.inventory import parameters
from mm_train.metrics import Metrics
from mm_train.optim import learning_rate
from mm_train.parallel.assemble import assemble
from mm_train.parallel.engine import build_engine
from mm_train.parallel.groups import init_groups
from mm_train.statistics import memory_gib, peak_flops
from mm_train.trainer import Trainer
from mm_train.watchdog import Watchdog
from mm_train.weights import fill, initial

DOCUMENT_TOKENS = 200  # mean length of a document in random rows


class RandomRows:
    """In the place of a Loader: rows of random tokens and documents, made before anything is timed."""

    def __init__(self, cfg: config.Config) -> None:
        generator = torch.Generator().manual_seed(cfg.train.seed)
        rows, columns = cfg.train.global_batch_tokens // cfg.data.seq_len, cfg.data.seq_len
        tokens = torch.randint(cfg.model.vocab_size, (rows, columns + 1), generator=generator)
        starts = torch.rand(rows, columns + 1, generator=generator) < 1 / DOCUMENT_TOKENS
        labels = tokens[:, 1:].masked_fill(starts[:, 1:], IGNORE)
        self.whole = (tokens[:, :-1].contiguous(), labels, starts[:, :-1].cumsum(1))
        self.readers = {"random": None}

    def micro_batches(self, first: int, global_rows: int, rows: int, rank: int, world: int) -> Iterator[Batch]:
        """As Loader.micro_batches, but every step has the same rows."""
        for start in range(rank * rows, global_rows, world * rows):
            tokens, labels, documents = (tensor[start : start + rows] for tensor in self.whole)
            yield Batch(tokens, labels, documents, ("random",) * rows)


def rows_of(cfg: config.Config) -> Loader:
    """The stage's data, or random rows where no data is named. Raises UserError for data that cannot be read."""
    if cfg.data.mixture:
        return Loader(cfg.data.path, cfg.data.mixture, cfg.data.seq_len, cfg.train.seed)
    return cast(Loader, RandomRows(cfg))


class Training(Protocol):
    """A way of training."""

    parameters: int
    device: torch.device

    def step(self) -> float:
        """One optimizer step; returns the loss in nats per token."""
        ...


class OurTraining:
    """mm_train.trainer's step, on as many ranks as the environment says."""

    def __init__(self, cfg: config.Config, folder: str) -> None:
        groups = init_groups(cfg.parallel)
        model = assemble(cfg, groups)
        fill(model, cfg.model, initial(cfg.model, cfg.train.seed), groups.place)
        metrics = Metrics(
            folder, is_main=False, wandb_mode="disabled", config=asdict(cfg), project="", run_name="bench_train"
        )
        watchdog = Watchdog(folder, groups.rank, groups.world, 0)
        self.trainer = Trainer(cfg, groups, build_engine(model, cfg, groups), rows_of(cfg), metrics, watchdog)
        counts = parameters(cfg.model)
        self.parameters = sum(counts.values()) - cfg.model.num_local_experts * cfg.model.num_hidden_layers  # the biases
        self.device = groups.device

    def step(self) -> float:
        return self.trainer.train_step(stop=False).totals.loss


class TransformersTraining:
    """transformers' Glm4Moe, the architecture there that is nearest to ours, in a plain loop.

    Like ours it has grouped-query attention with normalised queries and keys, and in every layer fine-grained experts
    with sigmoid routing and a selection bias, and a shared expert.
    """

    def __init__(self, cfg: config.Config, experts: str) -> None:
        self.cfg = cfg
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = glm4_moe(cfg.model, experts).to(self.device).train()
        parameters, decay = list(self.model.parameters()), cfg.optim.weight_decay
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, cfg.optim.lr, cfg.optim.betas, cfg.optim.eps, fused=True)
        self.loader = rows_of(cfg)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.steps = 0

    def step(self) -> float:
        cfg, rows = self.cfg, self.cfg.train.global_batch_tokens // self.cfg.data.seq_len
        batches = list(self.loader.micro_batches(self.steps * rows, rows, cfg.train.micro_batch_size, 0, 1))
        total: Tensor | float = 0.0
        for batch in batches:
            batch = batch.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=cfg.train.dtype == "bfloat16"):
                loss = self.model(input_ids=batch.tokens_BT, labels=_labels(batch)).loss / len(batches)
            loss.backward()
            total += loss.detach()
        if cfg.optim.clip_grad_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), cfg.optim.clip_grad_norm)
        set_learning_rate(self.optimizer, learning_rate(self.steps, cfg.total_steps, cfg.optim))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        return float(total)


def _labels(batch: Batch) -> Tensor:
    """As transformers wants them: each token's own id, which it shifts itself."""
    return torch.nn.functional.pad(batch.labels_BT[:, :-1], (1, 0), value=IGNORE)


def glm4_moe(model: config.Model, experts: str) -> torch.nn.Module:
    """transformers' model of the same shape, its weights random. Raises UserError when it is not installed."""
    try:
        from transformers import AutoModelForCausalLM, Glm4MoeConfig
    except ImportError:
        raise UserError("the comparison needs transformers: pip install 'mobilemoe-train[hf]'") from None
    same = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "num_experts_per_tok",
        "routed_scaling_factor",
        "norm_topk_prob",
        "rms_norm_eps",
        "initializer_range",
        "max_position_embeddings",
    )
    rotary: dict[str, Any] = {"partial_rotary_factor": 1.0, "rope_theta": model.rope_theta}
    shape = Glm4MoeConfig(
        **{key: getattr(model, key) for key in same},
        n_routed_experts=model.num_local_experts,
        moe_intermediate_size=model.intermediate_size,
        n_shared_experts=model.intermediate_size_mlp // model.intermediate_size,
        first_k_dense_replace=0,  # experts in every layer
        use_qk_norm=True,
        tie_word_embeddings=True,
        use_cache=False,
        **rotary,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(shape, attn_implementation="sdpa", experts_implementation=experts)


@command
def main() -> int:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    first = json.loads(sys.stdin.readline())
    cfg = config.from_dict(first["cfg"], "bench_train")
    with tempfile.TemporaryDirectory() as folder:
        experts = first["experts"]
        training: Training = TransformersTraining(cfg, experts) if experts else OurTraining(cfg, folder)
        facts = {"parameters": training.parameters, **machine(training.device, cfg.train.dtype)}
        _answer(answers, train(training, first["steps"]) | facts)
        for line in sys.stdin:
            _answer(answers, train(training, json.loads(line)["steps"]) | {"memory_gib": memory_gib(training.device)})
    return 0


def train(training: Training, steps: int) -> dict[str, Any]:
    """Seconds that the steps take, and the loss of the last."""
    begun = time.perf_counter()
    for _ in range(steps):
        loss = training.step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - begun, "loss": loss}


def machine(device: torch.device, dtype: str) -> dict[str, Any]:
    """The device's name, and its peak in FLOPs a second (mm_train.statistics.peak_flops)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "peak_flops": peak_flops(device, dtype), "torch": torch.__version__}


def _answer(answers: Any, values: dict[str, Any]) -> None:
    print(json.dumps(values), file=answers, flush=True)


if __name__ == "__main__":
    sys.exit(main())

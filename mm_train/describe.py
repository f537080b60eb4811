"""Say what a network is and what training it takes, before anything is launched.

python -m mm_train.describe configs/model/s.yaml
python -m mm_train.describe configs/model/s.yaml configs/stage/pretrain.yaml --parallel gpus=64 expert_parallel=4

Exact: parameters, bytes of the release files, cache. The rest are estimates (costs.py, memory.py); the output names
their assumptions. `--json` prints the same facts for programs. Torch-free.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mm_train import costs, data_plan, inventory, memory, optim_groups
from mm_train.cli import UserError, command
from mm_train.costs import GPUS
from mm_train.describe_layouts import layouts, recommendation
from mm_train.describe_plan import MFU, Plan, read_plan
from mm_train.describe_text import text
from mm_train.release_format import file_bytes

SCALE = (1, 8, 64, 512, 4096)
SHAPE = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "num_local_experts",
    "num_experts_per_tok",
    "intermediate_size",
    "intermediate_size_mlp",
    "scoring_func",
    "max_position_embeddings",
)
SCALED = (  # a line of `scale`
    "days",
    "memory_gib_total",
    "fits",
    "micro_batch_size",
    "micro_steps",
    "global_batch_tokens",
    "comm_bytes_per_step_total",
)
EXAMPLES = """examples:
  python -m mm_train.describe configs/model/s.yaml
  python -m mm_train.describe configs/model/m.yaml configs/stage/midtrain.yaml --gpu h200 --mfu 0.3
  python -m mm_train.describe configs/model/s.yaml model.num_local_experts=120 --tokens 500B --context 8192
  python -m mm_train.describe configs/model/l.yaml --parallel gpus=64 expert_parallel=4 zero_stage=2
  python -m mm_train.describe configs/model/s.yaml --json
"""


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mm_train.describe",
        description="Parameters, sizes, FLOPs, memory, communication and time of a config, without building anything.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("configs", nargs="+", metavar="FILE.yaml | key=value", help="config files, then overrides")
    parser.add_argument(
        "--parallel",
        nargs="+",
        default=[],
        metavar="KEY=N",
        help="gpus, expert_parallel, tensor_parallel, zero_stage (0, 1, 2), recompute (none, layer), micro_batch_size"
        " (rows of a GPU); what is left out comes from the config, gpus from its layout",
    )
    parser.add_argument(
        "--context", help="tokens of a row, as 2048 or 2k: k is 1024 (default: a stage file's data.seq_len, else 2048)"
    )
    parser.add_argument("--tokens", help="budget, as 6e12 or 500B (default: a stage file's train.tokens, else 6T)")
    parser.add_argument("--mfu", default=str(MFU), help=f"model FLOPs over the GPU's peak, up to 1 (default: {MFU})")
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(GPUS)} (default: h100)")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    args = parser.parse_args(argv)
    facts = describe(read_plan(args))
    print(json.dumps(facts, indent=1) if args.json else text(facts))
    return 0


def _data(plan: Plan, batch: int) -> dict[str, Any] | None:
    """What the stage reads of each source of its data set; None where there is no such folder (yet)."""
    data, samples = plan.cfg.data, -(-plan.cfg.train.tokens // batch) * batch // plan.layout.context
    if not data.mixture or not data.path or not Path(data.path).is_dir():
        return None
    sources, missing = data_plan.plan_folder(Path(data.path), data.mixture, plan.layout.context, samples)
    return {
        "path": data.path,
        "sources": [asdict(source) for source in sources],
        "missing": missing,
        "warning": data_plan.too_often(sources, data.max_epochs),
    }


def describe(plan: Plan) -> dict[str, Any]:
    """All that is printed, as plain values: bytes, FLOPs and tokens as they are, memory in GiB, time in days."""
    model, layout, gpu, tokens = plan.model, plan.layout, plan.gpu, plan.cfg.train.tokens
    total, active = inventory.parameters(model), inventory.active_parameters(model)
    by_part = costs.train_flops(model, layout.context)
    train_flops = sum(by_part.values())
    per_gpu = costs.tokens_per_second(train_flops, gpu, plan.mfu)
    batch = layout.tokens * layout.data_parallel * layout.micro_steps
    used = memory_gib(plan)
    others = layouts(plan)
    return {
        "name": model.name,
        "total_params": sum(total.values()),
        "active_params": sum(active.values()),
        "params_by_part": {part: {"total": count, "active": active[part]} for part, count in total.items()},
        "shape": {key: getattr(model, key) for key in SHAPE},
        "bf16_bytes": file_bytes(model, "bf16"),
        "int4_bytes": file_bytes(model, "int4"),
        "kv_bytes_per_token": costs.kv_bytes_per_token(model),
        "context": layout.context,
        "train_flops_per_token": train_flops,
        "train_flops_by_part": by_part,
        "hardware_train_flops_per_token": round(costs.hardware_train_flops(model, layout)),
        "inference_flops_per_token": sum(costs.forward_flops(model, layout.context).values()),
        "layout": {
            "gpus": layout.gpus,
            "expert_parallel": layout.expert_parallel,
            "tensor_parallel": layout.tensor_parallel,
            "zero_stage": layout.zero_stage,
            "recompute": plan.cfg.train.recompute,
            "engine": "deepspeed" if layout.deepspeed else "plain",
            "micro_batch_size": layout.micro_batch_size,
            "micro_steps": layout.micro_steps,
            "global_batch_tokens": batch,
            "activation_dtype": "bfloat16" if layout.activation_bytes == 2 else "float32",
            "capacity_factor": layout.capacity_factor,
            "quantisation_aware": layout.quantised,
        },
        "optimizer_groups": optim_groups.table(model, plan.cfg.optim),
        "gpu": {"name": gpu.name, "tflops": gpu.tflops, "memory_gib": gpu.memory_gib, "source": gpu.sheet},
        "memory_gib": used,
        "fits": plan.fits(used["total"]),
        "comm_bytes_per_step": costs.communication(model, layout),
        "data": _data(plan, batch),
        "layouts": others,
        "recommendation": recommendation(plan, others),
        "tokens": tokens,
        "mfu": plan.mfu,
        "tokens_per_second_per_gpu": per_gpu,
        "seconds_per_step": batch / (per_gpu * layout.gpus),
        "days": costs.days(tokens, layout.gpus, per_gpu),
        "gpu_hours": costs.days(tokens, 1, per_gpu) * 24,
        "scale": [_scaled(plan, gpus, per_gpu) for gpus in sorted({*SCALE, layout.gpus})],
        "assumptions": list(plan.assumptions),
    }


def memory_gib(plan: Plan) -> dict[str, float]:
    """memory.memory_bytes in GiB."""
    return {part: size / memory.GIB for part, size in memory.memory_bytes(plan.model, plan.layout).items()}


def _scaled(plan: Plan, gpus: int, per_gpu: float) -> dict[str, Any]:
    """A line of the scale table: what layout or batch does not allow on so many GPUs is None, with the reason."""
    try:
        there = plan.on(gpus)
    except UserError as error:
        return {"gpus": gpus} | dict.fromkeys(SCALED) | {"why_not": str(error)}
    used = memory_gib(there)["total"]
    return {
        "gpus": gpus,
        "days": costs.days(plan.cfg.train.tokens, gpus, per_gpu),
        "memory_gib_total": used,
        "fits": plan.fits(used),
        "micro_batch_size": there.layout.micro_batch_size,
        "micro_steps": there.layout.micro_steps,
        "global_batch_tokens": there.layout.tokens * there.layout.data_parallel * there.layout.micro_steps,
        "comm_bytes_per_step_total": costs.communication(there.model, there.layout)["total"],
        "why_not": None,
    }


if __name__ == "__main__":
    sys.exit(main())

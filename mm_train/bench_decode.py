"""Tokens per second of decoding, beside plain ways of running a mixture: Python loops over experts.

python -m mm_train.bench_decode configs/model/s.yaml
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels.linear import linear
from kernels.router import route
from mm_train import config, rules
from mm_train.cli import UserError, command
from mm_train.decode import generate
from mm_train.model import MobileMoE
from mm_train.moe import MoELayer
from mm_train.release import load_release, save_release

DTYPES = (torch.bfloat16, torch.float32)


class AllExpertsLoop(MoELayer):
    """Every expert in turn asks which tokens chose it, and computes them, be there any or not."""

    def infer(self, x_TD: Tensor) -> Tensor:
        return self._loop(x_TD, range(self.model.num_local_experts))

    def _loop(self, x_TD: Tensor, experts: Iterable[int] | None) -> Tensor:
        ids_TK, weights_TK = route(self.router(x_TD), *self.routing_options())
        y_TD = torch.zeros_like(x_TD)
        for expert in ids_TK.unique().tolist() if experts is None else experts:
            token, k = torch.where(ids_TK == expert)
            gate, up = linear(x_TD[token], self.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            out = linear(torch.nn.functional.silu(gate) * up, self.experts.down_proj[expert].T)
            y_TD.index_add_(0, token, out * weights_TK[token, k, None].to(out.dtype))
        return y_TD if self.shared_expert is None else y_TD + self.shared_expert(x_TD)


class HitExpertsLoop(AllExpertsLoop):
    """The same loop over the experts that some token chose."""

    def infer(self, x_TD: Tensor) -> Tensor:
        return self._loop(x_TD, None)


# Ways to run the layer, all over the same weights with the same matrix products and the same cache.
WAYS: dict[str, type[MoELayer]] = {
    "as it is": MoELayer,
    "loop over the chosen experts": HitExpertsLoop,
    "loop over all experts": AllExpertsLoop,
}


def tokens_per_second(model: MobileMoE, prompt: list[int], tokens: int) -> float:
    """Of decoding alone: the clock starts at the first new token."""
    steps = generate(model, [prompt], tokens + 1)
    next(steps)
    begun = time.perf_counter()
    written = sum(1 for _ in steps)
    return written / (time.perf_counter() - begun)


def compare(model: MobileMoE, prompt: list[int], tokens: int, repeats: int) -> dict[str, list[float]]:
    """tokens/s of each of WAYS, measured in turns."""
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    layers = model.moe_layers()
    for _ in range(repeats):
        for way, kind in WAYS.items():
            for layer in layers:
                layer.__class__ = kind
            speeds[way].append(tokens_per_second(model, prompt, tokens))
    return speeds


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mm_train.bench_decode", description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="+", help="model file, then key=value; the weights are random")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="tokens in the cache (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=32, help="decoded in each measurement (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each way (default %(default)s)")
    args = parser.parse_args(argv)
    if min(args.prompt_tokens, args.tokens, args.repeats) < 1:
        raise UserError("--prompt-tokens, --tokens and --repeats must be at least 1")
    shape = config.load_words(args.config, check=lambda cfg: rules.validate_model(cfg.model)).model
    if not shape.num_local_experts:
        raise UserError(f"{shape.name} is dense: there are no experts to loop over")
    torch.manual_seed(0)
    prompt = torch.randint(0, shape.vocab_size, (args.prompt_tokens,)).tolist()
    with tempfile.TemporaryDirectory() as folder:
        print(f"writing {shape.name} with random weights as an int4 release ...", flush=True)
        model = MobileMoE(shape)
        model.init_weights(0)
        save_release(model, Path(folder) / "release", "int4")
        del model
        print(f"{torch.get_num_threads()} threads; tokens/s, median (lowest..highest) of {args.repeats}, and ratios")
        for dtype in DTYPES:
            model = load_release(Path(folder) / "release", dtype, "cuda" if torch.cuda.is_available() else "cpu")
            print(f"weights in {str(dtype).removeprefix('torch.')}")
            show(compare(model, prompt, args.tokens, args.repeats))
            del model
    return 0


def show(speeds: dict[str, list[float]]) -> None:
    """One line a way; ratios are medians over measurements that followed each other."""
    (_, ours), *_ = speeds.items()
    for way, values in speeds.items():
        ratio = statistics.median(a / b for a, b in zip(ours, values, strict=True))
        span = f"({min(values):.1f}..{max(values):.1f})"
        print(f"  {way:30s} {statistics.median(values):6.1f} {span:16s} 1 / {ratio:.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

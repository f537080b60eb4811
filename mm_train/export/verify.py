"""Compare what was exported with what was trained: codes and scales bit for bit, then what both say of real text.

python -m mm_train.export verify runs/quickstart/export --reference runs/quickstart/qat

The reference is the checkpoint as training computed with it: int4 weights, and int8 activations if it was trained so.
Runtimes round activations in ways of their own (transformers and this project's releases not at all, llama.cpp in
blocks of 32), which is why its log-probabilities are also compared with those of the reference without activations
rounded: the first difference is what a device makes of the model, the second one shows that it is the same model.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mm_train import inventory
from mm_train.cli import UserError, command
from mm_train.export.runtimes import Ours, Runtime, gguf_file, pte_file, runtimes
from mm_train.export.source import ExportSource
from mm_train.files import write_atomic
from mm_train.model_folder import find_tokenizer, load_model
from mm_train.release_format import stored_tensors
from mm_train.tokenizer import Tokenizer, load_tokenizer


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mm_train.export verify", description="Compare an artefact with the checkpoint it was made of."
    )
    parser.add_argument("artefact", type=Path, help="release folder, or .gguf or .pte file or folder")
    parser.add_argument("--reference", type=Path, required=True, help="run or checkpoint folder it was exported from")
    parser.add_argument("--prompts", type=Path, help="text file to read (default: this project's own README.md)")
    parser.add_argument("--num-prompts", type=int, default=20, help="pieces of it (default %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=1024, help="of the longest (default %(default)s, or all there is room for)"
    )
    parser.add_argument("--positions", type=int, default=16, help="of each that are compared (default %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, help="written on from each (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of llama.cpp (default %(default)s)")
    parser.add_argument("--out", type=Path, help="also write the numbers to this JSON file")
    args = parser.parse_args(argv)
    if args.num_prompts < 1 or args.positions < 1 or args.new_tokens < 0 or args.threads < 1:
        raise UserError(
            f"--num-prompts {args.num_prompts}, --positions {args.positions}, --new-tokens {args.new_tokens},"
            f" --threads {args.threads}: at least 1, 1, 0, 1"
        )
    source = ExportSource(args.reference)
    found: dict[str, Any] = {"codes": compare_codes(args.artefact, source)}
    differ = found["codes"]["differ"]
    print(f"codes and scales: {found['codes']['equal']} tensors equal bit for bit, {len(differ)} not")
    for name in differ:
        print(f"  differs: {name}")
    if "note" in found["codes"]:
        print(found["codes"]["note"])
    if not found["codes"]["equal"] and not differ:
        print("  there is no int4 tensor in it: only what both say of text is compared")
    prompts = read_prompts(args, load_tokenizer(find_tokenizer(args.reference)), source)
    print(f"{len(prompts)} prompts of {len(prompts[0])} to {len(prompts[-1])} tokens, {args.new_tokens} more of each:")
    found["runtimes"] = compare_runtimes(args, prompts)
    for name, numbers in found["runtimes"].items():
        print(f"{name}:")
        for reference, values in numbers.items():
            print(f"  against {reference}: " + ", ".join(f"{key} {value:.6g}" for key, value in values.items()))
    if args.out:
        try:
            write_atomic(args.out, (json.dumps(found, indent=1) + "\n").encode())
        except OSError as error:
            raise UserError(f"cannot write {args.out}: {error.strerror or error}") from None
    return 1 if differ else 0


def compare_codes(artefact: Path, source: ExportSource) -> dict[str, Any]:
    """Every int4 tensor of an artefact against the reference's: how many are equal, and the names of those that differ.

    Where some tensors are int4, those that should be and are not differ too. An artefact of floats has none of both.
    Raises UserError when the artefact is of another network, or its groups lie along another axis.
    """
    if (pte := pte_file(artefact)) is not None:
        from mm_train.pte.int4 import NOTE, compare

        there = compare(pte, source)
        missing = sorted(name for name, found in there.items() if not found)
        return {"equal": len(there) - len(missing), "differ": missing, "note": NOTE}
    equal, differ, seen = 0, [], set()
    for name, codes, scales, axis in stored_int4(artefact, source):
        seen.add(name)
        expected = source.int4(name, axis)
        if torch.equal(codes, expected[0]) and torch.equal(scales, expected[1]):
            equal += 1
        else:
            differ.append(name)
    wanted = {stored.source for stored in stored_tensors(source.shape, "int4") if stored.role == "codes"}
    return {"equal": equal, "differ": differ + (sorted(wanted - seen) if seen else [])}


def stored_int4(artefact: Path, source: ExportSource) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, int]]:
    """(tensor of the network, codes, scales, axis of its groups) of every int4 tensor in an artefact's files."""
    if (gguf := gguf_file(artefact)) is not None:
        from mm_train.gguf.int4 import int4_tensors

        yield from int4_tensors(gguf, source.shape)
        return
    stored = ExportSource(artefact)
    if stored.expert_axis is None:
        return  # bf16
    for entry in inventory.tensors(source.shape):
        if stored.is_int4(entry.name):
            yield (entry.name, *stored.codes(entry.name), -1)


def read_prompts(args: argparse.Namespace, tokenizer: Tokenizer, source: ExportSource) -> list[list[int]]:
    """Pieces of real text from all over it, each with BOS: the last one is the longest, and the others are as long as
    divides it evenly. Raises UserError when there is too little of it."""
    path = args.prompts or Path(__file__).resolve().parents[2] / "README.md"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompts from {path}: {error}") from None
    room = source.shape.max_position_embeddings - args.new_tokens
    longest = min(args.tokens, room)
    ids = tokenizer.encode(text)
    if not 2 <= longest <= len(ids) + 1:
        raise UserError(
            f"{path} has {len(ids)} tokens: too few for a prompt of --tokens {args.tokens} (at most {room} here)"
        )
    prompts = []
    for number in range(args.num_prompts):
        length = max(2, longest * (number + 1) // args.num_prompts)
        start = (len(ids) - longest + 1) * number // args.num_prompts
        prompts.append([tokenizer.bos_id, *ids[start : start + length - 1]])
    return prompts


def compare_runtimes(args: argparse.Namespace, prompts: list[list[int]]) -> dict[str, dict[str, dict[str, float]]]:
    """Runtime -> reference -> how far its log-probabilities are apart, and how much of its greedy text is the same."""
    model = load_model(args.reference)
    references: dict[str, Runtime] = {"the reference": Ours(model)}
    quants: list[Any] = [getattr(module, "fake_quant", None) for module in model.modules()]
    if any(quant and quant.activations_int8 for quant in quants):
        references["it without int8 activations"] = Ours(without_int8_activations(load_model(args.reference)))
    room = max(map(len, prompts)) + args.new_tokens
    places = [sorted({int(p) for p in np.linspace(0, len(prompt) - 1, args.positions).round()}) for prompt in prompts]
    asked = list(zip(prompts, places, strict=True))
    expected = {
        label: (
            np.concatenate([reference.log_probs(*question) for question in asked]),
            [reference.greedy(prompt, args.new_tokens) for prompt in prompts if args.new_tokens],
        )
        for label, reference in references.items()
    }
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, runtime in runtimes(args.artefact, room, args.threads).items():
        theirs = [runtime.log_probs(*question) for question in tqdm(asked, desc=name, unit="prompt")]
        texts = [runtime.greedy(prompt, args.new_tokens) for prompt in tqdm(prompts, desc=f"{name}, greedy")]
        found[name] = {}
        for label, (ours, written) in expected.items():
            found[name][label] = values = distance(ours, np.concatenate(theirs))
            if args.new_tokens:
                values |= agreement(references[label], prompts, written, texts)
    return found


def without_int8_activations(model: Any) -> Any:
    """The model with its weights still rounded, and its activations left alone."""
    for module in model.modules():
        if getattr(module, "fake_quant", None):
            module.fake_quant = dataclasses.replace(module.fake_quant, activations_int8=False)
    return model


def distance(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Log-probabilities [N, V] of two models for the same positions, in nats."""
    probabilities = np.exp(ours.astype(np.float64))
    return {
        "max |d log p|": float(np.abs(ours - theirs).max()),
        "mean |d log p|": float((probabilities * np.abs(ours - theirs)).sum(-1).mean()),
        "KL": float((probabilities * (ours - theirs)).sum(-1).mean()),
        "top-1 agreement": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
    }


def agreement(
    reference: Runtime, prompts: list[list[int]], expected: list[list[int]], texts: list[list[int]]
) -> dict[str, float]:
    """How much of greedy texts is what the reference writes: whole texts, and tokens before the first that differs;
    and how many nats less than its own token the reference gives the other one there, at most: little, where rounding
    decides between near equals."""
    same, gap = [], 0.0
    for prompt, one, other in zip(prompts, expected, texts, strict=True):
        number = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
        same.append(number)
        if number < len(one):
            tokens = prompt + one[:number]
            (log_probs,) = reference.log_probs(tokens, [len(tokens) - 1])
            gap = max(gap, float(log_probs[one[number]] - log_probs[other[number]]))
    return {
        "equal texts": float(sum(number == len(one) for number, one in zip(same, expected, strict=True))),
        "of": float(len(texts)),
        "equal tokens before a difference": float(np.mean(same)),
        "largest gap there": gap,
    }

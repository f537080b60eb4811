"""What a release folder says: the keys of its config.json, and name, dtype and shape of every tensor. Torch-free.

Two formats: bf16, and mobilemoe-int4-g32 as in the published MobileMoE checkpoints. release.py reads and writes them.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple

from mm_train import config, inventory
from mm_train.cli import UserError
from mm_train.rules import INT4_GROUP, validate_model

FORMATS = ("bf16", "int4")
INT4 = "mobilemoe-int4-g32"
MARK = "mobilemoe_train"  # key of config.json that says who wrote the folder, and from what
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
METADATA = {"format": "pt"}
QUANTIZATION = {
    "format": INT4,
    "group_size": INT4_GROUP,
    "embedding_group_size": INT4_GROUP,
    "qmin": -8,
    "qmax": 7,
    "symmetric": True,
    "scale_dtype": "float16",
    "linear_group_axis": "in (last dim of [out, in])",
    "expert_group_axis": "out (last dim of [E, in, out])",
    "packed": True,
}
# What every config.json of these networks says, and this implementation takes for granted.
CONSTANTS = {
    "model_type": "mobilemoe",
    "architectures": ["MobileMoEForCausalLM"],
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "attn_temperature_tuning": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
EVERY_LAYER = {"no_rope_layers": 1, "layer_types": "full_attention"}  # lists of one such value a layer
# What stays unquantised in both formats, and its dtype there.
KEPT = {"router.weight": "F32", "expert_bias": "BF16", "norm.weight": "BF16"}
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1}


class Stored(NamedTuple):
    """A tensor as it lies in the file."""

    name: str
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    source: str  # the network's tensor that it holds, whole or in part
    role: str  # plain | codes | scales

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]


def stored_tensors(model: config.Model, format: str) -> Iterator[Stored]:
    """Every tensor of a release of `format`, as this project writes it."""
    for entry in inventory.tensors(model):
        kept = next((dtype for suffix, dtype in KEPT.items() if entry.name.endswith(suffix)), None)
        if kept or format == "bf16":
            yield Stored(entry.name, kept or "BF16", entry.shape, entry.name, "plain")
            continue
        code_name, scale_name = int4_names(entry.name)
        *outer, length = entry.shape
        yield Stored(code_name, "U8", (*outer, length // 2), entry.name, "codes")
        yield Stored(scale_name, "F16", (*outer, length // INT4_GROUP), entry.name, "scales")


def int4_names(name: str) -> tuple[str, str]:
    """experts.down_proj -> experts.down_qweight, experts.down_scale; q_proj.weight -> q_proj.qweight, .weight_scale."""
    if name.endswith("_proj"):
        stem = name.removesuffix("_proj")
        return f"{stem}_qweight", f"{stem}_scale"
    stem = name.removesuffix(".weight")
    return f"{stem}.qweight", f"{stem}.weight_scale"


def readable_dtypes(stored: Stored) -> tuple[str, ...]:
    """dtypes that a reader accepts: other writers may keep router, bias and unquantised weights in float32 or bf16."""
    if stored.role == "plain":
        return ("F32", "BF16")
    return (stored.dtype,)


def file_layout(tensors: Iterable[Stored]) -> tuple[bytes, dict[str, int]]:
    """What a safetensors file of these tensors starts with, and the offset in the file of each.

    As the library lays it out: 8 bytes, the header padded to 8, the widest dtypes first, those of one dtype by name.
    """
    order = ["F32", "BF16", "F16", "U8"]
    header: dict[str, Any] = {"__metadata__": METADATA}
    places: dict[str, int] = {}
    end = 0
    for tensor in sorted(tensors, key=lambda t: (order.index(t.dtype), t.name)):
        start, end = end, end + tensor.bytes
        places[tensor.name] = start
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in places.items()}


def file_bytes(model: config.Model, format: str) -> int:
    """Exact length of the weights as one safetensors file."""
    tensors = list(stored_tensors(model, format))
    return len(file_layout(tensors)[0]) + sum(tensor.bytes for tensor in tensors)


def release_config(model: config.Model, format: str, facts: dict[str, Any]) -> dict[str, Any]:
    """config.json of a release, with every key of the published checkpoints; `facts` go under MARK."""
    values = asdict(model)
    del values["name"], values["initializer_range"]
    if model.scoring_func == "sigmoid":
        del values["scoring_func"]  # the published checkpoints do not say it
    values |= CONSTANTS | {key: [value] * model.num_hidden_layers for key, value in EVERY_LAYER.items()}
    values |= {"torch_dtype": "bfloat16", MARK: {"name": model.name, **facts}}
    if format == "int4":
        values["quantization"] = QUANTIZATION
    return values


def model_config(values: dict[str, Any], path: Path, int4: bool) -> config.Model:
    """The network that a config.json describes, of an `int4` release or a bf16 one.

    Values are taken as they are, never converted or interpolated.

    Raises UserError for a missing key, a value of the wrong type or range, and a key that describes another network.
    """
    if values.get("model_type") != "mobilemoe":
        raise UserError(f"{path}: model_type is {values.get('model_type')!r:.60}; it must be 'mobilemoe'")
    values = _separate_rope(values, path)
    known: dict[str, Any] = {}
    for field in fields(config.Model):
        if field.name in values and field.name not in ("name", "rope_scaling"):
            known[field.name] = _typed(values[field.name], field.type, field.name, path)
        elif field.name not in values and field.name not in ("name", "initializer_range", "scoring_func"):
            raise UserError(f"{path} lacks the key {field.name}")
    mark = values.get(MARK)
    name = mark.get("name") if isinstance(mark, dict) else None
    known["name"] = name if isinstance(name, str) else path.parent.name
    model = config.Model(**known, rope_scaling=_rope_scaling(values["rope_scaling"], path))
    try:
        validate_model(model, int4)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    for key, value in CONSTANTS.items():
        if key in values and values[key] != value:
            raise UserError(f"{path}: {key} is {values[key]!r:.60}; it must be {value!r:.60}")
    for key, value in EVERY_LAYER.items():
        found, layers = values.get(key), model.num_hidden_layers
        right = isinstance(found, list) and len(found) == layers and all(item == value for item in found)
        if key in values and not right:
            raise UserError(f"{path}: {key} is {found!r:.60}; it must be {layers} times {value!r}")
    return model


def _typed(value: Any, kind: Any, key: str, path: Path) -> Any:
    """`value` if it is of type `kind`; whole numbers serve as float."""
    right = type(value) is kind or (kind is float and type(value) is int and abs(value) < 2**53)
    if not right:
        raise UserError(f"{path}: {key} is {value!r:.60}; it must be of type {kind.__name__}")
    return kind(value)


def _rope_scaling(scaling: Any, path: Path) -> config.RopeScaling | None:
    if scaling is None:
        return None
    if not isinstance(scaling, dict):
        raise UserError(f"{path}: rope_scaling is {scaling!r:.60}; it must be a mapping or null")
    kinds = {field.name: field.type for field in fields(config.RopeScaling)}
    for key in kinds:
        if key not in scaling:
            raise UserError(f"{path}: rope_scaling lacks the key {key}")
    return config.RopeScaling(**{k: _typed(scaling[k], kind, f"rope_scaling.{k}", path) for k, kind in kinds.items()})


def _separate_rope(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """transformers 5 writes rope_theta and rope_scaling as one mapping, rope_parameters."""
    joined = values.get("rope_parameters")
    if joined is None:
        return values
    if not isinstance(joined, dict):
        raise UserError(f"{path}: rope_parameters is {joined!r:.60}; it must be a mapping")
    scaling = {key: value for key, value in joined.items() if key != "rope_theta"}
    separate: dict[str, Any] = {"rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling}
    if "rope_theta" in joined:
        separate["rope_theta"] = joined["rope_theta"]
    for key, value in separate.items():
        if values.get(key) is not None and values[key] != value:
            raise UserError(f"{path}: rope_parameters says {value!r:.60} of {key}, which itself is {values[key]!r:.60}")
    return values | separate


def check_quantization(values: dict[str, Any], path: Path) -> bool:
    """Does config.json describe an int4 release? Raises UserError for any other quantisation."""
    if values.get("quantization_config") is not None:
        raise UserError(f"{path}: quantization_config is another program's format; this one reads {INT4} and bf16")
    quantization = values.get("quantization")
    if quantization is None:
        return False
    if not isinstance(quantization, dict):
        raise UserError(f"{path}: quantization is {quantization!r:.60}; it must be a mapping")
    for key, value in QUANTIZATION.items():
        if quantization.get(key) != value or isinstance(quantization.get(key), bool) is not isinstance(value, bool):
            raise UserError(f"{path}: quantization.{key} is {quantization.get(key)!r:.60}; this format has {value!r}")
    return True

"""Release folders: config.json + model.safetensors in bf16 or mobilemoe-int4-g32, in the released checkpoints' layout.

save_release(model, "out/", format="int4", tokenizer=load_tokenizer("data/quickstart"))
model = load_release("out/")
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mm_train import checkpoint, config
from mm_train.cli import UserError
from mm_train.files import publish
from mm_train.model import MobileMoE
from mm_train.quant import GROUP, QMAX, QMIN, FakeQuant, dequantise, enable_fake_quant, pack, quantise, unpack
from mm_train.tokenizer import Tokenizer, load_tokenizer

INT4 = "mobilemoe-int4-g32"
MARK = "mobilemoe_train"  # key of config.json that says who wrote the folder, and from what
QUANTIZATION = {
    "format": INT4,
    "group_size": GROUP,
    "embedding_group_size": GROUP,
    "qmin": QMIN,
    "qmax": QMAX,
    "symmetric": True,
    "scale_dtype": "float16",
    "linear_group_axis": "in (last dim of [out, in])",
    "expert_group_axis": "out (last dim of [E, in, out])",
    "packed": True,
}
# What stays unquantised in both formats, and its dtype there.
KEPT = {"router.weight": torch.float32, "expert_bias": torch.bfloat16, "norm.weight": torch.bfloat16}


def save_release(
    model: MobileMoE, path: str | Path, format: str = "bf16", tokenizer: Tokenizer | None = None, **facts: object
) -> Path:
    """Write a release folder and return its weight file. The folder appears whole or not at all.

    `format` is "bf16" or "int4"; `facts` go into config.json beside the architecture (for example where it came from).
    Raises UserError for another format, non-finite weights or an existing non-release folder at `path`.
    """
    if format not in ("bf16", "int4"):
        raise UserError(f"unknown release format {format!r}; it must be bf16 or int4")
    path = Path(path)
    if path.exists() and not _is_ours(path):
        raise UserError(f"{path} exists and was not written by this project: choose another place, or remove it")
    tensors = release_tensors(dict(model.state_dict()), format)
    partial, old = path.with_name(path.name + ".partial"), path.with_name(path.name + ".old")
    try:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        values = release_config(model.config, format, tokenizer, facts)
        (partial / "config.json").write_text(json.dumps(values, indent=2))
        if tokenizer is not None:
            tokenizer.save(partial)
        if path.exists():
            os.replace(path, old)
        publish(partial, path)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"cannot write the release to {path}: {getattr(error, 'strerror', None) or error}") from None
    return path / "model.safetensors"


def _is_ours(path: Path) -> bool:
    """Is this an empty folder or a release that this project wrote, so that it may be replaced?"""
    if not path.is_dir():
        return False
    try:
        return not any(path.iterdir()) or MARK in json.loads((path / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def release_tensors(state: dict[str, Tensor], format: str) -> dict[str, Tensor]:
    """Tensors of a model in the names and dtypes of the release format."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        kept = next((dtype for suffix, dtype in KEPT.items() if name.endswith(suffix)), None)
        if kept is not None:
            out[name] = tensor.to(kept)
        elif format == "bf16":
            out[name] = tensor.to(torch.bfloat16)
        else:
            codes, scales = quantise(tensor)
            code_name, scale_name = _int4_names(name)
            out[code_name], out[scale_name] = pack(codes).contiguous(), scales.contiguous()
    return {name: tensor.cpu().contiguous() for name, tensor in out.items()}


def _int4_names(name: str) -> tuple[str, str]:
    """experts.down_proj -> experts.down_qweight, experts.down_scale; q_proj.weight -> q_proj.qweight, .weight_scale."""
    if name.endswith("_proj"):
        stem = name.removesuffix("_proj")
        return f"{stem}_qweight", f"{stem}_scale"
    stem = name.removesuffix(".weight")
    return f"{stem}.qweight", f"{stem}.weight_scale"


def release_config(model: config.Model, format: str, tokenizer: Tokenizer | None, facts: dict) -> dict:
    """config.json of the release, with every key of the released checkpoints."""
    values = asdict(model)
    del values["name"], values["initializer_range"]
    values |= constants(model.num_hidden_layers)
    values |= {"torch_dtype": "bfloat16", MARK: {"name": model.name, **facts}}
    if tokenizer is not None:
        values |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.stop_ids)}
    if format == "int4":
        values["quantization"] = QUANTIZATION
    return values


def constants(num_layers: int) -> dict[str, object]:
    """What every MobileMoE config.json says about the network, and this implementation takes for granted."""
    return {
        "model_type": "mobilemoe",
        "architectures": ["MobileMoEForCausalLM"],
        "interleave_moe_layer_step": 1,
        "no_rope_layers": [1] * num_layers,
        "layer_types": ["full_attention"] * num_layers,
        "use_qk_norm": True,
        "attn_temperature_tuning": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }


def load_release(path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> MobileMoE:
    """Model of a release folder, bf16 or int4 (dequantised), in eval mode; `dtype` is that of the activations.

    Raises UserError for a missing or unreadable file, a tensor that is missing, unknown or of the wrong shape, and
    an unknown quantisation format.
    """
    path = Path(path)
    values = _read_json(path / "config.json")
    quantization = values.get("quantization")
    if quantization is not None and {k: quantization.get(k) for k in QUANTIZATION} != QUANTIZATION:
        wrong = next(k for k in QUANTIZATION if quantization.get(k) != QUANTIZATION[k])
        raise UserError(
            f"{path}: quantization.{wrong} is {quantization.get(wrong)!r}; this format has {QUANTIZATION[wrong]!r}"
        )
    model = MobileMoE(model_config(values, path), dtype)
    try:
        stored = load_file(path / "model.safetensors")
    except FileNotFoundError:
        raise UserError(f"{path} has no model.safetensors") from None
    except SafetensorError as error:
        raise UserError(f"{path / 'model.safetensors'} is damaged: {error}") from None
    load_state(model, _plain(stored, model) if quantization else _own_names(stored), str(path))
    return model.to(device).eval()


def load_model(path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> MobileMoE:
    """Model of a release folder, a run folder (its latest checkpoint) or a checkpoint folder, in eval mode.

    A checkpoint of quantisation-aware training computes as in training, with fake-quantised weights and activations.
    """
    path = Path(path)
    if (path / "model.safetensors").is_file():
        return load_release(path, dtype, device)
    if not path.is_dir():
        raise UserError(f"model folder not found: {path}")
    reader = checkpoint.Reader(checkpoint.find(path))
    model = MobileMoE(reader.model_config, dtype)
    load_state(model, reader.weights(), str(reader.folder))
    if reader.run_config.quant.enabled:
        enable_fake_quant(model, FakeQuant.of(reader.run_config.quant))
    return model.to(device).eval()


def find_tokenizer(path: str | Path) -> Path:
    """Folder of the tokenizer of a release, run or checkpoint folder. Raises UserError when there is none."""
    path = Path(path)
    for folder in (path, path.parent.parent):  # a checkpoint lies two levels below its run
        if (folder / "tokenizer.json").is_file():
            return folder
    raise UserError(f"{path} has no tokenizer.json")


def check_same_tokenizer(model_folder: Path, tokenizer: Tokenizer, data_folder: str | Path) -> None:
    """Raise UserError when a model folder and a data set have different tokenizers: its weights would mean nothing."""
    theirs = load_tokenizer(find_tokenizer(model_folder)).sha256
    if theirs != tokenizer.sha256:
        raise UserError(
            f"{model_folder} was trained with another tokenizer ({theirs[:12]}) than {data_folder} has"
            f" ({tokenizer.sha256[:12]}): use the data set it was trained on, or train it anew"
        )


def load_weights(model: MobileMoE, path: Path) -> None:
    """Copy the weights of a release, run or checkpoint folder into `model`, for a new stage."""
    source = load_model(path)
    difference = config.model_difference(model.config, source.config)
    if difference:
        raise UserError(f"init_from {path} is another model: {difference}")
    load_state(model, dict(source.state_dict()), str(path))


def model_config(values: dict, path: Path) -> config.Model:
    """Model section of a config.json. Raises UserError for a key that describes another network."""
    known = {key: values[key] for key in asdict(config.Model()) if key in values}
    known["name"] = values.get(MARK, {}).get("name", path.name)
    model = config.from_dict({"model": known}, str(path / "config.json")).model
    for key, value in constants(model.num_hidden_layers).items():
        if key == "model_type" or key in values:
            found = values.get(key)
            if found != value:
                raise UserError(f"{path}: {key} is {found!r:.60}; it must be {value!r:.60}")
    return model


def load_state(model: MobileMoE, state: dict[str, Tensor], origin: str) -> None:
    """Copy tensors into `model`. Raises UserError that names the first missing, unknown or misshapen one."""
    own = dict(model.state_dict())
    for name in own:
        if name not in state:
            raise UserError(f"{origin}: tensor {name} is missing")
    for name, tensor in state.items():
        if name not in own:
            raise UserError(f"{origin}: unknown tensor {name}")
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{origin}: tensor {name} has shape {tuple(tensor.shape)}; this model has {tuple(own[name].shape)}"
            )
        with torch.no_grad():
            own[name].copy_(tensor)


def _own_names(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """bf16 tensors under the model's own names: other writers may put `.weight` behind the expert tensors."""
    return {
        name.removesuffix(".weight") if ".experts." in name and name.endswith("_proj.weight") else name: tensor
        for name, tensor in stored.items()
    }


def _plain(stored: dict[str, Tensor], model: MobileMoE) -> dict[str, Tensor]:
    """int4 tensors -> float32 tensors under the model's own names; anything else passes through."""
    plain = dict(stored)
    for name in model.state_dict():
        code_name, scale_name = _int4_names(name)
        if code_name in plain and scale_name in plain:
            codes, scales = unpack(plain.pop(code_name)), plain.pop(scale_name)
            if (*codes.shape[:-1], codes.shape[-1] // GROUP) != scales.shape:
                raise UserError(
                    f"tensor {scale_name} has shape {tuple(scales.shape)}; codes {tuple(codes.shape)} need"
                    f" {(*codes.shape[:-1], codes.shape[-1] // GROUP)}"
                )
            plain[name] = dequantise(codes, scales)
    return plain


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"not a release folder: {path} not found") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None

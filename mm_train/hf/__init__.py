"""Hugging Face interoperability: the code that travels in every release folder, and its registration.

    mm_train.hf.register()      # then AutoModelForCausalLM.from_pretrained(FOLDER) needs no trust_remote_code

Torch-free and transformers-free until `register` is called.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm_train.cli import UserError

MODEL_TYPE = "mobilemoe"
# Key `auto_map` of a release's config.json: which class of which file in the folder transformers shall load.
AUTO_MAP = {
    "AutoConfig": "configuration_mobilemoe.MobileMoEConfig",
    "AutoModel": "modeling_mobilemoe.MobileMoEModel",
    "AutoModelForCausalLM": "modeling_mobilemoe.MobileMoEForCausalLM",
}


def code_files() -> list[Path]:
    """The two files that a release folder carries, to be copied as they are."""
    folder = Path(__file__).parent
    return [folder / "configuration_mobilemoe.py", folder / "modeling_mobilemoe.py"]


def generation_config(bos: int, stops: Sequence[int], pad: int) -> dict[str, Any]:
    """Contents of generation_config.json: the token ids that `generate` needs. Decoding stays greedy unless asked."""
    return {"bos_token_id": bos, "eos_token_id": list(stops), "pad_token_id": pad}


def register() -> None:
    """Make transformers' Auto classes know MobileMoE, so that folders load without trust_remote_code.

    May be called any number of times. Raises UserError when transformers 5 is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise UserError("transformers is not installed: pip install 'mobilemoe-train[hf]'") from None
    if int(transformers.__version__.split(".")[0]) < 5:
        raise UserError(
            f"transformers {transformers.__version__} is too old, it must be 5.0 or newer:"
            " pip install 'mobilemoe-train[hf]'"
        )
    from mm_train.hf.configuration_mobilemoe import MobileMoEConfig
    from mm_train.hf.modeling_mobilemoe import MobileMoEForCausalLM, MobileMoEModel

    transformers.AutoConfig.register(MODEL_TYPE, MobileMoEConfig, exist_ok=True)
    transformers.AutoModel.register(MobileMoEConfig, MobileMoEModel, exist_ok=True)
    transformers.AutoModelForCausalLM.register(MobileMoEConfig, MobileMoEForCausalLM, exist_ok=True)
    # save_pretrained then copies the code, so that what is saved loads elsewhere, too.
    MobileMoEConfig.register_for_auto_class()
    MobileMoEModel.register_for_auto_class("AutoModel")
    MobileMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")

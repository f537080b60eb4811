"""Configuration of MobileMoE (arXiv 2605.27358) for transformers 5. Self-contained: copied into release folders."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

INT4_FORMAT = "mobilemoe-int4-g32"
INT4_GROUP = 32  # weights that share an fp16 scale
# The key `quantization` of an int4 release; what a file says of these must be this.
INT4_LAYOUT = {
    "format": INT4_FORMAT,
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
ROPE_SCALING_KEYS = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")


class MobileMoEConfig(PreTrainedConfig):
    """Shape of a MobileMoE network; the defaults are size S. Raises ValueError for what the code does not implement.

    Args:
        intermediate_size: hidden width of one routed expert.
        intermediate_size_mlp: hidden width of the shared expert (0: there is none), or of a dense network's MLP.
        num_local_experts: routed experts of a layer; 0: a dense network.
        scoring_func: "sigmoid" or "softmax" (over all experts) on the router's logits.
        routed_scaling_factor: factor on the weights of the chosen experts.
        norm_topk_prob: divide the scores of the chosen experts by their sum.
        rope_scaling: None, or Llama-3 frequency scaling. Equal low and high factors are a hard switch.
        rope_parameters: theta and scaling in one, as transformers 5 writes them; stands for the two others.
        quantization: None, or the layout of the int4 tensors in the file (`INT4_LAYOUT`). Weights are dequantised once,
            after loading; the loaded model's config then says None.
    """

    model_type = "mobilemoe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    # In the base class this is another name for `rope_parameters`, which transformers standardises and validates: equal
    # factors would be a warning there. Here it is an attribute like any other, written as the release writes it.
    rope_scaling = None

    def __init__(
        self,
        vocab_size: int = 128256,
        hidden_size: int = 768,
        intermediate_size: int = 384,
        intermediate_size_mlp: int = 1536,
        num_hidden_layers: int = 20,
        num_attention_heads: int = 12,
        num_key_value_heads: int = 4,
        head_dim: int = 64,
        num_local_experts: int = 60,
        num_experts_per_tok: int = 4,
        scoring_func: str = "sigmoid",
        routed_scaling_factor: float = 2.5,
        norm_topk_prob: bool = True,
        rms_norm_eps: float = 1e-5,
        rope_theta: float | None = None,
        rope_scaling: dict[str, Any] | None = None,
        rope_parameters: dict[str, Any] | None = None,
        max_position_embeddings: int = 8192,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        pad_token_id: int | None = None,
        quantization: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.intermediate_size_mlp = intermediate_size_mlp
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.num_local_experts = num_local_experts
        self.num_experts_per_tok = num_experts_per_tok
        self.scoring_func = scoring_func
        self.routed_scaling_factor = routed_scaling_factor
        self.norm_topk_prob = norm_topk_prob
        self.rms_norm_eps = rms_norm_eps
        if rope_parameters is not None:
            rope_theta, rope_scaling = _separate_rope(rope_parameters, rope_theta, rope_scaling)
        self.rope_theta = 500000.0 if rope_theta is None else rope_theta
        self.rope_scaling = _checked_scaling(rope_scaling)
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.quantization = quantization
        if scoring_func not in ("sigmoid", "softmax"):
            raise ValueError(f"scoring_func is {scoring_func!r}; it must be 'sigmoid' or 'softmax'")
        for key, value in INT4_LAYOUT.items():
            if quantization is not None and quantization.get(key) != value:
                raise ValueError(f"quantization.{key} is {quantization.get(key)!r}; this code reads {value!r}")
        # What every MobileMoE has. It is written down, so that other programs need not assume it.
        constants = {
            "interleave_moe_layer_step": 1,
            "no_rope_layers": [1] * num_hidden_layers,  # 1: the layer has RoPE
            "layer_types": ["full_attention"] * num_hidden_layers,
            "use_qk_norm": True,
            "attn_temperature_tuning": False,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
        }
        for key, value in constants.items():
            if kwargs.setdefault(key, value) != value:
                raise ValueError(f"{key} is {kwargs[key]!r:.60}; this code implements {value!r:.60}")
        super().__init__(**kwargs)


def _separate_rope(
    joined: dict[str, Any], theta: float | None, scaling: dict[str, Any] | None
) -> tuple[float | None, dict[str, Any] | None]:
    """rope_theta and rope_scaling out of rope_parameters. Raises ValueError when they are given too and differ."""
    found_theta = joined.get("rope_theta", theta)
    found = _checked_scaling(None if joined.get("rope_type", "default") == "default" else joined)
    if (theta is not None and theta != found_theta) or (scaling is not None and _checked_scaling(scaling) != found):
        raise ValueError(f"rope_parameters {joined!r:.80} contradicts rope_theta {theta}, rope_scaling {scaling!r:.80}")
    return found_theta, found


def _checked_scaling(scaling: dict[str, Any] | None) -> dict[str, Any] | None:
    """Llama-3 scaling without foreign keys, or None. Raises ValueError for another kind or a missing value."""
    if scaling is None:
        return None
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind != "llama3":
        raise ValueError(f"rope_scaling.rope_type is {kind!r}; this code implements 'llama3'")
    missing = [key for key in ROPE_SCALING_KEYS if key not in scaling]
    if missing:
        raise ValueError(f"rope_scaling lacks {', '.join(missing)}")
    return {"rope_type": "llama3"} | {key: scaling[key] for key in ROPE_SCALING_KEYS}

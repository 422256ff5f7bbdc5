"""Megatron's command line, as it is saved in checkpoints, as our model section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.config import ModelConfig, RotaryScaling

# Settings of models that we do not compute, with the value at which they do nothing.
_REFUSED: dict[str, Any] = {
    "num_experts": None,
    "multi_latent_attention": False,
    "rotary_interleaved": False,
    "squared_relu": False,
    "quick_gelu": False,
    "quick_geglu": False,
    "activation_func_clamp_value": None,
    "qk_l2_norm": False,
    "attention_output_gate": False,
    "apply_layernorm_1p": False,
    "apply_residual_connection_post_layernorm": False,
    "window_size": None,
    "mtp_num_layers": None,
    "softmax_type": "vanilla",
    "embed_layernorm": False,
    "no_rope_freq": None,
    "is_hybrid_model": False,
    "mup": False,
}


def model_of(args: Mapping[str, Any], rows: int) -> ModelConfig:
    """The model that Megatron-LM (or Megatron-DeepSpeed, whose names differ here and there) makes of `args`.

    Args:
        rows: of the embedding, the vocabulary's padding included; the vocabulary where `args` does not say.

    Raises:
        CheckpointError: we do not compute it; the message names the setting.
    """
    for name, nothing in _REFUSED.items():
        if (value := args.get(name)) not in (nothing, None, False) and value != [1]:
            raise CheckpointError(f"the checkpoint's settings: {name} is {value}, which is not supported")
    try:
        return ModelConfig(**_values(args, rows))
    except KeyError as error:
        raise CheckpointError(
            f"the checkpoint's settings do not say {error}; give the model with --config"
        ) from None
    except ValidationError as error:
        raise CheckpointError(f"the checkpoint's settings make no model of ours: {error}") from error


def _values(args: Mapping[str, Any], rows: int) -> dict[str, Any]:
    heads, hidden = args["num_attention_heads"], args["hidden_size"]
    groups = args.get("num_key_value_heads") or (
        args.get("num_query_groups") if args.get("group_query_attention") else None
    )
    # --num-experts of Megatron-DeepSpeed is a list, which is [1] for a dense model.
    vocabulary = args.get("vocab_size")
    if not vocabulary or vocabulary > rows:
        vocabulary = rows
    bias = bool(args.get("add_bias_linear", True))
    rms = str(args.get("normalization", "LayerNorm")).lower() == "rmsnorm"
    return {
        "num_layers": args["num_layers"],
        "hidden_size": hidden,
        "ffn_hidden_size": args.get("ffn_hidden_size") or 4 * hidden,
        "num_attention_heads": heads,
        "num_query_groups": groups or heads,
        "kv_channels": args.get("kv_channels") or hidden // heads,
        "seq_length": args["seq_length"],
        "max_position_embeddings": args.get("max_position_embeddings") or args["seq_length"],
        "vocab_size": vocabulary,
        "make_vocab_size_divisible_by": args.get("make_vocab_size_divisible_by") or 128,
        "position_embedding": _positions(args),
        "rotary_base": float(args.get("rotary_base") or args.get("rope_theta") or 10000.0),
        "rotary_percent": float(args.get("rotary_percent") or 1.0),
        "rotary_scaling": _scaling(args),
        "normalization": "RMSNorm" if rms else "LayerNorm",
        "norm_epsilon": args.get("norm_epsilon") or args.get("layernorm_epsilon") or 1e-5,
        "activation": _activation(args, bias),
        "add_bias_linear": bias,
        "add_qkv_bias": bias or bool(args.get("add_qkv_bias")),
        "qk_layernorm": bool(args.get("qk_layernorm")),
        "tie_embeddings": not args.get("untie_embeddings_and_output_weights"),
        "hidden_dropout": args.get("hidden_dropout") or 0.0,
        "attention_dropout": args.get("attention_dropout") or 0.0,
        "init_method_std": args.get("init_method_std") or 0.02,
    }


def _positions(args: Mapping[str, Any]) -> str:
    kind = args.get("position_embedding_type")
    if args.get("use_rotary_position_embeddings"):  # Megatron-DeepSpeed's
        return "rope"
    if kind is None:
        return "learned_absolute" if args.get("add_position_embedding", True) else "none"
    kind = str(kind).rsplit(".", 1)[-1]
    if kind not in ("learned_absolute", "rope", "none"):
        raise CheckpointError(f"the checkpoint's settings: position_embedding_type {kind} is not supported")
    return kind


def _activation(args: Mapping[str, Any], bias: bool) -> str:
    if args.get("swiglu"):
        return "swiglu"
    # The kernel that adds the bias and applies the activation computes the approximation by tanh.
    fused = args.get("bias_gelu_fusion", True) and bias
    return "gelu_tanh" if fused or args.get("openai_gelu") else "gelu"


def _scaling(args: Mapping[str, Any]) -> RotaryScaling | None:
    if factor := args.get("rotary_seq_len_interpolation_factor"):
        return RotaryScaling(type="linear", factor=float(factor))
    if not args.get("use_rope_scaling"):
        return None
    # The rest is fixed in Megatron-core (RotaryEmbedding._apply_scaling): that of Llama 3.1.
    return RotaryScaling(
        type="llama3",
        factor=float(args.get("rope_scaling_factor") or 8.0),
        original_max_position_embeddings=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )

"""config.json of Hugging Face and our model section, both ways.

Keys and defaults are those of transformers' GPT2Config, LlamaConfig, MistralConfig, Qwen2Config and
Qwen3Config, in the form of release 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and of release 5
(`rope_parameters`, `dtype`). We write the former, which both read, and so do vLLM and llama.cpp.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.config import ModelConfig, RotaryScaling

log = logging.getLogger(__name__)

ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# Keys of mixtures of experts and of quantized weights, which some families have under a dense one's model_type.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_QUANTIZED = ("quantization_config", "compression_config")
_TIED_BY_DEFAULT = {"gpt2"}  # what a config.json that does not say means
_EPSILON_BY_DEFAULT = 1e-6  # of the RMSNorm families


def family_of(model: ModelConfig) -> str:
    """The Hugging Face family that computes what `model` does: gpt2, llama, qwen2 or qwen3.

    Raises CheckpointError where there is none, saying which setting is in the way.
    """
    llama_like = model.position_embedding == "rope"
    needed: dict[str, tuple[object, object]] = {
        "normalization": (model.normalization, "RMSNorm" if llama_like else "LayerNorm"),
    }
    if llama_like:
        needed["activation"] = (model.activation, "swiglu")
        needed["rotary_percent"] = (model.rotary_percent, 1.0)
        if model.qk_layernorm:
            needed["add_bias_linear"] = (model.add_bias_linear, False)
            needed["add_qkv_bias"] = (model.qkv_bias, False)
    else:
        needed["position_embedding"] = (model.position_embedding, "learned_absolute")
        if model.activation == "swiglu":
            needed["activation"] = (model.activation, "gelu_tanh")
        needed["num_query_groups"] = (model.query_groups, model.num_attention_heads)
        needed["kv_channels"] = (model.head_dim * model.num_attention_heads, model.hidden_size)
        needed["qk_layernorm"] = (model.qk_layernorm, False)
    style = "Qwen3" if model.qk_layernorm else "Llama" if llama_like else "GPT-2"
    for key, (value, wanted) in needed.items():
        if value != wanted:
            fault = f"model.{key} is {value}, and its {style} models have {wanted}"
            raise CheckpointError(f"no Hugging Face model computes this one: {fault}")
    if not llama_like:
        return "gpt2"
    if model.qk_layernorm:
        return "qwen3"
    return "qwen2" if model.qkv_bias and not model.add_bias_linear else "llama"


def to_huggingface(
    model: ModelConfig, dtype: str, *, family: str | None = None, token_ids: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """config.json for `model`, with weights of torch's `dtype` ("float32"). Raises as `family_of` does.

    family: "mistral" for a model that it computes as "llama" does; null: the one that computes it
    token_ids: "bos_token_id" and the like, as Hugging Face has them (one id, or a list)
    """
    family = _checked_family(model, family)
    if model.vocab_size is None:
        raise CheckpointError("model.vocab_size is null: padding cannot be told from tokens; set it")
    common = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_method_std,
        "bos_token_id": None,
        "eos_token_id": None,
        "torch_dtype": dtype,
    } | dict(token_ids or {})
    if family == "gpt2":
        return common | {
            "activation_function": "gelu_new" if model.activation == "gelu_tanh" else "gelu",
            "attn_pdrop": model.attention_dropout,
            "embd_pdrop": model.hidden_dropout,
            "resid_pdrop": model.hidden_dropout,
            "layer_norm_epsilon": model.norm_epsilon,
            "n_ctx": model.max_positions,  # what llama.cpp reads; transformers has n_positions
            "n_embd": model.hidden_size,
            "n_head": model.num_attention_heads,
            "n_inner": model.ffn_size,
            "n_layer": model.num_layers,
            "n_positions": model.max_positions,
        }
    if family == "llama":
        common |= {"attention_bias": model.add_bias_linear, "mlp_bias": model.add_bias_linear}
    elif family == "mistral":
        common |= {"sliding_window": None}  # which is 4096 where config.json does not say
    else:
        common |= {"sliding_window": None, "use_sliding_window": False}
    scaling = _scaling_to_huggingface(model)
    if scaling and scaling["rope_type"] == "llama3":
        # Besides its place in rope_scaling: llama.cpp takes it from here, or 8192.
        common |= {"original_max_position_embeddings": scaling["original_max_position_embeddings"]}
    return common | {
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": model.norm_epsilon,
        "attention_dropout": model.attention_dropout,
        "rope_theta": model.rotary_base,
        "rope_scaling": scaling,
    }


def _checked_family(model: ModelConfig, wanted: str | None) -> str:
    family = family_of(model)
    fitting = [family]
    if family == "llama" and not model.add_bias_linear:
        fitting.append("mistral")  # a Llama without biases, where its window is as long as its context
    if wanted is None:
        return family
    if wanted not in fitting:
        raise CheckpointError(f"the model cannot be exported as {wanted}, only as {' or '.join(fitting)}")
    return wanted


def _scaling_to_huggingface(model: ModelConfig) -> dict[str, Any] | None:
    scaling = model.rotary_scaling
    if scaling is None:
        return None
    values: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type != "linear":
        original = scaling.original_max_position_embeddings or model.max_positions
        values["original_max_position_embeddings"] = original
    for key in _SCALING_KEYS[scaling.type]:
        values[key] = getattr(scaling, key)
    return values


_SCALING_KEYS = {
    "linear": (),
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_fast", "beta_slow"),
}


def from_huggingface(config: dict[str, Any]) -> ModelConfig:
    """Our model section for a config.json. Raises CheckpointError for what we do not compute."""
    try:
        return _from_huggingface(config)
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"config.json: {error} is missing") from None
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise CheckpointError(f"config.json makes no model of ours: {'; '.join(faults)}") from error
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: a value of another kind than it should be ({error})") from error


def _from_huggingface(config: dict[str, Any]) -> ModelConfig:
    family = config.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        fault = f"model_type {family!r} is not one of {known}"
        if _is_mixture(config):
            fault = f"model_type {family!r} is a mixture of experts, and only dense models are read: {known}"
        raise CheckpointError(f"config.json: {fault}")
    if _is_mixture(config):
        raise CheckpointError(f"config.json: {family} with experts is not supported, only dense models are")
    for key in _QUANTIZED:
        if config.get(key):
            method = (
                config[key].get("quant_method", "weights") if isinstance(config[key], dict) else "weights"
            )
            remedy = "take the model it was made from, in bf16, fp16 or fp32"
            raise CheckpointError(f"config.json: {key}: {method} is quantized, which is not read; {remedy}")
    values = _from_gpt2(config) if family == "gpt2" else _from_llama(config, family)
    values |= {
        "vocab_size": config["vocab_size"],
        "seq_length": values["max_position_embeddings"],
        "tie_embeddings": config.get("tie_word_embeddings", family in _TIED_BY_DEFAULT),
        "init_method_std": config.get("initializer_range", 0.02),
    }
    return ModelConfig(**values)


def _is_mixture(config: dict[str, Any]) -> bool:
    family = str(config.get("model_type"))
    return "moe" in family or family == "mixtral" or any((config.get(key) or 0) > 1 for key in _EXPERTS)


def _expect(config: dict[str, Any], **wanted: object) -> None:
    """Raise CheckpointError where `config` has one of the keys with another value."""
    for key, value in wanted.items():
        if config.get(key) not in (None, value):
            raise CheckpointError(f"config.json: {key} {config[key]!r} is not supported, only {value!r}")


def _from_gpt2(config: dict[str, Any]) -> dict[str, Any]:
    _expect(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    activation = config.get("activation_function", "gelu_new")
    if activation not in _GPT2_ACTIVATIONS:
        raise CheckpointError(f"config.json: activation_function {activation!r} is not supported")
    return {
        "num_layers": config["n_layer"],
        "hidden_size": config["n_embd"],
        "ffn_hidden_size": config.get("n_inner") or 4 * config["n_embd"],
        "num_attention_heads": config["n_head"],
        "position_embedding": "learned_absolute",
        "max_position_embeddings": config["n_positions"],
        "normalization": "LayerNorm",
        "norm_epsilon": config.get("layer_norm_epsilon", 1e-5),
        "activation": _GPT2_ACTIVATIONS[activation],
        "add_bias_linear": True,
        "hidden_dropout": config.get("resid_pdrop", 0.1),
        "attention_dropout": config.get("attn_pdrop", 0.1),
    }


def _from_llama(config: dict[str, Any], family: str) -> dict[str, Any]:
    _expect(config, hidden_act="silu")
    bias = bool(config.get("mlp_bias", False))
    _expect(config, attention_bias=bias)  # one setting of ours is behind both
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    _expect(rope, partial_rotary_factor=1.0)
    _expect(config, partial_rotary_factor=1.0)
    heads = config["num_attention_heads"]
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "position_embedding": "rope",
        "max_position_embeddings": _positions(config, family),
        "rotary_base": float(rope.get("rope_theta") or config.get("rope_theta", 10000.0)),
        "rotary_scaling": _scaling_from_huggingface(rope, config),
        "normalization": "RMSNorm",
        "norm_epsilon": config.get("rms_norm_eps", _EPSILON_BY_DEFAULT),
        "activation": "swiglu",
        "add_bias_linear": bias,
        "add_qkv_bias": bias or family == "qwen2",
        "qk_layernorm": family == "qwen3",
        "attention_dropout": config.get("attention_dropout", 0.0),
    }


def _positions(config: dict[str, Any], family: str) -> int:
    """Context length, in tokens; where attention slides over a window, what the window holds."""
    positions: int = config["max_position_embeddings"]
    window = config.get("sliding_window") if config.get("use_sliding_window", family == "mistral") else None
    if window is None or window >= positions:
        return positions
    message = "attention slides over a window of %d tokens, which we do not: imported for contexts up to that"
    log.warning(message, window)
    return int(window)


def _scaling_from_huggingface(rope: dict[str, Any], config: dict[str, Any]) -> RotaryScaling | None:
    if any(isinstance(value, dict) for value in rope.values()):
        raise CheckpointError("config.json: rotary embeddings that differ by layer are not supported")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind not in _SCALING_KEYS:
        known = ", ".join(_SCALING_KEYS)
        raise CheckpointError(f"config.json: rope_type {kind!r} is not supported, only default, {known}")
    _expect(rope, attention_factor=None, mscale=None, mscale_all_dim=None, truncate=True)
    values: dict[str, Any] = {"type": kind, "factor": float(rope["factor"])}
    if kind != "linear":
        # The top level goes first, as in transformers.
        original = config.get("original_max_position_embeddings")
        original = (
            original or rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        )
        values["original_max_position_embeddings"] = original
    for key in _SCALING_KEYS[kind]:
        if rope.get(key) is not None:
            values[key] = float(rope[key])
    return RotaryScaling(**values)

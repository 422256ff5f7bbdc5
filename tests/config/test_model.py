"""Derived sizes, and parameters and FLOPs against counts made by hand."""

import pytest

from megatron_lite.config import ModelConfig

GPT2 = ModelConfig(
    num_layers=12,
    hidden_size=768,
    num_attention_heads=12,
    seq_length=1024,
    vocab_size=50257,
    make_vocab_size_divisible_by=1,
    activation="gelu_tanh",
)
LLAMA3_8B = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    seq_length=8192,
    vocab_size=128256,
    position_embedding="rope",
    normalization="RMSNorm",
    activation="swiglu",
    add_bias_linear=False,
    tie_embeddings=False,
)


def test_parameters_of_published_models() -> None:
    assert GPT2.parameter_count() == 124_439_808  # Hugging Face's gpt2
    assert LLAMA3_8B.parameter_count() == 8_030_261_248  # Hugging Face's Meta-Llama-3-8B


def test_parameters_of_the_options_by_hand() -> None:
    model = ModelConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        num_query_groups=1,
        kv_channels=6,
        seq_length=4,
        vocab_size=10,
        make_vocab_size_divisible_by=4,
        ffn_hidden_size=16,
        activation="swiglu",
        qk_layernorm=True,
    )
    qkv = 8 * (12 + 6 + 6) + 24
    feed_forward = 8 * 32 + 32 + 16 * 8 + 8
    norms = 3 * 2 * 8 + 2 * 2 * 6
    assert model.parameter_count() == 12 * 8 + 4 * 8 + qkv + (12 * 8 + 8) + feed_forward + norms
    bare = model.model_copy(update={"add_bias_linear": False, "add_qkv_bias": True})
    removed = 8 + (32 + 8) + 3 * 8 + 2 * 6
    assert bare.parameter_count() == model.parameter_count() - removed


def test_flops_are_megatrons_formula() -> None:
    """Narayanan et al. 2021: 72 l h^2 (1 + s/6h + V/12lh) a token, without recomputation."""
    layers, width, length, vocabulary = 12, 768, 1024, 50257
    ratio = 1 + length / (6 * width) + vocabulary / (12 * layers * width)
    assert GPT2.flops_per_token() == pytest.approx(72 * layers * width**2 * ratio, rel=1e-12)


def test_flops_with_groups_and_gates() -> None:
    """Megatron-LM's later form: 12 l h^2 (1 + groups/heads + s/h + 3/2 f/h + V/2lh) a token."""
    width, layers = 4096, 32
    ratio = 1 + 8 / 32 + 8192 / width + 1.5 * 14336 / width + 128256 / (2 * layers * width)
    assert LLAMA3_8B.flops_per_token() == pytest.approx(12 * layers * width**2 * ratio, rel=1e-12)


def test_derived_sizes() -> None:
    model = GPT2.model_copy(update={"make_vocab_size_divisible_by": 128})
    assert model.padded_vocab_size == 50304
    assert (model.ffn_size, model.head_dim, model.query_groups, model.max_positions) == (3072, 64, 12, 1024)
    assert model.qkv_bias is True
    assert model.model_copy(update={"activation": "swiglu"}).ffn_size == 2048
    assert model.model_copy(update={"activation": "swiglu", "hidden_size": 64}).ffn_size == 192
    assert model.model_copy(update={"kv_channels": 10, "rotary_percent": 0.7}).rotary_dim == 7
    with pytest.raises(ValueError, match="vocab_size is null"):
        _ = model.model_copy(update={"vocab_size": None}).padded_vocab_size

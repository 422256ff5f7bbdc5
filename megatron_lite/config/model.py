"""The model section: the shape of a GPT and everything that follows from it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .base import Section, alias

_POSITIONS = {"learned": "learned_absolute", "absolute": "learned_absolute", "rotary": "rope", "nope": "none"}


class RotaryScaling(Section):
    """How rotary frequencies are stretched for contexts longer than the ones first trained on."""

    type: Literal["linear", "llama3", "yarn"] = Field(examples=["linear"], description="rule of scaling")
    factor: float = Field(ge=1, examples=[8.0], description="new context length over the original one")
    original_max_position_embeddings: int | None = Field(
        default=None, gt=0, description="context length before scaling, in tokens; llama3 and yarn need it"
    )
    low_freq_factor: float = Field(
        default=1.0,
        gt=0,
        description="llama3: wavelengths above the original context divided by this are scaled fully",
    )
    high_freq_factor: float = Field(
        default=4.0,
        gt=0,
        description="llama3: wavelengths below the original context divided by this are left alone",
    )
    beta_fast: float = Field(
        default=32.0,
        gt=0,
        description="yarn: dimensions turning more often than this over the original context are kept",
    )
    beta_slow: float = Field(
        default=1.0, gt=0, description="yarn: dimensions turning less often than this are fully interpolated"
    )


class ModelConfig(Section):
    """Shape and make-up of the transformer. Names follow Megatron-LM."""

    num_layers: int = Field(gt=0, examples=[4], description="transformer blocks")
    hidden_size: int = Field(gt=0, examples=[64], description="width of the residual stream")
    ffn_hidden_size: int | None = Field(
        default=None,
        gt=0,
        description="inner width of the feed-forward part; null: 4 x hidden_size, or with swiglu 8/3 x "
        "hidden_size rounded up to a multiple of 64",
    )
    num_attention_heads: int = Field(gt=0, examples=[4], description="query heads")
    num_query_groups: int | None = Field(
        default=None, gt=0, description="key/value heads (grouped-query attention); null: num_attention_heads"
    )
    kv_channels: int | None = Field(
        default=None, gt=0, description="width of one head; null: hidden_size / num_attention_heads"
    )
    seq_length: int = Field(gt=0, examples=[64], description="tokens a sample")
    vocab_size: int | None = Field(
        default=None,
        gt=0,
        description="entries of the vocabulary before padding; null: taken from the tokenizer",
    )
    make_vocab_size_divisible_by: int = Field(
        default=128, gt=0, description="the vocabulary is padded to a multiple of this, whatever the layout"
    )
    position_embedding: Literal["learned_absolute", "rope", "none"] = Field(
        default="learned_absolute", description="how positions enter the model"
    )
    max_position_embeddings: int | None = Field(
        default=None, gt=0, description="rows of the learned position table, in tokens; null: seq_length"
    )
    rotary_base: float = Field(default=10000.0, gt=0, description="base of the rotary frequencies")
    rotary_percent: float = Field(
        default=1.0, gt=0, le=1, description="part of each head that is rotated, 0 to 1"
    )
    rotary_scaling: RotaryScaling | None = Field(
        default=None, description="scaling of rotary positions; null: none"
    )
    normalization: Literal["LayerNorm", "RMSNorm"] = Field(
        default="LayerNorm", description="normalization layers"
    )
    norm_epsilon: float = Field(
        default=1e-5, gt=0, description="added to the variance in normalization layers"
    )
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = Field(
        default="gelu",
        description="feed-forward activation: gelu (exact, erf), gelu_tanh (GPT-2's) or swiglu (gated)",
    )
    add_bias_linear: bool = Field(default=True, description="biases in the linear layers and in LayerNorm")
    add_qkv_bias: bool | None = Field(
        default=None, description="biases in the query/key/value projection; null: as add_bias_linear"
    )
    qk_layernorm: bool = Field(default=False, description="normalize queries and keys, per head")
    tie_embeddings: bool = Field(
        default=True, description="the output layer shares the token embedding's weight"
    )
    hidden_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="dropout on the embedding and the residual branches"
    )
    attention_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="dropout on attention probabilities"
    )
    init_method_std: float = Field(
        default=0.02, gt=0, description="standard deviation of the initial weights"
    )

    _positions = alias("position_embedding", _POSITIONS)
    _norms = alias("normalization", {"layer_norm": "LayerNorm", "rms_norm": "RMSNorm"})
    _activations = alias("activation", {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"})

    @property
    def ffn_size(self) -> int:
        """Inner width of the feed-forward part, defaults resolved."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.activation == "swiglu":
            return _round_up(-(-8 * self.hidden_size // 3), 64)
        return 4 * self.hidden_size

    @property
    def query_groups(self) -> int:
        """Key/value heads, defaults resolved."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Width of one attention head, defaults resolved."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def rotary_dim(self) -> int:
        """Leading channels of each head that are rotated."""
        return int(self.head_dim * self.rotary_percent + 1e-6)  # 0.7 of 10 is 7, whatever binary makes of 0.7

    @property
    def max_positions(self) -> int:
        """Rows of the learned position table, defaults resolved."""
        return self.max_position_embeddings or self.seq_length

    @property
    def qkv_bias(self) -> bool:
        """Whether the query/key/value projection has biases, defaults resolved."""
        return self.add_bias_linear if self.add_qkv_bias is None else self.add_qkv_bias

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up, the same on every layout.

        Raises ValueError while `vocab_size` is null (see `Config.with_vocab_size`).
        """
        if self.vocab_size is None:
            raise ValueError(
                "model.vocab_size is null; set it, or use Config.with_vocab_size(tokenizer.vocab_size)"
            )
        return _round_up(self.vocab_size, self.make_vocab_size_divisible_by)

    def parameter_count(self) -> int:
        """Trainable parameters of the whole model, the vocabulary's padding included.

        Raises ValueError while `vocab_size` is null.
        """
        embeddings = self.padded_vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)
        positions = (
            self.max_positions * self.hidden_size if self.position_embedding == "learned_absolute" else 0
        )
        norms = self._norm_weights(self.hidden_size) * (2 * self.num_layers + 1)
        return embeddings + positions + norms + self.num_layers * (self._layer_weights + self._layer_extras)

    def flops_per_token(self) -> int:
        """Floating-point operations a token costs, forward and backward, without recomputation.

        Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM"
        (2021), section 5.1, generalised to grouped-query attention, gated feed-forward parts and any head
        width: 6 for every weight of a matrix product, and attention scores counted over the whole sequence,
        as Megatron-LM does, although the mask leaves half of them out.
        Raises ValueError while `vocab_size` is null.
        """
        weights = self.num_layers * self._layer_weights + self.padded_vocab_size * self.hidden_size
        scores = self.num_layers * self.seq_length * self.num_attention_heads * self.head_dim
        return 6 * weights + 12 * scores

    @property
    def _qkv_rows(self) -> int:
        return (self.num_attention_heads + 2 * self.query_groups) * self.head_dim

    def _norm_weights(self, size: int) -> int:
        return size * (2 if self.normalization == "LayerNorm" and self.add_bias_linear else 1)

    @property
    def _layer_weights(self) -> int:
        """Entries of the matrices of one block."""
        attention = self.hidden_size * (self._qkv_rows + self.num_attention_heads * self.head_dim)
        return attention + self.hidden_size * self.ffn_size * (3 if self.activation == "swiglu" else 2)

    @property
    def _layer_extras(self) -> int:
        """Biases and QK-norm weights of one block; its two norms are counted apart."""
        biases = self._qkv_rows if self.qkv_bias else 0
        if self.add_bias_linear:
            biases += 2 * self.hidden_size + self.ffn_size * (2 if self.activation == "swiglu" else 1)
        return biases + (2 * self._norm_weights(self.head_dim) if self.qk_layernorm else 0)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

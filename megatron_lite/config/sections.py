"""The sections beside the model: parallelism, data, training, optimizer, checkpoints, kernels, logging."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from .base import Section, alias

PositiveInt = Annotated[int, Field(gt=0)]
Prefixes = str | tuple[str, ...] | tuple[tuple[float, str], ...]
# What stands before the colon in data.tokenizer; `byte` reads no file and stands alone.
TOKENIZER_KINDS = ("char", "word", "gpt2", "hf", "tiktoken", "sentencepiece")


def prefixes(value: Prefixes | None) -> list[str]:
    """Every prefix that a data key names."""
    if value is None or isinstance(value, str):
        return [value] if value else []
    return [item if isinstance(item, str) else item[1] for item in value]


def split_sizes(split: str) -> tuple[float, float, float]:
    """The relative sizes of training, validation and test that data.split gives.

    Raises ValueError for a text that is not one to three sizes, none negative and the first more than 0.
    """
    try:
        sizes = [float(part) for part in split.split(",")]
    except ValueError:
        sizes = []
    if not 1 <= len(sizes) <= 3 or not all(math.isfinite(s) and s >= 0 for s in sizes) or not sizes[0]:
        raise ValueError(
            f'"{split}" is not one to three sizes, none negative and the first more than 0; '
            'for example "969,30,1"'
        )
    train, valid, test = (*sizes, 0.0, 0.0)[:3]
    return train, valid, test


class ParallelConfig(Section):
    """How one model is spread over ranks; data parallelism takes the ranks that remain."""

    tensor: int = Field(default=1, gt=0, description="ranks that share each layer (tensor parallelism)")
    pipeline: int = Field(
        default=1, gt=0, description="stages the layers are divided into (pipeline parallelism)"
    )
    sequence_parallel: bool = Field(
        default=False,
        description="split activations between tensor-parallel regions along the sequence; needs tensor > 1",
    )
    pipeline_partition: tuple[PositiveInt, ...] | None = Field(
        default=None, description="transformer blocks of each stage, first to last; null: balanced by cost"
    )
    timeout_minutes: float = Field(
        default=10.0, gt=0, description="minutes a collective may wait before the run is ended"
    )


class DataConfig(Section):
    """What is trained on. A prefix names PREFIX.bin and PREFIX.idx."""

    tokenizer: str | None = Field(
        default=None,
        description="byte, char:FILE, word:FILE, gpt2:DIR_OR_PREFIX, hf:DIR_OR_FILE, tiktoken:FILE or "
        "sentencepiece:FILE; null: none, and model.vocab_size says how many ids there are",
    )
    train: Prefixes | None = Field(
        default=None, description="training data: a prefix, a list of prefixes, or [[weight, prefix], ...]"
    )
    valid: Prefixes | None = Field(
        default=None,
        description="validation data, as train; null: the part of train that split gives, or none where test "
        "is given",
    )
    test: Prefixes | None = Field(
        default=None,
        description="test data, as train; null: the part of train that split gives, or none where valid is "
        "given",
    )
    split: str = Field(
        default="969,30,1",
        description="relative sizes of training, validation and test within train; not used where valid or "
        "test is given",
    )
    order: Literal["epoch", "megatron"] = Field(
        default="epoch", description="sample order: epochs kept apart, or exactly Megatron-core's"
    )
    packing: Literal["concat", "best_fit"] = Field(
        default="concat",
        description="documents joined end to end and cut at seq_length; or kept whole where they fit, side by side "
        "in rows with some padding (best-fit packing, Ding et al. 2024)",
    )
    cache_dir: str | None = Field(
        default=None, description="folder for sample indices; null: beside the data"
    )
    num_workers: int = Field(default=1, ge=0, description="prefetching threads; 0: none")
    eod_mask_loss: bool = Field(default=False, description="no loss at end-of-document tokens")
    reset_position_ids: bool = Field(default=False, description="positions restart after each document")
    reset_attention_mask: bool = Field(default=False, description="tokens do not attend across documents")

    _orders = alias("order")
    _packings = alias("packing")


class TrainConfig(Section):
    """The run: batch sizes, length, precision."""

    micro_batch_size: int = Field(gt=0, examples=[1], description="samples a rank processes at once")
    global_batch_size: int = Field(gt=0, examples=[1024], description="samples a step, over all ranks")
    steps: int = Field(gt=0, examples=[100], description="optimizer steps of the whole run")
    seed: int = Field(default=1234, ge=0, description="seed of weights, data order and dropout")
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        default="fp32", description="type of weights and activations"
    )
    output_dir: str = Field(
        min_length=1, examples=["runs/example"], description="folder for metrics and checkpoints"
    )
    exit_after_steps: int | None = Field(
        default=None, gt=0, description="save and end after this many steps of this job; null: at steps"
    )
    z_loss: float = Field(
        default=0.0,
        ge=0,
        description="factor of log(Z)^2 in the training loss (reported with it), against drift of logits",
    )
    eval_interval: int | None = Field(default=None, gt=0, description="steps between evaluations; null: none")
    eval_steps: int = Field(default=10, gt=0, description="global batches an evaluation")
    recompute: Literal["none", "selective", "full"] = Field(
        default="none",
        description="activations computed again in the backward pass: selective: of the attention core (sdpa's "
        "flash kernel keeps none anyway), full: of whole blocks",
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        default="stop", description="what a non-finite loss or gradient does"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: cuda where there is one"
    )

    _precisions = alias(
        "precision", {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}
    )
    _recomputes = alias("recompute")
    _nonfinite = alias("on_nonfinite")
    _devices = alias("device", {"gpu": "cuda"})


class OptimizerConfig(Section):
    """AdamW and the learning-rate schedule."""

    lr: float = Field(gt=0, examples=[1e-3], description="peak learning rate")
    min_lr: float = Field(default=0.0, ge=0, description="learning rate at the end of decay")
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear warmup from 0 to lr")
    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field(
        default="cosine", description="shape of the decay; wsd: warmup, stable, decay"
    )
    decay_steps: int | None = Field(
        default=None, gt=0, description="step at which decay ends; null: train.steps"
    )
    wsd_decay_steps: int | None = Field(
        default=None, gt=0, description="wsd: steps of the last, decaying part; null: a tenth of decay_steps"
    )
    weight_decay: float = Field(default=0.1, ge=0, description="decoupled weight decay, on matrices only")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay rate of Adam's first moment")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="decay rate of Adam's second moment")
    eps: float = Field(default=1e-8, gt=0, description="added to the denominator of Adam's update")
    grad_clip: float = Field(default=1.0, ge=0, description="largest global gradient norm; 0: no clipping")

    _schedules = alias("schedule", {"warmup_stable_decay": "wsd"})


class CheckpointConfig(Section):
    """What is saved, kept and started from."""

    interval: int | None = Field(
        default=None, gt=0, description="steps between checkpoints; null: only at the end"
    )
    keep: int = Field(default=2, ge=0, description="newest checkpoints kept; 0: all")
    async_save: bool = Field(
        default=True,
        description="write beside training, from a copy in host memory; what is saved is the same",
    )
    weights_interval: int | None = Field(
        default=None, gt=0, description="steps between saves of the weights alone; null: none"
    )
    weights_precision: Literal["bf16", "fp32"] = Field(
        default="bf16", description="type of the weights saved alone"
    )
    load: str | None = Field(default=None, min_length=1, description="checkpoint folder to start from")
    weights_only: bool = Field(
        default=False,
        description="take only the weights, of `load` or of what was imported into train.output_dir, and begin at "
        "step 0 with a fresh optimizer",
    )
    resume: Literal["auto", "never", "required"] = Field(
        default="auto", description="whether to go on from the newest checkpoint in train.output_dir"
    )

    _resumes = alias("resume")


_Plain = Literal["auto", "native", "compile", "reference"]
_PLAIN = {"torch": "reference", "eager": "reference", "torch_compile": "compile", "torch.compile": "compile"}
_PACKAGES = {"te": "transformer_engine", "flash_attn": "flash_attn_2", "flash_attention": "flash_attn_2"}
_PACKAGES |= {f"fa{version}": f"flash_attn_{version}" for version in (2, 3, 4)}


class KernelsConfig(Section):
    """Which implementation serves each operation; auto: the best that this machine and this run allow.

    The others by name: native: our own kernels; compile: torch.compile; reference: plain torch.
    """

    attention: Literal[
        "auto",
        "native",
        "flash_attn_2",
        "flash_attn_3",
        "flash_attn_4",
        "transformer_engine",
        "sdpa",
        "sdpa_cudnn",
        "sdpa_flash",
        "sdpa_efficient",
        "compile",
        "reference",
    ] = Field(
        default="auto",
        description="attention; sdpa: torch's scaled_dot_product_attention, with the kernel that torch chooses "
        "or the one named",
    )
    norm: Literal["auto", "native", "transformer_engine", "apex", "compile", "reference"] = Field(
        default="auto", description="LayerNorm and RMSNorm, alone and with a residual added"
    )
    activation: _Plain = Field(default="auto", description="GELU and SwiGLU")
    rotary: _Plain = Field(default="auto", description="rotary position embedding")
    dropout: _Plain = Field(default="auto", description="dropout, the same on every layout")
    softmax: _Plain = Field(default="auto", description="masked softmax")
    cross_entropy: _Plain = Field(default="auto", description="cross entropy, also over a split vocabulary")
    linear: Literal["auto", "torch", "fp8"] = Field(
        default="auto",
        description="the blocks' linear layers; auto: torch; fp8: through transformer-engine, on Hopper or newer",
    )
    cpu_allocator: bool = Field(default=True, description="tune the CPU allocator for large tensors")

    _attentions = alias("attention", _PLAIN | _PACKAGES | {"torch": "sdpa"})
    _norms = alias("norm", _PLAIN | _PACKAGES)
    _activations = alias("activation", _PLAIN)
    _rotaries = alias("rotary", _PLAIN)
    _dropouts = alias("dropout", _PLAIN)
    _softmaxes = alias("softmax", _PLAIN)
    _cross_entropies = alias("cross_entropy", _PLAIN)
    _linears = alias("linear")


class LoggingConfig(Section):
    """What is reported, and where."""

    interval: int = Field(default=1, gt=0, description="steps between lines on the console")
    tensorboard: bool = Field(default=False, description="write TensorBoard files in train.output_dir")
    wandb_project: str | None = Field(
        default=None, min_length=1, description="Weights & Biases project; null: none"
    )
    peak_tflops: float | None = Field(
        default=None, gt=0, description="peak TFLOP/s of one device, for MFU; null: known for the device"
    )
    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severe message shown"
    )

    _levels = alias("level", {"warn": "warning"})

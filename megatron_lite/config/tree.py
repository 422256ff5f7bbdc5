"""The whole tree."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from . import checks, deepspeed_section
from .base import Section
from .errors import Problem, raise_problems
from .model import ModelConfig
from .sections import (
    CheckpointConfig,
    DataConfig,
    KernelsConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)


class Config(Section):
    """Every setting of a run.

    Made by `load_config` or `build_config`, which check the rules between keys; the constructor checks
    types only.
    """

    description: str | None = Field(default=None, description="what this configuration is for; free text")
    model: ModelConfig = Field(description="shape and make-up of the transformer")
    parallel: ParallelConfig = Field(
        default=ParallelConfig(), description="how the model is spread over ranks"
    )
    data: DataConfig = Field(default=DataConfig(), description="what is trained on")
    train: TrainConfig = Field(description="batch sizes, length and precision of the run")
    optimizer: OptimizerConfig = Field(description="AdamW and the learning-rate schedule")
    checkpoint: CheckpointConfig = Field(
        default=CheckpointConfig(), description="what is saved and started from"
    )
    kernels: KernelsConfig = Field(default=KernelsConfig(), description="implementation of each operation")
    logging: LoggingConfig = Field(default=LoggingConfig(), description="what is reported, and where")
    deepspeed: dict[str, Any] = Field(
        default={},
        description="DeepSpeed's own JSON, passed through; what is derived from other keys is left out",
    )

    @property
    def zero_stage(self) -> int:
        """ZeRO stage, 0 to 3 (1 unless `deepspeed.zero_optimization.stage` says otherwise)."""
        return int(self.deepspeed.get("zero_optimization", {}).get("stage", 1))

    @property
    def decay_steps(self) -> int:
        """Step at which the learning rate has decayed, defaults resolved."""
        return self.optimizer.decay_steps or self.train.steps

    @property
    def wsd_decay_steps(self) -> int:
        """Steps of the decaying part of the wsd schedule, defaults resolved."""
        return self.optimizer.wsd_decay_steps or max(1, self.decay_steps // 10)

    def resolved(self) -> dict[str, Any]:
        """The tree as JSON gives it, with every null that follows from other keys filled in."""
        tree = self.model_dump(mode="json")
        model = self.model
        tree["model"] |= {
            "ffn_hidden_size": model.ffn_size,
            "num_query_groups": model.query_groups,
            "kv_channels": model.head_dim,
            "max_position_embeddings": model.max_positions,
            "add_qkv_bias": model.qkv_bias,
        }
        tree["optimizer"]["decay_steps"] = self.decay_steps
        if self.optimizer.schedule == "wsd":
            tree["optimizer"]["wsd_decay_steps"] = self.wsd_decay_steps
        return tree

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model that `world_size` ranks hold. Raises ConfigError as `check_world` does."""
        self.check_world(world_size)
        return world_size // (self.parallel.tensor * self.parallel.pipeline)

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches each rank runs a step. Raises ConfigError as `check_world` does."""
        samples = self.train.micro_batch_size * self.data_parallel_size(world_size)
        return self.train.global_batch_size // samples

    def with_vocab_size(self, vocab_size: int) -> Config:
        """A copy whose `model.vocab_size` is known, when the file left it to the tokenizer.

        Raises ConfigError when the file gives a vocabulary smaller than the tokenizer's, or when the padded
        vocabulary does not divide among the tensor-parallel ranks.
        """
        given = self.model.vocab_size
        if given is not None and given < vocab_size:
            problem = f"{given} is less than the tokenizer's {vocab_size} ids; nearest: {vocab_size}"
            raise_problems("config", [Problem("model.vocab_size", problem)])
        model = self.model.model_copy(update={"vocab_size": given or vocab_size})
        config = self.model_copy(update={"model": model})
        raise_problems("config", checks.tensor_divides_vocabulary(config))
        return config

    def check_world(self, world_size: int) -> None:
        """Check the layout and the batch sizes against the number of ranks. Raises ConfigError."""
        raise_problems("config", checks.check_world(self, world_size))

    def check_files(self) -> None:
        """Check that data, tokenizer and checkpoint are there. Raises ConfigError."""
        raise_problems("config", checks.missing_files(self))

    def check_device(self, device: str) -> None:
        """Check the precision against the device really used, "cpu" or "cuda". Raises ConfigError."""
        raise_problems("config", checks.fp16_on(self, device))

    def warnings(self, world_size: int) -> list[str]:
        """What is legal but probably not meant, one line each. Raises ConfigError as `check_world` does."""
        return checks.warnings(self, world_size)

    def deepspeed_dict(self, world_size: int) -> dict[str, Any]:
        """The JSON for `deepspeed.initialize`. Raises ConfigError as `check_world` does."""
        return deepspeed_section.complete(self, world_size)

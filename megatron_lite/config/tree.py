"""The whole tree."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from .base import Section
from .errors import ConfigError
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
    """Every setting of a run."""

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

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model that `world_size` ranks hold. Raises ConfigError when they do not divide."""
        ranks = self.parallel.tensor * self.parallel.pipeline
        if world_size < 1 or world_size % ranks:
            raise ConfigError(
                f"parallel: tensor={self.parallel.tensor} x pipeline={self.parallel.pipeline} needs a multiple "
                f"of {ranks} ranks; there {'is' if world_size == 1 else 'are'} {world_size}"
            )
        return world_size // ranks

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches each rank runs a step. Raises ConfigError when the global batch does not divide."""
        samples = self.train.micro_batch_size * self.data_parallel_size(world_size)
        steps, rest = divmod(self.train.global_batch_size, samples)
        if rest or not steps:
            nearest = max(samples, round(self.train.global_batch_size / samples) * samples)
            raise ConfigError(
                f"train.global_batch_size: {self.train.global_batch_size} is no multiple of micro_batch_size x "
                f"data-parallel size = {samples}; nearest: {nearest}"
            )
        return steps

    def with_vocab_size(self, vocab_size: int) -> Config:
        """A copy whose `model.vocab_size` is known, when the file left it to the tokenizer.

        Raises ConfigError when the file gives a vocabulary smaller than the tokenizer's.
        """
        given = self.model.vocab_size
        if given is not None and given < vocab_size:
            raise ConfigError(
                f"model.vocab_size: {given} is smaller than the tokenizer's vocabulary; nearest: {vocab_size}"
            )
        model = self.model.model_copy(update={"vocab_size": given or vocab_size})
        return self.model_copy(update={"model": model})

    def check_world(self, world_size: int) -> None:
        """Check the layout and the batch sizes against the number of ranks. Raises ConfigError."""
        self.accumulation_steps(world_size)

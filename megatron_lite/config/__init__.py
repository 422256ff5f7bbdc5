"""Every setting: one strict, typed tree loaded from one JSON file."""

from .errors import ConfigError
from .load import build_config, load_config
from .model import ModelConfig, RotaryScaling
from .sections import (
    TOKENIZER_KINDS,
    CheckpointConfig,
    DataConfig,
    KernelsConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
    split_sizes,
)
from .tree import Config

__all__ = [
    "TOKENIZER_KINDS",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "KernelsConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RotaryScaling",
    "TrainConfig",
    "build_config",
    "load_config",
    "split_sizes",
]

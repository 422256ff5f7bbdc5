"""Every setting: one strict, typed tree loaded from one JSON file."""

from .errors import ConfigError
from .load import build_config, load_config
from .model import ModelConfig, RotaryScaling
from .sections import (
    CheckpointConfig,
    DataConfig,
    KernelsConfig,
    LoggingConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from .tree import Config

__all__ = [
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
]

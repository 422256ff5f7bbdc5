"""The one seam to kernels: `build_ops` picks an implementation of each operation once, at start."""

from megatron_lite.ops.arguments import Documents, ProbabilityDropout
from megatron_lite.ops.backends import Needs
from megatron_lite.ops.registry import Ops, build_ops

__all__ = ["Documents", "Needs", "Ops", "ProbabilityDropout", "build_ops"]

"""What is asked of ZeRO: whether it is needed at all, its buffers, and how its reductions run."""

from typing import Any

import torch

from megatron_lite.config import Config
from megatron_lite.parallel.mesh import Mesh


def nothing_to_partition(config: Config, data_size: int) -> bool:
    """Whether every rank holds all of the optimizer state of its weights, which is then stepped by `WholeAdamW`.

    ZeRO 0, 1 and 2 are the same thing on one data-parallel rank. Offload and loss scaling (fp16) are DeepSpeed's.
    """
    if config.train.precision == "fp16" or config.deepspeed.get("zero_optimization", {}).get(
        "offload_optimizer"
    ):
        return False
    if data_size == 1:
        return config.zero_stage < 3
    return config.zero_stage == 0 and config.train.precision == "fp32"


def deepspeed_settings(config: Config, mesh: Mesh, device: torch.device) -> dict[str, Any]:
    """The JSON for `deepspeed.initialize` on these ranks; what the user gives stays."""
    settings = config.deepspeed_dict(mesh.world_size)
    zero = settings["zero_optimization"]
    if nothing_to_partition(config, mesh.data_size):
        settings["gradient_clipping"] = 0.0
        zero["stage"] = 0
        return settings
    # DeepSpeed's own 500 million elements are a buffer of 1 or 2 GB, twice with overlap, which also cannot begin
    # before the first is full. Megatron-LM's size of a bucket.
    zero.setdefault("reduce_bucket_size", max(40_000_000, 1_000_000 * mesh.data_size))
    if device.type == "cuda" and mesh.pipeline_size == 1:
        # On CPUs DeepSpeed has no streams: the same reductions, in more memory.
        zero.setdefault("overlap_comm", True)
    return settings


def shorten_reductions(engine: Any, mesh: Mesh) -> None:
    """Spares DeepSpeed's engine the copies it makes around all-reduces."""
    if mesh.data_size == 1:
        engine.buffered_allreduce_fallback = lambda *_, **__: None
    elif hasattr(engine.optimizer, "get_grads_for_reduction"):
        # bf16 with ZeRO-1: the gradients are in one or two flat tensors already, and need not be joined.
        def reduce_in_place(bucket: list[torch.Tensor], group: Any, size: int | None = None) -> None:
            for gradients in bucket:
                engine.allreduce_bucket([gradients], group, size)

        engine.allreduce_and_copy = reduce_in_place

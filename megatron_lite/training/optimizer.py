"""The optimizer, and for runs without ZeRO the global norm of the gradient and clipping by it."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from megatron_lite.config import OptimizerConfig
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parameter import spec_of


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), torch's fused form; only matrices decay."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in parameters:
        groups[spec_of(parameter).decays].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "weight_decay": config.weight_decay if decays else 0.0}
            for decays, members in groups.items()
            if members
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], mesh: Mesh, max_norm: float) -> float:
    """Scales the gradients down so that their global norm is at most `max_norm` (0: no limit).

    A parameter counts once: replicated ones on the first tensor rank, tied copies on the first stage. Collective
    over the ranks that hold one model.

    Returns:
        The L2 norm before clipping; gradients are left alone where it is not finite.
    """
    held = [p for p in parameters if p.grad is not None]
    counted = [
        p
        for p in held
        if not getattr(p, "ds_pipe_replicated", False)
        and (spec_of(p).dim is not None or mesh.tensor_rank == 0)
    ]
    device = held[0].device
    squares = torch.zeros((), dtype=torch.float64, device=device)
    for parameter in counted:
        assert parameter.grad is not None
        squares += parameter.grad.float().norm().double().square()
    if mesh.get_model_parallel_world_size() > 1:
        dist.all_reduce(squares, group=mesh.model_group)
    norm = float(squares.sqrt())
    if 0 < max_norm < norm < float("inf"):
        for parameter in held:
            assert parameter.grad is not None
            parameter.grad.mul_(max_norm / (norm + 1e-6))
    return norm

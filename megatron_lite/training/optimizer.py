"""The optimizer: torch's AdamW, and for ranks that divide nothing a step of our own around it."""

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_lite.config import OptimizerConfig
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parameter import spec_of

Groups = list[dict[str, Any]]


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), torch's fused form, for DeepSpeed to wrap."""
    return torch.optim.AdamW(_groups(parameters, config), **_settings(config))


def _groups(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> Groups:
    """Only matrices decay."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for parameter in parameters:
        groups[spec_of(parameter).decays].append(parameter)
    return [
        {"params": members, "weight_decay": config.weight_decay if decays else 0.0}
        for decays, members in groups.items()
        if members
    ]


def _settings(config: OptimizerConfig) -> dict[str, Any]:
    return {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps, "fused": True}


class WholeAdamW(torch.optim.AdamW):
    """AdamW with clipping and fp32 masters, for ranks that hold the whole optimizer state of their weights.

    DeepSpeed's own wrappers are made for parts: they copy weights and gradients into flat buffers, and pass over the
    gradients for each of reduction, overflow, norm and clipping. Here the norm is one pass, clipping is part of
    torch's update, and nothing is copied that has the type it needs. DeepSpeed calls it as it would its own, and
    reads `overflow` and `_global_grad_norm`.

    Weights in fp32 are their own masters. Of others `param_groups` and `state` hold fp32 masters, and each gradient is
    added to its master's, in fp32, as soon as the backward pass has made it.

    Args:
        accumulate: False: gradients of one step's micro-batches add up in the type of the weights.
    """

    # torch's optimizers load its compiler when first used, only to say that they are not to be compiled: 0.9 s and
    # 75 MiB.
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    _update = inspect.unwrap(torch.optim.Adam.step)

    def __init__(
        self, parameters: Iterable[nn.Parameter], config: OptimizerConfig, mesh: Mesh, accumulate: bool = True
    ) -> None:
        weights = list(parameters)
        self.masters = {weight: _master(weight) for weight in weights}
        self.mesh, self.max_norm = mesh, config.grad_clip
        self.overflow, self._global_grad_norm = False, math.nan
        groups = _groups(weights, config)
        for group in groups:
            group["params"] = [self.masters[weight] for weight in group["params"]]
        super().__init__(groups, **_settings(config))
        self._copies = [weight for weight, master in self.masters.items() if master is not weight]
        if accumulate:
            for weight in self._copies:
                weight.register_post_accumulate_grad_hook(self._accumulate)

    def _accumulate(self, weight: Tensor) -> None:
        """Moves a weight's gradient to its master."""
        if weight.grad is None:
            return
        master = self.masters[weight]  # type: ignore[index]
        if master.grad is None:
            master.grad = weight.grad.float()
        else:
            master.grad.add_(weight.grad)
        weight.grad = None

    def get_param_gradient_attribute(self, weight: nn.Parameter) -> Tensor | None:
        """The gradient that the step will take; DeepSpeed's name for it."""
        return self.masters[weight].grad

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update by the clipped gradients; none, but for `overflow`, where they are not finite."""
        assert closure is None
        for weight in self._copies:
            self._accumulate(weight)
        norm = gradient_norm(self.masters, self.mesh)
        self._global_grad_norm, self.overflow = norm, not math.isfinite(norm)
        if self.overflow:
            self.zero_grad()
            return
        # What the fused update divides gradients by, as it reads them.
        self.grad_scale = None
        if 0 < self.max_norm < norm:
            device = next(iter(self.masters)).device
            self.grad_scale = torch.tensor((norm + 1e-6) / self.max_norm, device=device)
        self._update()
        for weight in self._copies:
            weight.copy_(self.masters[weight])


def _master(weight: nn.Parameter) -> nn.Parameter:
    return weight if weight.dtype == torch.float32 else nn.Parameter(weight.detach().float())


@torch.no_grad()
def gradient_norm(masters: dict[nn.Parameter, nn.Parameter], mesh: Mesh) -> float:
    """The global L2 norm of the masters' gradients, keyed by weight.

    A parameter counts once: replicated ones on the first tensor rank, tied copies on the first stage. Collective
    over the ranks that hold one model.
    """
    counted = [
        master.grad
        for weight, master in masters.items()
        if master.grad is not None
        and not getattr(weight, "ds_pipe_replicated", False)
        and (spec_of(weight).dim is not None or mesh.tensor_rank == 0)
    ]
    squares = torch.zeros((), dtype=torch.float64, device=next(iter(masters)).device)
    if counted:
        squares += torch.stack(torch._foreach_norm(counted)).double().square().sum()
    if mesh.get_model_parallel_world_size() > 1:
        dist.all_reduce(squares, group=mesh.model_group)
    return float(squares.sqrt())

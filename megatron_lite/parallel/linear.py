"""The column-parallel product, whose backward pass communicates while it computes.

Source: Megatron-LM (Korthikanti et al. 2022, arXiv:2205.05198, section 4.2.2): the gathered input is not kept but
gathered again, beside the product for the input's gradient; that gradient's sum over the ranks runs beside the
product for the weight's.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_lite.parallel.collectives import (
    SEQUENCE_DIM,
    all_gather,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from megatron_lite.parallel.mesh import Mesh


class _ColumnParallelLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, mesh: Mesh) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.mesh = mesh
        return F.linear(all_gather(x, mesh, SEQUENCE_DIM) if mesh.sequence_parallel else x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        mesh: Mesh = ctx.mesh
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        gathered = None
        if mesh.sequence_parallel and needs_weight:
            gathered = start_all_gather(x, mesh, SEQUENCE_DIM)
        summed = None
        if needs_x:
            partial = grad @ weight
            summed = (
                start_reduce_scatter(partial, mesh, SEQUENCE_DIM)
                if mesh.sequence_parallel
                else start_all_reduce(partial, mesh)
            )
        rows = grad.flatten(0, -2)
        weight_grad = None
        if needs_weight:
            weight_grad = rows.t() @ (x if gathered is None else gathered()).flatten(0, -2)
        bias_grad = rows.sum(dim=0) if needs_bias else None
        return None if summed is None else summed(), weight_grad, bias_grad, None


def column_parallel_linear(x: Tensor, weight: Tensor, bias: Tensor | None, mesh: Mesh) -> Tensor:
    """x W^T + b from the layout between sublayers to this tensor rank's output features.

    Shapes:
        x [b, s, in] (or [b, s/t, in] under sequence parallelism), weight [out/t, in], bias [out/t] -> [b, s, out/t].
    """
    if mesh.tensor_size == 1:
        return F.linear(x, weight, bias)
    return _ColumnParallelLinear.apply(x, weight, bias, mesh)

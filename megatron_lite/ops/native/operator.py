"""Differentiable operations made of plain functions: an autograd.Function for eager mode, operators for torch.compile.

The Function calls the kernels directly; an operator of torch.library would add its dispatch to every call.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

NAMESPACE = "megatron_lite"

Raw = Callable[..., Any]


def define(name: str, raw: Raw, mutates: Sequence[str] = ()) -> Raw:
    """Registers a function as operator `megatron_lite::name`, with itself as fake implementation (see `launch`).

    Args:
        raw: annotated; its results are newly allocated.
        mutates: names of the arguments that it writes to.
    """
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, torch.library.infer_schema(raw, mutates_args=tuple(mutates)))
    torch.library.impl(qualified, ("cpu", "cuda"), raw)
    torch.library.register_fake(qualified, raw)
    operator: Raw = getattr(getattr(torch.ops, NAMESPACE), name).default
    return operator


class Operator:
    """One differentiable operation.

    Args:
        name: in the namespace megatron_lite; its gradient gets the suffix _backward.
        forward: annotated; returns one tensor, or a tuple: the results first, after them what `save` may need.
        gradient: annotated; the kernel behind `backward`. None: the operation is its own gradient's kernel.
        save: `save(ctx, inputs, outputs)` keeps for the backward pass what it needs; `outputs` is a tuple.
        backward: `backward(ctx, gradient, *grads)` -> the gradients of the inputs. A result that nobody used has the
            gradient None. `gradient` is that above, or the operator made of it.
        results: how many of the outputs the caller gets.
    """

    def __init__(
        self,
        name: str,
        forward: Raw,
        gradient: Raw | None,
        save: Callable[[Any, tuple[Any, ...], tuple[Tensor, ...]], None],
        backward: Raw,
        results: int = 1,
    ) -> None:
        self.results = results
        self._eager = _function(name, forward, gradient or forward, save, backward, results).apply
        self.operator = define(name, forward)
        compiled = self.operator if gradient is None else define(f"{name}_backward", gradient)
        self.gradient = compiled

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*outputs[results:])
            save(ctx, inputs, outputs)

        def compiled_backward(ctx: Any, *grads: Tensor | None) -> Any:
            return backward(ctx, compiled, *grads[:results])

        torch.library.register_autograd(f"{NAMESPACE}::{name}", compiled_backward, setup_context=setup)

    def __call__(self, *inputs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return self._eager(*inputs)
        output = self.operator(*inputs)
        if not isinstance(output, tuple):
            return output
        return output[0] if self.results == 1 else output[: self.results]


def _function(
    name: str, forward: Raw, gradient: Raw, save: Callable[..., None], backward: Raw, results: int
) -> type[Function]:
    def run(ctx: Any, *inputs: Any) -> Any:
        output = forward(*inputs)
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.set_materialize_grads(False)
        save(ctx, inputs, outputs)
        return outputs[0] if results == 1 else outputs[:results]

    def run_backward(ctx: Any, *grads: Tensor | None) -> Any:
        return backward(ctx, gradient, *grads)

    refusing = once_differentiable(
        run_backward
    )  # to be differentiated: slow, and needed only where that is recorded

    def run_either(ctx: Any, *grads: Tensor | None) -> Any:
        return (refusing if torch.is_grad_enabled() else run_backward)(ctx, *grads)

    parts = {"forward": staticmethod(run), "backward": staticmethod(run_either)}
    return type(name, (Function,), parts)

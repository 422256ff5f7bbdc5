"""Pipeline stages: the model's list of layers as a DeepSpeed `PipelineModule`, and the engine that runs them.

Between stages travels the hidden state, and with document masking also the positions and segments, as a tuple.
"""

import contextlib
import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn
from torch.optim import Optimizer

from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.stages import Layer, stage_bounds

Activation = Tensor | tuple[Tensor, ...]
MakeContext = Callable[..., Any]


class StageLayer(nn.Module):
    """One layer of the list with the pipeline's calling convention: (hidden, *extras) in, the same out."""

    def __init__(self, layer: Layer, make_context: MakeContext) -> None:
        super().__init__()
        self.name = layer.name
        self.layer = layer.build(None)
        self.make_context = make_context

    def forward(self, inputs: Activation) -> Activation:
        return _run(self.layer, self.make_context, inputs)


def _run(module: nn.Module, make_context: MakeContext, inputs: Activation) -> Activation:
    hidden, *extras = inputs if isinstance(inputs, tuple) else (inputs,)
    hidden = module(hidden, make_context(*extras))
    return (hidden, *extras) if extras else hidden


def _run_tied(layer: Layer, make_context: MakeContext, owner: StageLayer, inputs: Activation) -> Activation:
    """A tied layer (the head) applied with the weight of the layer it is tied to (the embedding)."""
    weight = owner.layer.weight
    assert isinstance(weight, nn.Parameter)
    return _run(layer.build(weight), make_context, inputs)


class Stages(PipelineModule):
    """DeepSpeed's pipeline module with our division into stages."""

    def __init__(self, specs: list[Any], bounds: list[int], mesh: Mesh, loss: Callable[..., Tensor]) -> None:
        self._bounds = bounds
        topology = PipeModelDataParallelTopology(
            num_pp=mesh.pipeline_size, num_mp=mesh.tensor_size, num_dp=mesh.data_size
        )
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its seeds and partition
            super().__init__(specs, topology=topology, loss_fn=loss)

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self._bounds
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(start=self.parts[stage], stop=self.parts[stage + 1])


def build_pipeline(
    layers: Sequence[Layer],
    mesh: Mesh,
    make_context: MakeContext,
    loss: Callable[..., Tensor],
    blocks: Sequence[int] | None = None,
) -> Stages:
    """Builds this rank's stage.

    Args:
        layers: the whole model in order.
        make_context: called with the extra tensors of a micro-batch, gives what layers take as their context.
        loss: called on the last stage with (outputs, labels), gives a scalar.
        blocks: transformer blocks of each stage; None balances them by cost.

    Raises:
        ValueError: the blocks cannot fill the stages.
    """
    bounds = stage_bounds(layers, mesh.pipeline_size, blocks)
    owners = {layer.tied_to for layer in layers if layer.tied_to}
    by_name = {layer.name: layer for layer in layers}
    specs = []
    for layer in layers:
        if layer.tied_to is not None:
            specs.append(
                TiedLayerSpec(
                    layer.tied_to,
                    StageLayer,
                    by_name[layer.tied_to],
                    make_context,
                    forward_fn=partial(_run_tied, layer, make_context),
                    tied_weight_attr="layer.weight",
                )
            )
        elif layer.name in owners:
            specs.append(
                TiedLayerSpec(layer.name, StageLayer, layer, make_context, tied_weight_attr="layer.weight")
            )
        else:
            specs.append(LayerSpec(StageLayer, layer, make_context))
    return Stages(specs, bounds, mesh, loss)


class StageEngine(PipelineEngine):
    """DeepSpeed's pipeline engine with its reduction of tied gradients corrected, and a hook.

    Args:
        before_forward: called before each forward pass of this stage.
    """

    def __init__(
        self,
        module: Stages,
        optimizer: Optimizer,
        settings: dict[str, Any],
        before_forward: Callable[[], None],
    ) -> None:
        self._before_forward = before_forward
        super().__init__(
            args=None,
            model=module,
            optimizer=optimizer,
            mpu=module.mpu(),
            dist_init_required=False,
            config=settings,
            config_class=DeepSpeedConfig(settings, module.mpu()),
        )

    def _exec_reduce_tied_grads(self) -> None:
        # DeepSpeed reads weight.grad, which is empty where ZeRO keeps gradients in another precision: the tied
        # copies would then train apart without any error.
        for weight, group in self.module.get_tied_weights_and_groups():
            if self.using_bf16_optimizer:
                grad = weight._hp_grad
            elif hasattr(self.optimizer, "get_param_gradient_attribute"):
                grad = self.optimizer.get_param_gradient_attribute(weight)
            else:
                grad = weight.grad
            if grad is None:
                raise RuntimeError("a tied weight has no gradient: its copies would drift apart")
            dist.all_reduce(grad, group=group)

    def _exec_forward_pass(self, buffer_id: int) -> None:
        self._before_forward()
        super()._exec_forward_pass(buffer_id)


# The map holds plain functions, so that overriding a method alone changes nothing.
StageEngine._INSTRUCTION_MAP = {
    instruction: getattr(StageEngine, method.__name__)
    for instruction, method in PipelineEngine._INSTRUCTION_MAP.items()
}

"""The one door to DeepSpeed: two engines, with and without pipeline stages, behind one face.

An engine takes this rank's micro-batches of one global batch and does one optimizer step. The ways round
DeepSpeed's traps are here and in `parallel/`; each has a test that fails without it.
"""

import importlib
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)

import deepspeed  # noqa: E402
from deepspeed.runtime.engine import DeepSpeedEngine  # noqa: E402

from megatron_lite.checkpoint import KINDS, Piece, Reader, side_by_side  # noqa: E402
from megatron_lite.config import Config  # noqa: E402
from megatron_lite.data.loader import Batch  # noqa: E402
from megatron_lite.model.gpt import GPT, gpt_layers  # noqa: E402
from megatron_lite.model.runtime import Runtime  # noqa: E402
from megatron_lite.parallel.loss import weighted_loss  # noqa: E402
from megatron_lite.parallel.parameter import spec_of  # noqa: E402
from megatron_lite.parallel.pipeline import StageEngine, StageLayer, build_pipeline  # noqa: E402
from megatron_lite.training import optimizer_state  # noqa: E402
from megatron_lite.training.optimizer import WholeAdamW, build_optimizer  # noqa: E402
from megatron_lite.training.zero import (  # noqa: E402
    deepspeed_settings,
    nothing_to_partition,
    shorten_reductions,
)

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# Said on every rank of names and collectives that DeepSpeed uses, not we.
warnings.filterwarnings("ignore", "`torch.distributed.", FutureWarning)
warnings.filterwarnings("ignore", "c10d::broadcast_", UserWarning)

# DeepSpeed would compile a shared-memory all-reduce for CPUs at start (over a minute; a stale lock hangs for ever).
# Only its inference uses it.
importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
# Its Muon optimizer, which ZeRO imports but we do not use, would load torch's compiler: a second of each rank's start.
_compiler: Any = importlib.import_module("deepspeed.runtime.compiler")
_compiler.compile = lambda: _compiler.dummy_decorator


# It would take weights in bf16 for the sign that an optimizer needs one of its wrappers.
_choose_wrapper = DeepSpeedEngine._do_optimizer_sanity_check
DeepSpeedEngine._do_optimizer_sanity_check = lambda engine, optimizer: (
    None if isinstance(optimizer, WholeAdamW) else _choose_wrapper(engine, optimizer)
)


# What changes while DeepSpeed's loss scaling runs; the rest of its attributes are settings.
_LOSS_SCALE_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank.

    Attributes:
        loss: mean over the global batch's unmasked tokens, in nats.
        grad_norm: global L2 norm before clipping; inf or nan where a gradient is not finite.
        skipped: the weights were left alone (fp16 overflow, or a gradient that is not finite).
    """

    loss: float
    grad_norm: float
    skipped: bool


class Engine:
    """What the training loop drives; `build_engine` gives the right kind.

    Attributes:
        module: this rank's part of the model.
        optimizer: the torch optimizer; after DeepSpeed wrapped it, it steps the fp32 masters.
        deepspeed: DeepSpeed's engine.
    """

    module: nn.Module
    deepspeed: DeepSpeedEngine

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self.config, self.runtime, self.mesh = config, runtime, runtime.mesh
        self.settings = deepspeed_settings(config, self.mesh, runtime.device)
        deepspeed.init_distributed(dist_init_required=False)
        self.micro_batches = config.accumulation_steps(self.mesh.world_size)

    # What the two kinds do each in their way.
    def train_step(self, batches: list[Batch], step: int) -> StepResult:
        """One optimizer step on this rank's micro-batches; `step` counts those done before.

        Raises:
            ValueError: the micro-batches are not as many as the global batch needs.
        """
        raise NotImplementedError

    def eval_step(self, batches: list[Batch]) -> tuple[float, float]:
        """Loss (mean over unmasked tokens) and number of those tokens, over all ranks' micro-batches."""
        raise NotImplementedError

    def named_layers(self) -> list[tuple[str, nn.Module]]:
        """This rank's layers by canonical name, each called once a micro-batch with its activations as output."""
        raise NotImplementedError

    # What they share.
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters by canonical name."""
        return ((spec_of(parameter).name, parameter) for parameter in self.module.parameters())

    def set_learning_rate(self, rate: float) -> None:
        """Sets the rate of the next step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _build_optimizer(self, module: nn.Module) -> torch.optim.AdamW:
        if not nothing_to_partition(self.config, self.mesh.data_size):
            return build_optimizer(module.parameters(), self.config.optimizer)
        wanted = self.settings.get("data_types", {}).get("grad_accum_dtype", "fp32")
        return WholeAdamW(module.parameters(), self.config.optimizer, self.mesh, accumulate=wanted == "fp32")

    def _adopt(self, module: nn.Module, engine: DeepSpeedEngine, optimizer: torch.optim.Optimizer) -> None:
        self.module, self.deepspeed, self.optimizer = module, engine, optimizer
        shorten_reductions(engine, self.mesh)
        # Without ZeRO, in half precision, DeepSpeed makes room for the moments by a step of no gradient, which
        # Adam's bias correction would count: every update of the beginning would be too small.
        optimizer.state.clear()
        if hasattr(engine.optimizer, "check_grad_overflow"):
            # Also in fp32 and bf16: a gradient that is not finite must never reach the weights.
            engine.optimizer.check_grad_overflow = True

    def _check_count(self, batches: list[Batch]) -> None:
        """Where one rank had fewer micro-batches than its peers, they would wait for it."""
        if len(batches) != self.micro_batches:
            raise ValueError(f"a step takes {self.micro_batches} micro-batches a rank, not {len(batches)}")

    def loss_weights(self, batches: list[Batch]) -> tuple[list[Tensor], float]:
        """Per-token weights that make the sum of all ranks' losses the mean over the batch's unmasked tokens.

        DeepSpeed divides by the number of micro-batches and averages over data-parallel ranks, so that is
        multiplied in. Collective where the number of masked tokens may differ between ranks.
        """
        masks = [torch.from_numpy(batch.loss_mask) for batch in batches]
        tokens = torch.stack([mask.sum(dtype=torch.float64) for mask in masks]).sum()
        if self.config.data.eod_mask_loss and self.mesh.data_size > 1:
            tokens = tokens.to(self.runtime.device)
            dist.all_reduce(tokens, group=self.mesh.data_group)
            total = float(tokens)
        else:
            total = float(tokens) * self.mesh.data_size
        scale = len(batches) * self.mesh.data_size / max(total, 1.0)
        return [(mask * scale).to(self.runtime.device) for mask in masks], total

    def token_loss(self, logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        """The weighted loss of a micro-batch, with the z-loss while training."""
        vocab_size = self.config.model.vocab_size
        assert vocab_size is not None
        z_loss = self.config.train.z_loss if self.module.training else 0.0
        return weighted_loss(logits, labels, weights, self.mesh, vocab_size, self.runtime.ops, z_loss=z_loss)

    def extras(self, batch: Batch) -> dict[str, Any]:
        """Positions and segments of a micro-batch, where the configuration restarts them at documents."""
        arrays = {"positions": batch.position_ids, "segments": batch.segments}
        return {
            name: torch.from_numpy(array).to(self.runtime.device)
            for name, array in arrays.items()
            if array is not None
        }

    def grad_norm(self) -> float:
        """The global norm of the last step's gradient, before clipping."""
        norm = self.deepspeed.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    def _result(self, loss: Tensor) -> StepResult:
        norm = self.grad_norm()
        overflow = bool(getattr(self.deepspeed.optimizer, "overflow", False))
        if overflow and self.deepspeed.zero_cpu_offload():
            # DeepSpeed would add the next gradients to those of the step it skipped, and skip for ever.
            averaged = self.deepspeed.optimizer.averaged_gradients
            averaged.update(dict.fromkeys(averaged))
        return StepResult(float(loss), norm, overflow or not math.isfinite(norm))

    def pieces(self) -> Iterator[Piece]:
        """What this rank writes into a checkpoint: fp32 masters and Adam moments, but not of tied copies."""
        held = [p for p in self.module.parameters() if not getattr(p, "ds_pipe_replicated", False)]
        wrapper, replicated = self.deepspeed.optimizer, self.config.zero_stage == 0
        return optimizer_state.pieces(held, self.optimizer, wrapper, self.mesh, replicated)

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs beside the pieces, as JSON."""
        return {
            "optimizer_steps": optimizer_state.steps_taken(self.optimizer),
            "loss_scaler": {k: v for k, v in self._loss_scaler().items() if k in _LOSS_SCALE_STATE},
        }

    def _loss_scaler(self) -> dict[str, Any]:
        """The attributes of DeepSpeed's dynamic loss scale (fp16), under the name each of its optimizers has for it."""
        fixed = self.config.deepspeed.get("fp16", {}).get("loss_scale", 0)
        if self.config.train.precision != "fp16" or fixed:
            return {}
        for name in ("loss_scaler", "loss_scale_config"):
            if hasattr(self.deepspeed.optimizer, name):
                return vars(getattr(self.deepspeed.optimizer, name))
        return {}

    def load(self, reader: Reader, weights_only: bool = False) -> None:
        """Takes weights (and masters, moments) from a checkpoint written by any layout."""
        parameters = list(self.module.parameters())
        owned = optimizer_state.fragments(parameters, self.optimizer, self.deepspeed.optimizer)
        steps = None if weights_only else int(reader.metadata.get("engine", {}).get("optimizer_steps", 0))
        reads = optimizer_state.reads(parameters, owned, self.optimizer, reader, steps)
        jobs: list[list[optimizer_state.Read]] = []
        for parameter in parameters:
            weight, *moments = (reads.get((spec_of(parameter).name, kind), []) for kind in KINDS)
            # The master after the working copy, so that its bytes need not be fetched again.
            jobs += [[partial(self._load_weight, parameter, reader), *weight], *moments]
        side_by_side(jobs)

    def load_loss_scale(self, reader: Reader) -> None:
        """Takes the loss scale (fp16) from a checkpoint."""
        self._loss_scaler().update(reader.metadata.get("engine", {}).get("loss_scaler", {}))

    def _load_weight(self, parameter: Any, reader: Reader) -> None:
        """The working copy of a weight, in the training precision: whole, or this rank's part under ZeRO-3."""
        spec = spec_of(parameter)
        if hasattr(parameter, "ds_tensor"):
            start, numel = optimizer_state.zero3_part(parameter)
            if numel:
                optimizer_state.read_part(reader, parameter.ds_tensor.view(-1)[:numel], spec, "weight", start)
            if not getattr(parameter, "ds_persist", False):
                return  # only small parameters stay gathered on every rank
        optimizer_state.read_part(reader, parameter.data.view(-1), spec, "weight", 0)


class PlainEngine(Engine):
    """One stage: DeepSpeed's engine with ZeRO 0 to 3, tensor parallelism inside the model."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        super().__init__(config, runtime)
        with self._partitioned() if config.zero_stage == 3 else nullcontext():
            module = GPT(config.model, runtime)
        optimizer = self._build_optimizer(module)
        engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=self.settings, mpu=self.mesh, dist_init_required=False
        )
        self._adopt(module, engine, optimizer)

    def _partitioned(self) -> Any:
        """The context in which ZeRO-3 divides each layer's parameters as soon as they are made."""
        return deepspeed.zero.Init(  # no dtype: it would force bf16 on CPUs
            data_parallel_group=self.mesh.data_group,
            config_dict_or_path=self.settings,
            mpu=self.mesh,
        )

    def train_step(self, batches: list[Batch], step: int) -> StepResult:
        self._check_count(batches)
        self.deepspeed.train()
        weights, _ = self.loss_weights(batches)
        total = torch.zeros((), device=self.runtime.device)
        for number, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            clock = self.runtime.clock
            clock.step, clock.micro_batch = step, number * self.mesh.data_size + self.mesh.data_rank
            loss = self._loss(batch, weight)
            total += loss.detach()
            self.deepspeed.backward(loss)
            if number < len(batches) - 1:
                self.deepspeed.step()  # counts the micro-batch
        self.deepspeed.step()
        return self._result(self._mean(total, len(batches)))

    @torch.no_grad()
    def eval_step(self, batches: list[Batch]) -> tuple[float, float]:
        self.deepspeed.eval()
        weights, tokens = self.loss_weights(batches)
        losses = [self._loss(batch, weight) for batch, weight in zip(batches, weights, strict=True)]
        return float(self._mean(torch.stack(losses).sum(), len(batches))), tokens

    def named_layers(self) -> list[tuple[str, nn.Module]]:
        gpt = self.module
        assert isinstance(gpt, GPT)
        blocks = [(f"blocks.{number}", block) for number, block in enumerate(gpt.blocks)]
        return [
            ("embed", gpt.embed),
            ("position", gpt.position),
            *blocks,
            ("norm", gpt.norm),
            ("head", gpt.head),
        ]

    def _loss(self, batch: Batch, weights: Tensor) -> Tensor:
        tokens, labels = (torch.from_numpy(a).to(self.runtime.device) for a in (batch.tokens, batch.labels))
        logits = self.deepspeed(tokens, self.runtime.context(**self.extras(batch)))
        return self.token_loss(logits, labels, weights)

    def _mean(self, total: Tensor, count: int) -> Tensor:
        total = total / count
        if self.mesh.data_size > 1:
            dist.all_reduce(total, group=self.mesh.data_group)
        return total / self.mesh.data_size


class StagedEngine(Engine):
    """Pipeline stages: DeepSpeed's one-forward-one-backward schedule with ZeRO-1 over the data-parallel ranks."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        super().__init__(config, runtime)
        data = config.data
        flags = {"positions": data.reset_position_ids, "segments": data.reset_attention_mask}
        self._extra_names = [name for name, on in flags.items() if on]
        self._forwards = 0
        self._shape: tuple[int, ...] = ()
        module = build_pipeline(
            gpt_layers(config.model, runtime),
            self.mesh,
            lambda *extras: runtime.context(**dict(zip(self._extra_names, extras, strict=True))),
            self._loss,
            config.parallel.pipeline_partition,
        )
        optimizer = self._build_optimizer(module)
        engine = StageEngine(module, optimizer, self.settings, self._begin_micro_batch)
        self._adopt(module, engine, optimizer)

    def train_step(self, batches: list[Batch], step: int) -> StepResult:
        self._check_count(batches)
        self._expect_shape(batches)
        self.runtime.clock.step, self._forwards = step, 0
        weights, _ = self.loss_weights(batches)
        return self._result(self.deepspeed.train_batch(self._feed(batches, weights)))

    @torch.no_grad()
    def eval_step(self, batches: list[Batch]) -> tuple[float, float]:
        self._expect_shape(batches)
        weights, tokens = self.loss_weights(batches)
        loss = self.deepspeed.eval_batch(self._feed(batches, weights), num_micro_batches=len(batches))
        return float(loss), tokens

    def named_layers(self) -> list[tuple[str, nn.Module]]:
        return [(m.name, m) for m in self.module.modules() if isinstance(m, StageLayer)]

    def _expect_shape(self, batches: list[Batch]) -> None:
        """Stages keep buffers of the shape they first saw, and would fill them in part without any error."""
        shape = batches[0].tokens.shape
        if shape != self._shape:
            self.deepspeed.reset_activation_shape()
            self._shape = shape

    def _begin_micro_batch(self) -> None:
        """Called before each forward pass of this stage; micro-batches pass through it in order."""
        self.runtime.clock.micro_batch = self._forwards * self.mesh.data_size + self.mesh.data_rank
        self._forwards += 1

    def _feed(self, batches: list[Batch], weights: list[Tensor]) -> Iterator[tuple[Any, tuple[Tensor, ...]]]:
        """What the first stage ((tokens, *extras)) and the last (labels, weights) take from each micro-batch."""
        for batch, weight in zip(batches, weights, strict=True):
            tokens, extras = torch.from_numpy(batch.tokens), self.extras(batch)
            inputs = (tokens, *(extras[name] for name in self._extra_names)) if extras else tokens
            yield inputs, (torch.from_numpy(batch.labels), weight)

    def _loss(self, outputs: Any, targets: tuple[Tensor, Tensor]) -> Tensor:
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        return self.token_loss(logits, *targets)


def build_engine(config: Config, runtime: Runtime) -> Engine:
    """The engine for a configuration whose vocabulary size is known, on an initialised process group."""
    return (StagedEngine if runtime.mesh.pipeline_size > 1 else PlainEngine)(config, runtime)

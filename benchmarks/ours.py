"""Our side: the engine that a training run builds; where DeepSpeed is not installed, the same model in a plain loop."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import bare  # noqa: F401
import torch
import torch.distributed as dist
from teams import Step
from torch import Tensor, nn

from megatron_lite.config import Config
from megatron_lite.model.gpt import GPT
from megatron_lite.model.runtime import DTYPES, Runtime
from megatron_lite.ops import Needs, build_ops
from megatron_lite.parallel.loss import weighted_loss
from megatron_lite.parallel.mesh import Mesh, build_mesh
from megatron_lite.parallel.parameter import spec_of

Batches = Sequence[tuple[Tensor, Tensor]]


def has_engine() -> bool:
    """Whether what the engine imports is installed."""
    return all(importlib.util.find_spec(name) for name in ("deepspeed", "numpy", "safetensors"))


def random_batches(config: Config, device: str = "cpu") -> list[tuple[Tensor, Tensor]]:
    """Tokens and labels of each micro-batch of a global batch, [b, s] int64; their values do not change the work."""
    assert config.model.vocab_size is not None
    shape = (config.train.global_batch_size, config.model.seq_length + 1)
    rows = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(
        device
    )
    size = config.train.micro_batch_size
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in rows.split(size)]


def engine_step(rank: int, store: str, config: Config, ranks: int, device: str) -> Step:
    """One training step of ours on this rank, on a fixed global batch."""
    engine = make_engine(rank, store, config, ranks, device)
    batches = as_batches(random_batches(config)[engine.mesh.data_rank :: engine.mesh.data_size])
    return lambda: engine.train_step(batches, 0)


def make_engine(rank: int, store: str, config: Config, ranks: int, device_name: str) -> Any:
    """The engine of a training run on this rank."""
    from megatron_lite.parallel.launch import Launch, choose_device, init_distributed

    launch = Launch(rank=rank, world_size=ranks, local_rank=rank, local_size=ranks)
    device = choose_device(device_name, launch)  # before DeepSpeed is imported, which then knows of it

    from megatron_lite.training.allocator import set_cpu_allocator
    from megatron_lite.training.engine import build_engine

    if device.type == "cpu" and config.kernels.cpu_allocator:
        set_cpu_allocator()
    if ranks > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        meeting = dist.FileStore(store, ranks)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=meeting, rank=rank, world_size=ranks)
    init_distributed(launch, device, timeout_minutes=5)
    parallel = config.parallel
    mesh = build_mesh(parallel.tensor, parallel.pipeline, parallel.sequence_parallel)
    return build_engine(config, make_runtime(config, device, mesh))


def make_runtime(config: Config, device: torch.device, mesh: Mesh) -> Runtime:
    train, dtype = config.train, DTYPES[config.train.precision]
    return Runtime(
        mesh=mesh,
        ops=build_ops(config.kernels, Needs.of(config, device, dtype)),
        dtype=dtype,
        device=device,
        seed=train.seed,
        recompute=train.recompute,
    )


def as_batches(pairs: Batches) -> list[Any]:
    """Tokens and labels as the engine takes them."""
    import numpy as np

    from megatron_lite.data.loader import Batch

    return [
        Batch(tokens.numpy(), labels.numpy(), np.ones(tuple(labels.shape), np.float32), None, None)
        for tokens, labels in pairs
    ]


def loop_step(rank: int, store: str, config: Config, device: str) -> Step:
    """One training step of our model without DeepSpeed, on a fixed global batch."""
    batches = random_batches(config, device)
    loop = Loop(config, torch.device(device))
    return lambda: loop.step(batches)


class Loop:
    """Our model and operations in one process, with torch's fused AdamW on fp32 masters of the weights."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.limit = config, config.optimizer.grad_clip
        self.runtime = make_runtime(config, device, Mesh())
        self.model = GPT(config.model, self.runtime)
        self.weights = list(self.model.parameters())
        copied = self.runtime.dtype != torch.float32
        self.masters = [nn.Parameter(p.detach().float()) for p in self.weights] if copied else self.weights
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for weight, master in zip(self.weights, self.masters, strict=True):
            groups[spec_of(weight).decays].append(master)
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(
            [
                {"params": members, "weight_decay": settings.weight_decay if decays else 0.0}
                for decays, members in groups.items()
                if members
            ],
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=True,
        )

    def step(self, batches: Batches) -> tuple[Tensor, Tensor]:
        """One step: the loss, and the gradient norm before clipping."""
        vocab_size = self.config.model.vocab_size
        assert vocab_size is not None
        tokens_in_all = sum(labels.numel() for _, labels in batches)
        total = torch.zeros((), device=self.runtime.device)
        for number, (tokens, labels) in enumerate(batches):
            weights = torch.full(labels.shape, 1 / tokens_in_all, device=labels.device)
            logits = self.model(tokens)
            loss = weighted_loss(logits, labels, weights, self.runtime.mesh, vocab_size, self.runtime.ops)
            loss.backward()
            total += loss.detach()
            self._move_gradients(first=number == 0)
        norm = nn.utils.clip_grad_norm_(self.masters, self.limit)
        self.optimizer.step()
        if self.masters is self.weights:
            self.optimizer.zero_grad(set_to_none=True)
        else:
            with torch.no_grad():
                torch._foreach_copy_(self.weights, self.masters)
        return total, norm

    @torch.no_grad()
    def _move_gradients(self, first: bool) -> None:
        """Adds the gradients of half-precision weights to those of their fp32 masters."""
        if self.masters is self.weights:
            return
        for weight, master in zip(self.weights, self.masters, strict=True):
            assert weight.grad is not None
            if master.grad is None:
                master.grad = weight.grad.float()
            elif first:
                master.grad.copy_(weight.grad)
            else:
                master.grad += weight.grad
            weight.grad = None

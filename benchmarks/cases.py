"""What benchmarks/ops.py compares: each operation on inputs of a model's size, the plain way and ours.

The plain way is what the author of nanoGPT or of a Hugging Face model writes with torch's functions. The bytes are the
least that forward and backward move: every activation and gradient once for each time it must cross memory, as if
statistics, weights and masks weighed nothing.
"""

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import bare  # noqa: F401
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.config import KernelsConfig
from megatron_lite.ops import Documents, Needs, Ops, ProbabilityDropout, build_ops
from megatron_lite.ops.registry import GROUPS, usable
from megatron_lite.parallel.loss import weighted_loss
from megatron_lite.parallel.mesh import Mesh

EPS = 1e-5
DROPPED = 0.2


@dataclass(frozen=True)
class Size:
    """Sizes of a model and of a batch; attention alone sees `heads`, `groups` and whole sequences."""

    name: str
    batch: int
    seq: int
    hidden: int
    heads: int
    groups: int
    ffn: int
    vocab: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


SIZES = {
    "cpu": (
        Size("384", 16, 256, 384, 6, 6, 1536, 65),  # shakespeare_char.json
        Size("768", 2, 1024, 768, 12, 12, 3072, 50304),
        Size("2048", 4, 1024, 2048, 16, 4, 5632, 50304),
    ),
    "cuda": (
        Size("768", 16, 1024, 768, 12, 12, 3072, 50304),
        Size("4096", 2, 4096, 4096, 32, 8, 14336, 128256),  # Llama 3 8B
    ),
    "tiny": (Size("tiny", 2, 16, 32, 4, 2, 64, 99),),
}


@dataclass
class Case:
    """One row of the table.

    Attributes:
        ops: fields of `Ops` that ours uses.
        backend: what serves them.
        leaves: inputs with a gradient; every side gets copies of its own.
        moved: least bytes of forward and backward; flops: operations of a compute-bound one (then `moved` is 0).
        plain_leaves: where the plain way holds its inputs otherwise.
        random: dropout; values cannot be compared.
        others: further sides, on copies of `plain_leaves`.
    """

    name: str
    shape: str
    ops: tuple[str, ...]
    backend: str
    leaves: tuple[Tensor, ...]
    plain: Callable[..., Any]
    ours: Callable[..., Any]
    moved: float = 0.0
    flops: float = 0.0
    plain_leaves: tuple[Tensor, ...] = ()
    random: bool = False
    others: dict[str, Callable[..., Any]] = field(default_factory=dict)


class Cases:
    """Makes the cases of one size and type.

    Args:
        others: Liger's kernels where installed, and for attention every backend that can serve, as well.
    """

    def __init__(self, size: Size, dtype: torch.dtype, device: str, others: bool) -> None:
        self.size, self.dtype, self.device, self.others = size, dtype, device, others
        self.needs = replace(
            Needs.on(torch.device(device), dtype), head_dim=size.head_dim, grouped=size.groups < size.heads
        )
        self.ops: Ops = build_ops(KernelsConfig(), self.needs)
        self.makers: dict[str, Callable[[], Case]] = {
            "layer_norm": lambda: self.norm(rms=False, add=False),
            "rms_norm": lambda: self.norm(rms=True, add=False),
            "add_layer_norm": lambda: self.norm(rms=False, add=True),
            "add_rms_norm": lambda: self.norm(rms=True, add=True),
            "gelu": lambda: self.gelu("gelu", bias=False),
            "gelu_tanh, bias": lambda: self.gelu("gelu_tanh", bias=True),
            "swiglu": self.swiglu,
            "rotary": self.rotary,
            "softmax, causal": lambda: self.softmax(documents=False),
            "softmax, documents": lambda: self.softmax(documents=True),
            "attention": self.attention,
            "attention, documents": lambda: self.attention(documents=True),
            "attention, dropout": lambda: self.attention(dropped=True),
            "dropout": self.dropout,
            "cross entropy": self.cross_entropy,
            "linear": self.linear,
        }

    def __iter__(self) -> Iterator[tuple[str, Callable[[], Case]]]:
        return iter(self.makers.items())

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def heads_first(self, heads: int) -> Tensor:
        """[b, heads, s, d] as it leaves a projection: a transposed view."""
        size = self.size
        return self.randn(size.batch, size.seq, heads, size.head_dim).transpose(1, 2)

    def backend(self, name: str) -> str:
        return self.ops.chosen[next(group for group, names in GROUPS.items() if name in names)]

    def liger(self, name: str, call: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
        """Liger's kernel as a further side: `call(function, *leaves)`; nothing where it is not installed."""
        if not self.others or importlib.util.find_spec("liger_kernel") is None:
            return {}
        from liger_kernel.transformers import functional

        function = getattr(functional, f"liger_{name}", None)
        return {} if function is None else {"Liger": lambda *leaves: call(function, *leaves)}

    def norm(self, rms: bool, add: bool) -> Case:
        size, ops = self.size, self.ops
        x = self.randn(size.batch * size.seq, size.hidden)
        leaves = (x, *([torch.randn_like(x)] if add else []), torch.ones_like(x[0]))
        kind, shape = "rms_norm" if rms else "layer_norm", x.shape[-1:]
        if not rms:
            leaves = (*leaves, torch.zeros_like(x[0]))

        def plain_norm(x: Tensor, *parameters: Tensor) -> Tensor:
            return (F.rms_norm if rms else F.layer_norm)(x, shape, *parameters, eps=EPS)

        def plain(x: Tensor, *rest: Tensor) -> Any:
            if not add:
                return plain_norm(x, *rest)
            total = x + rest[0]
            return plain_norm(total, *rest[1:]), total

        name = f"add_{kind}" if add else kind
        ours = getattr(ops, name)
        other = f"fused_{name}" if add else name
        return Case(
            name,
            _shape(x),
            (name,),
            self.backend(name),
            leaves,
            plain,
            lambda *leaves: ours(*leaves, EPS),
            moved=(8 if add else 5) * _bytes(x),
            others=self.liger(other, lambda function, *leaves: function(*leaves, EPS)),
        )

    def gelu(self, name: str, bias: bool) -> Case:
        x = self.randn(self.size.batch * self.size.seq, self.size.ffn)
        ours, how = getattr(self.ops, name), "tanh" if name == "gelu_tanh" else "none"

        def plain(x: Tensor, *bias: Tensor) -> Tensor:
            return F.gelu(x + bias[0] if bias else x, approximate=how)

        leaves = (x, self.randn(self.size.ffn)) if bias else (x,)
        return Case(
            f"{name}, bias" if bias else name,
            _shape(x),
            (name,),
            self.backend(name),
            leaves,
            plain,
            ours,
            moved=5 * _bytes(x),
        )

    def swiglu(self) -> Case:
        gate, up = (self.randn(self.size.batch * self.size.seq, self.size.ffn) for _ in range(2))
        return Case(
            "swiglu",
            _shape(gate),
            ("swiglu",),
            self.backend("swiglu"),
            (torch.cat((gate, up), dim=-1),),
            lambda gate, up: F.silu(gate) * up,
            self.ops.swiglu,
            moved=8 * _bytes(gate),
            plain_leaves=(gate, up),
            others=self.liger("swiglu", lambda function, gate, up: function(gate, up)),
        )

    def rotary(self) -> Case:
        size = self.size
        q, k = self.heads_first(size.heads), self.heads_first(size.groups)
        half = size.head_dim // 2
        frequencies = 10000.0 ** (-torch.arange(half, device=self.device) / half)
        angles = torch.outer(torch.arange(size.seq, device=self.device), frequencies)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        low_cos, low_sin = cos.to(self.dtype), sin.to(self.dtype)

        def rotate(x: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return x * low_cos + torch.cat((-second, first), dim=-1) * low_sin

        return Case(
            "rotary",
            f"{_shape(q)} and {size.groups} heads",
            ("rotary",),
            self.backend("rotary"),
            (q, k),
            lambda q, k: (rotate(q), rotate(k)),
            lambda q, k: self.ops.rotary(q, k, cos, sin),
            moved=4 * (_bytes(q) + _bytes(k)),
            others=self.liger("rope", lambda function, q, k: function(q, k, low_cos[None], low_sin[None])),
        )

    def documents(self, batch: int) -> Documents:
        """About four documents a row."""
        seq = self.size.seq
        numbers = (torch.rand(batch, seq, device=self.device) < 4 / seq).cumsum(-1, dtype=torch.int32)
        return Documents(numbers, numbers)

    def softmax(self, documents: bool) -> Case:
        size, ops = self.size, self.ops
        batch = size.batch if size.seq <= 256 else 1
        x = self.randn(batch, size.heads, size.seq, size.seq)
        within = self.documents(batch) if documents else None
        seen = torch.ones(size.seq, size.seq, dtype=torch.bool, device=self.device).tril()
        if within is not None:
            seen = within.mask
        scale = size.head_dim**-0.5
        # Read and gradient: half of each; written: the zeros as well.
        return Case(
            "softmax, documents" if documents else "softmax, causal",
            _shape(x),
            ("softmax",),
            self.backend("softmax"),
            (x,),
            lambda x: (x * scale).masked_fill(~seen, -torch.inf).softmax(-1),
            lambda x: ops.softmax(x, scale=scale, causal=True, documents=within),
            moved=(2 + 3 * float(seen.float().mean())) * _bytes(x),
        )

    def attention(self, documents: bool = False, dropped: bool = False) -> Case:
        size = self.size
        q, k, v = (self.heads_first(heads) for heads in (size.heads, size.groups, size.groups))
        within = self.documents(size.batch) if documents else None
        mask = None if within is None else within.mask
        repeats = size.heads // size.groups
        grouped = repeats > 1 and self.device == "cuda"
        p = DROPPED if dropped else 0.0

        def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if repeats > 1 and not grouped:  # Hugging Face's repeat_kv
                k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=p, is_causal=mask is None, enable_gqa=grouped
            )

        dropout = ProbabilityDropout(p, seed=7) if dropped else None
        needs = replace(self.needs, attention_dropout=dropped, documents="runs" if documents else "none")
        ops = build_ops(KernelsConfig(), needs)

        def attend(ops: Ops) -> Callable[..., Tensor]:
            return lambda q, k, v: ops.attention(q, k, v, documents=within, dropout=dropout)

        chosen = ops.chosen["attention"]
        others = {
            name: attend(build_ops(KernelsConfig.model_validate_json(f'{{"attention": "{name}"}}'), needs))
            for name in (usable("attention", needs) if self.others else ())
            if name not in (chosen, "compile", "reference")
        }
        pairs = size.batch * size.seq * (size.seq + 1) / 2 if mask is None else float(mask.sum())
        name = "attention" + (", documents" if documents else "") + (", dropout" if dropped else "")
        return Case(
            name,
            f"{_shape(q)} and {size.groups} heads",
            ("attention",),
            chosen,
            (q, k, v),
            plain,
            attend(ops),
            flops=14 * size.head_dim * size.heads * pairs,  # 4 forward, 10 backward
            random=dropped,
            others=others,
        )

    def dropout(self) -> Case:
        x = self.randn(self.size.batch, self.size.seq, self.size.hidden)
        return Case(
            "dropout",
            _shape(x),
            ("dropout",),
            self.backend("dropout"),
            (x,),
            lambda x: F.dropout(x, DROPPED, training=True),
            lambda x: self.ops.dropout(x, DROPPED, 7),
            moved=4 * _bytes(x),
            random=True,
        )

    def cross_entropy(self) -> Case:
        rows, vocab = min(self.size.batch * self.size.seq, 8192), self.size.vocab
        if self.device == "cpu" and vocab > 1000:
            rows = min(rows, 2048)
        x = self.randn(rows, vocab)
        labels = torch.randint(vocab, (rows,), device=self.device)
        weights = torch.full((rows,), 1 / rows, device=self.device)
        mesh = Mesh()
        return Case(
            "cross entropy",
            _shape(x),
            ("cross_entropy_grad", "cross_entropy_stats"),
            self.backend("cross_entropy_grad"),
            (x,),
            lambda x: F.cross_entropy(x.float(), labels),  # nanoGPT's autocast and Hugging Face's loss alike
            lambda x: weighted_loss(x, labels, weights, mesh, vocab, self.ops),
            moved=3 * _bytes(x),
            others=self.liger("cross_entropy", lambda function, x: function(x, labels)),
        )

    def linear(self) -> Case:
        size = self.size
        x = self.randn(size.batch * size.seq, size.hidden)
        weight = self.randn(size.ffn, size.hidden)
        return Case(
            "linear",
            f"{_shape(x)} by {size.ffn}",
            ("linear",),
            self.backend("linear"),
            (x, weight),
            F.linear,
            self.ops.linear,
            flops=6.0 * x.size(0) * weight.numel(),
        )


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _shape(x: Tensor) -> str:
    return " x ".join(map(str, x.shape))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm().clamp(min=math.ulp(0.0)))

"""The operations and a training step on a GPU, with nothing installed but torch: no hypothesis, no DeepSpeed.

At sizes of real models, and odd ones. The kernels themselves are in test_kernels_gpu.py.
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_lite.config import KernelsConfig, build_config
from megatron_lite.ops import Documents, Needs, ProbabilityDropout, build_ops, reference
from megatron_lite.ops.registry import usable
from megatron_lite.parallel.loss import vocab_parallel_cross_entropy
from megatron_lite.parallel.mesh import Mesh
from tests.csrc.emulation import same_or_better
from tests.ops.native.cases import Case, norm_terms, numbers, tables

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
TYPES = [torch.float32, torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", TYPES, ids=str)


def draw(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return numbers(*shape, dtype=dtype, device=DEVICE, seed=seed)


@dtypes
@pytest.mark.parametrize(("rows", "cols"), [(4096, 768), (1000, 4096), (333, 1281)])
def test_norms(rows: int, cols: int, dtype: torch.dtype) -> None:
    x, residual = draw(dtype, rows, cols), draw(dtype, rows, cols, seed=1)
    weight, bias = draw(dtype, cols, seed=2), draw(dtype, cols, seed=3)
    eps = {"eps": 1e-5}
    Case("layer_norm", [x, weight, bias], eps, norm_terms(x, None, 1)).check()
    Case("rms_norm", [x, weight], eps, norm_terms(x, None, 1)).check()
    Case("add_layer_norm", [x, residual, weight, bias], eps, norm_terms(x, residual, 2)).check()
    Case("add_rms_norm", [x, residual, weight], eps, norm_terms(x, residual, 2)).check()


@dtypes
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "swiglu"])
@pytest.mark.parametrize(("rows", "cols"), [(2048, 3072), (300, 1282)])
def test_activations(rows: int, cols: int, name: str, dtype: torch.dtype) -> None:
    x, bias = draw(dtype, rows, cols), draw(dtype, cols, seed=1)
    terms = [4.0, 4.0, 10 * rows**0.5]
    Case(name, [x, bias], {}, terms).check()
    Case(name, [x, None], {}, terms).check()


@dtypes
def test_rotary_and_dropout(dtype: torch.dtype) -> None:
    q, k = draw(dtype, 2, 500, 32, 128).transpose(1, 2), draw(dtype, 2, 500, 8, 128).transpose(1, 2)
    Case("rotary", [q, k], tables(500, 64, None, DEVICE), [8.0] * 4).check()
    Case("dropout", [draw(dtype, 64, 1001)], {"p": 0.3, "seed": 2**40 + 7, "offset": 3}).check()


@dtypes
def test_cross_entropy(dtype: torch.dtype) -> None:
    """Against torch in float64; the logits become the gradient in place."""
    ops = build_ops(KernelsConfig(), Needs.on(torch.device(DEVICE), dtype))
    labels = torch.randint(50257, (1000,), device=DEVICE)
    logits = draw(dtype, 1000, 50304)
    exact, plain = logits[:, :50257].double().requires_grad_(), logits[:, :50257].clone().requires_grad_()
    for x in (exact, plain):
        F.cross_entropy(x if x is exact else x.float(), labels, reduction="sum").backward()
    leaf = logits.clone().requires_grad_()
    loss = vocab_parallel_cross_entropy(leaf, labels, Mesh(), 50257, ops)
    fine = F.cross_entropy(exact.detach(), labels, reduction="none")
    same_or_better(loss.detach(), fine.float(), fine, magnitude=20.0)
    loss.sum().backward()
    assert leaf.grad is not None and plain.grad is not None and exact.grad is not None
    same_or_better(leaf.grad[:, :50257], plain.grad, exact.grad)
    assert not leaf.grad[:, 50257:].any()


def attend_needs(dtype: torch.dtype, head_dim: int) -> Needs:
    return replace(Needs.on(torch.device(DEVICE), dtype), head_dim=head_dim, grouped=True, documents="runs")


@dtypes
@pytest.mark.parametrize(("seq", "head_dim"), [(1024, 64), (777, 128), (65, 80)])
def test_every_attention_backend(seq: int, head_dim: int, dtype: torch.dtype) -> None:
    """Grouped heads, with documents and without."""
    needs = attend_needs(dtype, head_dim)
    q = draw(dtype, 2, seq, 8, head_dim).transpose(1, 2)
    k, v = (draw(dtype, 2, seq, 2, head_dim, seed=seed).transpose(1, 2) for seed in (1, 2))
    within = (torch.arange(seq, device=DEVICE) // 100).int().expand(2, seq).contiguous()
    for name in usable("attention", needs):
        ops = build_ops(KernelsConfig.model_validate_json(f'{{"attention": "{name}"}}'), needs)
        for documents in (None, Documents(within, within)):
            case = Case("attention", [q, k, v], {"documents": documents}, [0.0, 4.0, 4.0, 4.0])
            if name == "native":
                case.check(ops.attention)
            else:
                check_norms(case, ops.attention)


def check_norms(case: Case, function: Callable[..., Tensor]) -> None:
    """Other people's kernels: the norm of the error at most four times that of plain torch."""
    calls = ((function, None), (reference.attention, None), (reference.attention, torch.float64))
    ours, plain, exact = ([*found, *grads] for found, grads in (case.run(*call) for call in calls))
    for found, rough, fine in zip(ours, plain, exact, strict=True):
        assert found is not None and rough is not None and fine is not None
        errors = [float((x.double() - fine).norm() / fine.norm()) for x in (found, rough)]
        assert errors[0] <= 4 * errors[1] + torch.finfo(found.dtype).eps, errors


def test_attention_with_dropout() -> None:
    """The kernel drops the same probabilities as the reference."""
    for dtype in (torch.bfloat16, torch.float16):
        needs = replace(attend_needs(dtype, 64), attention_dropout=True)
        ops = build_ops(KernelsConfig(), needs)
        q, k, v = (draw(dtype, 2, 4, 300, 64, seed=seed) for seed in range(3))
        given = {"dropout": ProbabilityDropout(0.2, seed=5)}
        Case("attention", [q, k, v], given, [0.0, 4.0, 4.0, 4.0]).check(ops.attention)


def test_compiled() -> None:
    """The operations in one graph, by torch's own compiler."""
    if importlib.util.find_spec("triton") is None and DEVICE == "cuda":
        pytest.skip("torch.compile needs triton")
    dtype = torch.bfloat16
    ops = build_ops(KernelsConfig(), Needs.on(torch.device(DEVICE), dtype))

    def block(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        normed, total = ops.add_rms_norm(x, residual, weight, 1e-5)
        return ops.swiglu(torch.cat((normed, total), -1)) + ops.dropout(ops.gelu(normed), 0.3, 7)

    x, residual, weight = draw(dtype, 512, 1024), draw(dtype, 512, 1024, seed=1), draw(dtype, 1024, seed=2)
    leaves = [tensor.requires_grad_() for tensor in (x, residual, weight)]
    found = []
    for function in (block, torch.compile(block, fullgraph=True)):
        y = function(*leaves)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.detach().abs().max()))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_training_step(kind: str) -> None:
    """Five steps of our model in a plain loop give the losses and gradient norms of the same on the CPU."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from ours import Loop, random_batches  # type: ignore[import-not-found]

    llama = {"position_embedding": "rope", "normalization": "RMSNorm", "activation": "swiglu"}
    llama |= {"num_query_groups": 2, "add_bias_linear": False, "tie_embeddings": False}
    model = {
        "num_layers": 2,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "seq_length": 128,
        "vocab_size": 1000,
    }
    found = {}
    for name, device, precision in (
        ("exact", "cpu", "fp32"),
        ("fp32", DEVICE, "fp32"),
        ("bf16", DEVICE, "bf16"),
    ):
        config = build_config(
            {
                "model": model | (llama if kind == "llama" else {}),
                "train": {
                    "micro_batch_size": 2,
                    "global_batch_size": 4,
                    "steps": 5,
                    "precision": precision,
                    "output_dir": "unused",
                },
                "optimizer": {"lr": 0.001},
            }
        )
        loop, batches = Loop(config, torch.device(device)), random_batches(config, device)
        found[name] = torch.tensor([[float(part) for part in loop.step(batches)] for _ in range(5)])
    assert found["exact"][-1, 0] < found["exact"][0, 0] - 0.1
    torch.testing.assert_close(found["fp32"], found["exact"], rtol=1e-3, atol=0)
    torch.testing.assert_close(found["bf16"], found["exact"], rtol=2e-2, atol=0)

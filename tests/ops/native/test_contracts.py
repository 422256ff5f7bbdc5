"""What the operations promise beside numbers: what they keep, compute, refuse, and how they fit into autograd."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from megatron_lite.ops import Documents, ProbabilityDropout, native, reference
from megatron_lite.ops.native import kernels, norm
from tests.ops.native.cases import Case, documents, numbers, tables

F32, BF16 = torch.float32, torch.bfloat16


def cases(dtype: torch.dtype = F32, rows: int = 6, cols: int = 8) -> dict[str, Case]:
    """One call of each differentiable operation."""

    def new(seed: int, *shape: int) -> Tensor:
        return numbers(*(shape or (rows, cols)), dtype=dtype, seed=seed)

    weight, bias, heads = new(1, cols), new(2, cols), (2, 4, rows, cols)
    groups = (2, 2, rows, cols)
    every = [
        Case("layer_norm", [new(0), weight, bias], {"eps": 1e-5}),
        Case("rms_norm", [new(0), weight], {"eps": 1e-5}),
        Case("add_layer_norm", [new(0), new(3), weight, bias], {"eps": 1e-5}),
        Case("add_rms_norm", [new(0), new(3), weight], {"eps": 1e-5}),
        Case("gelu", [new(0), bias]),
        Case("gelu_tanh", [new(0), bias]),
        Case("swiglu", [new(0), bias]),
        Case("dropout", [new(0)], {"p": 0.3, "seed": 1}),
        Case("rotary", [new(0, *heads), new(1, *groups)], tables(rows, cols)),
        Case("softmax", [new(0, 2, 4, rows, rows)], {"documents": documents(2, rows, rows)}),
        Case(
            "attention",
            [new(0, *heads), new(1, *groups), new(3, *groups)],
            {"dropout": ProbabilityDropout(0.2, 3)},
        ),
    ]
    return {case.name: case for case in every}


NAMES = list(cases())
names = pytest.mark.parametrize("name", NAMES)

# What is kept for the backward pass beside inputs; "out" is a result.
KEPT = {
    "layer_norm": ["mean", "rstd"],
    "rms_norm": ["rstd"],
    "add_layer_norm": ["out", "mean", "rstd"],
    "add_rms_norm": ["out", "rstd"],
    "softmax": ["out"],
    "attention": ["out", "lse"],
}


def kept_by(case: Case) -> tuple[list[str], list[Tensor]]:
    """The kinds of tensors that a call saves beside its inputs, and all that it saves."""
    saved: list[Tensor] = []
    inputs = [x.detach().requires_grad_() for x in case.inputs if x is not None]
    with saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        found = getattr(native, case.name)(*inputs, **case.given)
    results = found if isinstance(found, tuple) else (found,)
    tensors = [*inputs, *case.given.values(), *vars(case.given.get("documents", object)).values()]
    known = {x.data_ptr() for x in tensors if isinstance(x, Tensor)}
    kinds, rows = [], results[0].numel() // results[0].size(-1)
    for x in saved:
        if x.data_ptr() in {y.data_ptr() for y in results}:
            kinds.append("out")
        elif x.numel() and x.data_ptr() not in known:
            assert x.dtype == F32 and x.numel() == rows
            kinds.append("statistics")
    return kinds, saved


@names
def test_little_is_kept(name: str) -> None:
    wanted = ["statistics" if kind != "out" else kind for kind in KEPT.get(name, [])]
    assert kept_by(cases()[name])[0] == wanted


def test_dropout_and_rotary_keep_no_activations() -> None:
    assert kept_by(cases()["dropout"])[1] == []
    assert [x.shape for x in kept_by(cases()["rotary"])[1]] == [(6, 8), (6, 8)]


@names
def test_nothing_is_kept_without_gradients(name: str) -> None:
    case, saved = cases()[name], []
    function = getattr(native, name)
    inputs = [x.detach().requires_grad_() for x in case.inputs if x is not None]
    with saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x), torch.no_grad():  # type: ignore[func-returns-value]
        quiet = function(*inputs, **case.given)
    assert saved == []
    loud = case.run(function)[0]
    for a, b in zip(quiet if isinstance(quiet, tuple) else (quiet,), loud, strict=True):
        assert not a.requires_grad and torch.equal(a, b)


@names
def test_gradients_for_those_who_want_them(name: str) -> None:
    """The same, whoever else wants one."""
    case, function = cases()[name], getattr(native, name)
    everything = case.run(function)[1]
    for i in range(len(case.inputs)):
        only = case.run(function, needs=[i])[1]
        assert [g is not None for g in only] == [j == i for j in range(len(only))]
        assert torch.equal(only[i], everything[i])  # type: ignore[arg-type]


def launched(monkeypatch: pytest.MonkeyPatch, module: Any) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []
    launch = module.launch
    monkeypatch.setattr(module, "launch", lambda *given: (calls.append(given), launch(*given)))
    return calls


def test_a_frozen_bias_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, case = launched(monkeypatch, norm), cases()["layer_norm"]
    for needs in ([0, 1], [0, 1, 2]):
        case.run(native.layer_norm, needs=needs)
    dbias = [given[-3].numel() for given in calls if given[0] == "norm_backward"]
    assert dbias == [0, 8]


def test_q_and_k_from_one_projection_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = launched(monkeypatch, importlib.import_module("megatron_lite.ops.native.rotary"))
    together = numbers(2, 6, 3, 4, 8, dtype=F32)  # [b, s, q k v, heads, d]
    q, k, _ = (x.transpose(1, 2) for x in together.unbind(2))
    turned, _ = native.rotary(q, k, **tables(6, 8))
    assert calls[0][8] is q and calls[0][12] is k
    assert turned.transpose(1, 2).is_contiguous()  # in memory [b, s, heads, d] as well


def test_attention_reads_and_writes_where_the_linear_layers_do(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = launched(monkeypatch, importlib.import_module("megatron_lite.ops.native.attention"))
    together = numbers(2, 6, 3, 4, 8, dtype=F32).requires_grad_()
    q, k, v = (x.transpose(1, 2) for x in together.unbind(2))
    out = native.attention(q, k, v)
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()
    assert [x.data_ptr() for x in calls[0] if x is not out and isinstance(x, Tensor)][1:4] == [
        x.data_ptr() for x in (q, k, v)
    ]


@names
def test_used_twice_and_walked_twice(name: str) -> None:
    case, function = cases()[name], getattr(native, name)
    leaves = [x.detach().clone().requires_grad_() for x in case.inputs if x is not None]

    def total() -> Tensor:
        found = function(*leaves, **case.given)
        return sum(
            (y.square().sum() for y in (found if isinstance(found, tuple) else (found,))), torch.zeros(())
        )

    once = torch.autograd.grad(total(), leaves)
    both = total() + total()
    for _ in range(2):
        for ours, single in zip(torch.autograd.grad(both, leaves, retain_graph=True), once, strict=True):
            torch.testing.assert_close(ours, 2 * single)


@names
def test_second_derivatives_are_refused(name: str) -> None:
    case = cases()[name]
    leaves = [x.detach().clone().requires_grad_() for x in case.inputs if x is not None]
    found = getattr(native, name)(*leaves, **case.given)
    y = found[0] if isinstance(found, tuple) else found
    (first,) = torch.autograd.grad(y.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("name", ["add_layer_norm", "add_rms_norm", "rotary"])
@pytest.mark.parametrize("used", [0, 1])
def test_one_of_two_results_is_enough(name: str, used: int) -> None:
    case = cases()[name]

    def grads(function: Callable[..., Any]) -> tuple[Tensor | None, ...]:
        leaves = [x.detach().clone().requires_grad_() for x in case.inputs if x is not None]
        y = function(*leaves, **case.given)[used]
        return torch.autograd.grad(y.sin().sum(), leaves, allow_unused=True)

    for ours, theirs in zip(grads(getattr(native, name)), grads(getattr(reference, name)), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def peak(run: Callable[[], object]) -> int:
    """Most bytes that tensors allocated while `run` ran took at once."""
    run()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        kept = run()
    del kept
    assert profile.profiler is not None
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert most > 0
    return most


@names
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_peak_memory_is_not_above_that_of_plain_torch(name: str, dtype: torch.dtype) -> None:
    case = cases(dtype, rows=512, cols=256)[name]

    def bytes_of(module: Any) -> int:
        return peak(lambda: case.run(getattr(module, name)))

    # Partial sums over blocks of rows come on top where torch computes the gradient of a weight in one go.
    assert bytes_of(native) <= bytes_of(reference) * 1.05


@names
def test_fake_tensors_look_like_the_real_ones(name: str) -> None:
    case = cases(BF16)[name]
    real = case.run(getattr(native, name))
    with FakeTensorMode() as mode:
        fake_case = Case(name, [None if x is None else mode.from_tensor(x) for x in case.inputs])
        for key, value in case.given.items():
            fake_case.given[key] = mode.from_tensor(value) if isinstance(value, Tensor) else value
        if "documents" in case.given:
            fake_case.given["documents"] = None
        leaves = [x.detach().requires_grad_() for x in fake_case.inputs if x is not None]
        found = getattr(native, name)(*leaves, **fake_case.given)
        results = found if isinstance(found, tuple) else (found,)
        grads = torch.autograd.grad(results, leaves, [torch.empty_like(y) for y in results])
    for ours, theirs in zip([*results, *grads], [y for kind in real for y in kind], strict=True):
        assert theirs is not None
        assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride())


def test_what_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    serves = native.serves
    assert serves("cpu", F32) is None and serves("cpu", BF16, "softmax") is None
    assert serves("cpu", torch.float64) == "on cpu the kernels take float32 and bfloat16, not float64"
    assert "not float16" in str(serves("cpu", torch.float16))
    assert serves("xpu", F32) == "there are kernels for cpu and cuda, none for xpu"

    class Module:
        cuda_compiled = False
        cpu_norm_forward = None

    monkeypatch.setattr(kernels, "_module", Module())
    assert "built without CUDA" in str(serves("cuda", BF16))
    assert "built without attention on cpu" in str(serves("cpu", BF16, "attention"))
    Module.cuda_compiled = True
    assert "bfloat16 and float16, not float32" in str(serves("cuda", F32, "attention"))
    monkeypatch.setattr(kernels, "_module", None)
    monkeypatch.setattr(kernels, "_missing", "the kernels are not built (why)")
    assert serves("cpu", F32) == "the kernels are not built (why)"
    with pytest.raises(
        TypeError, match=r"no native norm_forward: the kernels are not built \(why\); megatron_lite"
    ):
        native.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-5)


@names
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types_are_refused(name: str, dtype: torch.dtype) -> None:
    case = cases(dtype)[name]
    with pytest.raises(
        TypeError, match=r"on cpu the kernels take float32 and bfloat16.*ops.reference takes any"
    ):
        getattr(native, name)(*case.inputs, **case.given)


def test_memory_is_not_read_on_the_word_of_a_caller() -> None:
    """Kernels know no sizes: each that does not fit is refused here."""
    x, w, h = numbers(4, 6, dtype=F32), torch.ones(6), numbers(2, 4, 5, 8, dtype=F32)
    labels, stats, given = torch.zeros(4, dtype=torch.int64), torch.ones(4), tables(5, 8)
    keys = documents(2, 5, 8).keys
    apart = Documents(keys[:, :5], keys)  # not contiguous
    long, wide = Documents(keys[:, :5].contiguous(), keys[:, :5].long()), torch.ones(1, 1, 1, 264)

    def gradient(total: Tensor, grad: Tensor) -> Tensor:
        return native.cross_entropy_grad(x, labels, stats, total, grad, 0, 6, 0.0)

    refused: list[tuple[str, Callable[[], object]]] = [
        (r"weight has shape \(5,\); x of \(4, 6\) needs \(6,\)", lambda: native.rms_norm(x, w[:5], 1e-5)),
        ("weight is torch.bfloat16, but x is torch.float32", lambda: native.rms_norm(x, w.bfloat16(), 1e-5)),
        (r"bias has shape \(1,\)", lambda: native.layer_norm(x, w, w[:1], 1e-5)),
        (r"residual is torch.float32 \(6,\)", lambda: native.add_rms_norm(x, w, w, 1e-5)),
        ("residual is torch.bfloat16", lambda: native.add_layer_norm(x, x.bfloat16(), w, None, 1e-5)),
        (r"bias has shape \(3,\)", lambda: native.swiglu(x, w[:3])),
        ("5 features are no even number", lambda: native.swiglu(x[:, :5])),
        ("bias is torch.bfloat16", lambda: native.gelu(x, w.bfloat16())),
        ("only heads may differ", lambda: native.rotary(h, h[:, :, :4], **given)),
        ("only heads may differ", lambda: native.rotary(h, h.bfloat16(), **given)),
        (r"must be \(5, r\) or \(2, 1, 5, r\)", lambda: native.rotary(h, h, **tables(4, 8))),
        (r"must be \(5, r\)", lambda: native.rotary(h, h, **tables(5, 8, batch=3))),
        ("even, up to 8", lambda: native.rotary(h, h, **tables(5, 10))),
        ("cos is torch.float64", lambda: native.rotary(h, h, **{k: v.double() for k, v in given.items()})),
        ("they must have one type", lambda: native.attention(h, h, h.bfloat16())),
        ("they must have one type", lambda: native.attention(h, h[:, :, :4], h)),
        ("they must have one type", lambda: native.attention(h[:, :3], h[:, :2], h[:, :2])),
        ("heads of 264 features", lambda: native.attention(wide, wide, wide)),
        (r"documents.keys is torch.int64", lambda: native.attention(h, h, h, documents=long)),
        (r"documents.queries is torch.int32 \(2, 4\)", lambda: native.softmax(h, documents=documents(2, 4, 8))),
        (r"documents.queries is torch.int32 \(2, 5\); it must be", lambda: native.softmax(h, documents=apart)),
        ("mask is torch.float32", lambda: native.softmax(h, mask=h)),
        ("logits must be", lambda: native.cross_entropy_stats(x, labels.int(), 0, 6)),
        ("logits must be", lambda: native.cross_entropy_stats(x, labels[:3], 0, 6)),
        ("valid = 7 of 6 columns", lambda: native.cross_entropy_stats(x, labels, 0, 7)),
        ("total is torch.float64", lambda: gradient(stats.double(), stats)),
        (r"grad is torch.float32 \(3,\)", lambda: gradient(stats, stats[:3])),
        ("tensors on cpu and meta", lambda: native.rms_norm(x, w.to("meta"), 1e-5)),
    ]  # fmt: skip
    for words, call in refused:
        with pytest.raises(ValueError, match=words):
            call()

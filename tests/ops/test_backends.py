"""Adapters to packages that are not installed here, against the reference, through fakes with the real signatures."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_lite.config import KernelsConfig
from megatron_lite.model.gpt import GPT
from megatron_lite.model.runtime import Runtime
from megatron_lite.ops import Documents, Needs, build_ops, reference, transformer_engine
from megatron_lite.ops.backends import lacks_package
from megatron_lite.ops.flash_attention import MODULES
from megatron_lite.ops.registry import BACKENDS
from tests.ops import fake_packages
from tests.ops.fake_packages import Linear, install, install_apex, install_transformer_engine
from tests.training_case import Case

HOPPER = Needs("cuda", torch.bfloat16, (9, 0), head_dim=64)
ATTENTION = ("flash_attn_2", "flash_attn_3", "flash_attn_4", "transformer_engine")


@pytest.fixture(autouse=True)
def _fresh_modules() -> None:
    for made in (transformer_engine._package, transformer_engine._core, transformer_engine._linear):
        made.cache_clear()


def install_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, module in sorted(MODULES.items()):
        install(monkeypatch, module, **fake_packages.flash_attention(version))
    install_transformer_engine(monkeypatch)
    install_apex(monkeypatch)


def outcomes(
    function: Callable[..., Any], inputs: list[Tensor], *rest: object, **options: object
) -> list[Tensor]:
    """Outputs and gradients."""
    mine = [x.clone().requires_grad_() for x in inputs]
    outputs = function(*mine, *rest, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum((y * torch.arange(y.numel()).view_as(y).cos()).sum() for y in outputs).backward()
    return [*(y.detach() for y in outputs), *(x.grad for x in mine if x.grad is not None)]


def same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b)


def documents(kind: str, s: int, t: int) -> Documents | None:
    if kind == "causal":
        return None
    rows = [torch.arange(t) * 3 // t, torch.arange(t) * 2 // t]
    if kind == "padded":  # prompts padded on the left
        rows = [torch.where(torch.arange(t) < pad, -1, 0) for pad in (2, 0)]
    keys = torch.stack(rows).int()
    return Documents(keys[:, t - s :].contiguous(), keys)


@pytest.mark.parametrize("kind", ["causal", "documents", "padded"])
@pytest.mark.parametrize(("s", "t"), [(6, 6), (1, 6), (3, 7)])
@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention(
    name: str, groups: int, s: int, t: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_everything(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    # As the projection gives them: [b, s, heads, d] in memory.
    shapes = ((2, s, 4, 8), (2, t, groups, 8), (2, t, groups, 8))
    inputs = [torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes]
    attend = BACKENDS[name].load("attention")["attention"]
    given = documents(kind, s, t)
    found, expected = (outcomes(f, inputs, documents=given) for f in (attend, reference.attention))
    assert found[0].shape == (2, 4, s, 8)
    same(found, expected)


@pytest.mark.parametrize("name", ["transformer_engine", "apex"])
def test_norms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install_everything(monkeypatch)
    norms = BACKENDS[name].load("norm")
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(3, 5, 16, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(16, generator=generator) for _ in range(2))
    cases: list[tuple[str, list[Tensor], tuple[object, ...]]] = [
        ("rms_norm", [x, weight], (1e-3,)),
        ("layer_norm", [x, weight, bias], (1e-3,)),
        ("layer_norm", [x, weight], (None, 1e-3)),
        ("add_rms_norm", [x, residual, weight], (1e-3,)),
        ("add_layer_norm", [x, residual, weight, bias], (1e-3,)),
        ("add_layer_norm", [x, residual, weight], (None, 1e-3)),
    ]
    assert norms.keys() == {name for name, _, _ in cases}
    for name, given, rest in cases:
        same(outcomes(norms[name], given, *rest), outcomes(getattr(reference, name), given, *rest))


def test_norms_of_one_size_keep_their_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    install_everything(monkeypatch)
    norm = BACKENDS["transformer_engine"].load("norm")["rms_norm"]
    x, first, second = torch.randn(3, 8), torch.rand(8), torch.rand(8)

    def both(norm: Callable[..., Tensor]) -> list[Tensor]:
        return outcomes(lambda x, a, b: norm(norm(x, a, 1e-5), b, 1e-5), [x, first, second])

    same(both(norm), both(reference.rms_norm))


REASONS: list[tuple[str, str, dict[str, Any], str]] = [
    ("flash_attn_2", "attention", {"capability": None, "device": "cpu"}, "it needs an NVIDIA GPU"),
    ("flash_attn_2", "attention", {"capability": (7, 5)}, "it needs a GPU of capability 8.0, not 7.5"),
    ("flash_attn_2", "attention", {"dtype": torch.float32}, "it takes bf16 and fp16, not fp32"),
    ("flash_attn_2", "attention", {"head_dim": 264}, "head_dim 264 is more than 256"),
    ("flash_attn_2", "attention", {"head_dim": 20}, "head_dim 20 is no multiple of 8"),
    ("flash_attn_2", "attention", {"attention_dropout": True}, "the same on every layout"),
    ("flash_attn_2", "attention", {"documents": "scattered"}, "only if their tokens are neighbours"),
    ("flash_attn_3", "attention", {"capability": (8, 0)}, "9.0 and less than 10.0, not 8.0"),
    ("flash_attn_3", "attention", {"capability": (10, 0)}, "9.0 and less than 10.0, not 10.0"),
    ("flash_attn_4", "attention", {"capability": (8, 6)}, "it needs a GPU of capability 9.0, not 8.6"),
    ("flash_attn_4", "attention", {"capability": (10, 0), "head_dim": 192}, "more than 128"),
    ("transformer_engine", "attention", {"dtype": torch.float32}, "it takes bf16 and fp16, not fp32"),
    ("transformer_engine", "attention", {"documents": "scattered"}, "neighbours"),
    ("transformer_engine", "attention", {"attention_dropout": True}, "the same on every layout"),
    ("transformer_engine", "norm", {"capability": (7, 5)}, "capability 8.0, not 7.5"),
    ("apex", "norm", {"capability": None, "device": "cpu"}, "it needs an NVIDIA GPU"),
    ("fp8", "linear", {"capability": None, "device": "cpu"}, "it needs an NVIDIA GPU"),
    ("fp8", "linear", {"capability": (8, 6)}, "it needs a GPU of capability 8.9, not 8.6"),
    ("fp8", "linear", {"dtype": torch.float16}, "it takes bf16, not fp16"),
    ("fp8", "linear", {"linear_sizes": (64, 40, 8, 40)}, "must be multiples of 16: 8, 40"),
]


@pytest.mark.parametrize(("name", "group", "changes", "reason"), REASONS)
def test_reasons(
    name: str, group: str, changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_everything(monkeypatch)
    found = BACKENDS[name].why_not(group, replace(HOPPER, **changes))
    assert found is not None and reason in found and ";" not in found


@pytest.mark.parametrize(
    ("name", "group", "needs"),
    [
        *((name, "attention", replace(HOPPER, documents="runs", head_dim=256)) for name in ATTENTION),
        ("flash_attn_2", "attention", replace(HOPPER, capability=(8, 0), dtype=torch.float16)),
        ("flash_attn_4", "attention", replace(HOPPER, capability=(10, 3), head_dim=128)),
        ("transformer_engine", "norm", replace(HOPPER, dtype=torch.float32, attention_dropout=True)),
        ("apex", "norm", replace(HOPPER, dtype=torch.float32)),
        ("fp8", "linear", replace(HOPPER, linear_sizes=(64, 16))),
    ],
)
def test_usable(name: str, group: str, needs: Needs, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = str(BACKENDS[name].why_not(group, needs))
    assert "is not installed" in missing or "is there without" in missing
    install_everything(monkeypatch)
    assert BACKENDS[name].why_not(group, needs) is None


def test_auto_takes_the_best_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    install_everything(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def chosen(**changes: Any) -> str:
        return build_ops(KernelsConfig(), replace(HOPPER, **changes)).chosen["attention"]

    assert chosen() == chosen(documents="runs") == "flash_attn_3"
    assert chosen(capability=(10, 0)) == "flash_attn_4"
    assert chosen(capability=(10, 0), head_dim=192) == "sdpa_cudnn"
    assert chosen(capability=(8, 0)) == chosen(capability=(8, 9), documents="runs") == "flash_attn_2"
    assert chosen(dtype=torch.float32) == "sdpa"
    ops = build_ops(KernelsConfig(attention="fa2", norm="te", linear="fp8"), HOPPER)
    assert (ops.chosen["attention"], ops.chosen["norm"]) == ("flash_attn_2", "transformer_engine")
    assert ops.linear is transformer_engine.fp8_linear and ops.why["linear"] == "by name"


def test_packages_that_are_not_what_they_seem(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash_attn_interface")  # PyPI's flash_attn_3 is an empty module
    found = str(BACKENDS["flash_attn_3"].why_not("attention", HOPPER))
    assert "flash_attn_interface is there without flash_attn_varlen_func" in found
    install(monkeypatch, "flash_attn.cute", **fake_packages.flash_attention(4))  # leaves version 2 out
    assert "without flash_attn_varlen_func" in str(BACKENDS["flash_attn_2"].why_not("attention", HOPPER))
    install(monkeypatch, "apex")  # PyPI's apex has nothing to do with NVIDIA's
    assert "PyPI's apex is an unrelated package" in str(BACKENDS["apex"].why_not("norm", HOPPER))


def test_nothing_is_imported_where_it_could_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "flash_attn")
    monkeypatch.setattr("importlib.import_module", pytest.fail)
    assert list(lacks_package("flash_attn", "flash_attn_func", "", importing=False)) == []
    assert BACKENDS["flash_attn_2"].why_not("attention", Needs()) is not None


# ----------------------------------------------------------------------------------------------------------- FP8


def test_fp8_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    install_transformer_engine(monkeypatch)
    x, weight, bias = torch.randn(2, 8, 32), torch.randn(48, 32), torch.randn(48)
    for given in ([x, weight, bias], [x, weight]):
        found = outcomes(transformer_engine.fp8_linear, given)
        exact = outcomes(torch.nn.functional.linear, given)
        for index, (mine, theirs) in enumerate(zip(found, exact, strict=True)):
            error = float((mine - theirs).norm() / theirs.norm())
            bounds = (
                (1e-3, 0.06) if index < 3 else (0, 1e-6)
            )  # E4M3 has 3 bits after the point; the bias is exact
            assert bounds[0] <= error <= bounds[1]


def test_fp8_leaves_the_parameters_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, values and gradients' shapes are those of any run; one module serves all layers of a shape."""
    install_transformer_engine(monkeypatch)
    sizes = {"hidden_size": 64, "ffn_hidden_size": 96, "num_query_groups": 2}
    config = Case(style="llama", model=sizes).config()
    models = []
    for linear in ("torch", "fp8"):
        needs = replace(HOPPER, dtype=torch.bfloat16)
        ops = build_ops(KernelsConfig(linear=linear), needs)  # type: ignore[arg-type]
        ops = replace(build_ops(KernelsConfig(), Needs(head_dim=8)), linear=ops.linear)
        models.append(GPT(config.model, Runtime(ops=ops)))
    plain, fp8 = models
    assert list(plain.state_dict()) == list(fp8.state_dict())
    tokens = torch.arange(32).view(2, 16) % 61
    losses = []
    for model in models:
        logits = model(tokens, model.runtime.context())
        logits.float().logsumexp(-1).mean().backward()
        losses.append(logits.detach())
    assert not torch.equal(*losses)
    torch.testing.assert_close(*losses, rtol=0, atol=0.1 * float(losses[0].abs().max()))
    for (name, one), (_, other) in zip(plain.named_parameters(), fp8.named_parameters(), strict=True):
        assert one.grad is not None and other.grad is not None, name
        assert other.grad.shape == one.grad.shape and math.isfinite(float(other.grad.norm())), name
    assert len(Linear.made) == len({m.weight.shape for m in Linear.made}) == 4  # qkv, proj, fc1, fc2

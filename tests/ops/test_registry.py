"""The choice of backends: every name, every reason, the order of `auto` on machines that are not here."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_lite.config import Config, ConfigError, KernelsConfig, build_config
from megatron_lite.config.base import choices
from megatron_lite.ops import Needs, Ops, build_ops, native, reference, registry, sdpa
from megatron_lite.ops.backends import Backend, lacks_package
from megatron_lite.ops.registry import BACKENDS, GROUPS, preference, usable
from megatron_lite.training import loop

HOPPER = Needs("cuda", torch.bfloat16, (9, 0))
ANYTHING = {name: replace(backend, lacks=lambda group, needs: iter(())) for name, backend in BACKENDS.items()}


def kernels(**named: Any) -> KernelsConfig:
    return KernelsConfig(**named)


def test_the_configuration_lists_every_backend_there_is() -> None:
    for group in GROUPS:
        listed = choices(KernelsConfig, group)
        assert listed[0] == "auto"
        assert set(listed[1:]) == {name for name, backend in BACKENDS.items() if group in backend.groups}


def test_every_operation_belongs_to_one_group() -> None:
    operations = [name for group in GROUPS.values() for name in group]
    assert sorted(operations) == sorted(set(vars(Ops())) - {"chosen", "why"})


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ({"attention": "torch"}, "sdpa"),
        ({"attention": "SDPA"}, "sdpa"),
        ({"attention": "flash_attn"}, "flash_attn_2"),
        ({"attention": "fa3"}, "flash_attn_3"),
        ({"attention": "TE"}, "transformer_engine"),
        ({"norm": "te"}, "transformer_engine"),
        ({"norm": "torch"}, "reference"),
        ({"rotary": "torch.compile"}, "compile"),
        ({"cross_entropy": "eager"}, "reference"),
    ],
)
def test_names_people_type(written: dict[str, str], meant: str) -> None:
    (group,) = written
    assert getattr(kernels(**written), group) == meant


def test_a_name_that_is_not_there_ends_before_anything_else() -> None:
    with pytest.raises(ConfigError, match=r"kernels\.attention.*sdpa_cudnn"):
        config(kernels__attention="sdpa_cudn")
    with pytest.raises(ValueError, match="norm: no backend 'sdpa'; there are auto, native, trans"):
        build_ops(KernelsConfig.model_construct(norm="sdpa"))


def test_the_reference_by_name() -> None:
    named = {group: "reference" for group in GROUPS if group != "linear"}
    ops = build_ops(kernels(**named))
    assert ops.chosen == {**named, "linear": "torch"}
    for name in (name for group in GROUPS for name in GROUPS[group] if name != "linear"):
        assert getattr(ops, name) is getattr(reference, name)
    assert ops.linear is F.linear


@pytest.mark.parametrize(
    ("needs", "order"),
    [
        (Needs(), ("native", "sdpa", "reference")),
        (
            replace(HOPPER, capability=(12, 0)),
            ("flash_attn_4", "sdpa_cudnn", "flash_attn_2", "native", "sdpa", "reference"),
        ),
        (HOPPER, ("flash_attn_3", "sdpa_cudnn", "flash_attn_2", "native", "sdpa", "reference")),
        (replace(HOPPER, capability=(8, 6)), ("flash_attn_2", "sdpa_flash", "native", "sdpa", "reference")),
        (replace(HOPPER, capability=(7, 0)), ("sdpa", "reference")),
    ],
)
def test_the_order_of_auto(needs: Needs, order: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    assert preference("attention", needs) == order
    assert preference("norm", needs) == ("native", "reference")
    monkeypatch.setattr(registry, "BACKENDS", ANYTHING)
    assert registry._best("attention", needs) == (order[0], f"auto; before {', '.join(order[1:])}")


def test_auto_says_what_it_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(ANYTHING["native"], lacks=lambda group, needs: iter(["not built (make it)", "never"]))
    monkeypatch.setattr(registry, "BACKENDS", {**ANYTHING, "native": broken})
    ops = build_ops(kernels())
    assert ops.chosen["attention"] == "sdpa" and ops.chosen["norm"] == "reference"
    assert ops.why["attention"] == "auto; before reference; not native: not built"
    table = ops.table()
    assert len(table) == len(GROUPS) and table[0].split()[:2] == ["attention", "sdpa"]
    assert len({line.index(ops.why[group]) for line, group in zip(table, GROUPS, strict=True)}) == 1


def test_a_backend_by_name_that_cannot_serve_is_an_error_with_the_reason_and_what_can() -> None:
    dropping = Needs(attention_dropout=True)
    with pytest.raises(ValueError) as caught:
        build_ops(kernels(attention="sdpa", dropout="compile"), dropping)
    first, second = str(caught.value).splitlines()
    assert first.startswith("kernels.attention: sdpa cannot serve this run: it has no attention dropout")
    assert (
        first.endswith("reference") and "; what can: auto, " in first and "sdpa" not in first.split("; ")[-1]
    )
    assert second.startswith("kernels.dropout: compile cannot serve this run: it would compile anew")
    assert build_ops(kernels(), dropping).chosen["attention"] in ("native", "reference")


@pytest.mark.parametrize("name", ["sdpa_cudnn", "sdpa_flash", "sdpa_efficient"])
def test_gpu_backends_on_a_cpu(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} cannot serve this run: it needs an NVIDIA GPU"):
        build_ops(kernels(attention=name))


def whole(device: str, dtype: torch.dtype, operation: str) -> None:
    """`native.serves` of a build with everything."""


def without_attention(device: str, dtype: torch.dtype, operation: str) -> str | None:
    return "built without it" if operation == "attention" else None


@pytest.mark.parametrize(
    ("serves", "group", "needs", "reason"),
    [
        (whole, "attention", Needs(), None),
        (without_attention, "attention", Needs(), "built without it"),
        (without_attention, "norm", Needs(), None),
        (lambda *given: "not built", "norm", Needs(), "not built"),  # said once, not for each operation
        (whole, "attention", Needs(head_dim=512), "head_dim 512 is more than 256"),
        (whole, "attention", replace(HOPPER, head_dim=20), "head_dim 20 is no multiple of 8"),
        (whole, "attention", Needs(head_dim=20), None),
        (whole, "norm", replace(HOPPER, capability=(7, 5)), "it needs a GPU of capability 8.0, not 7.5"),
    ],
)
def test_our_kernels(
    serves: Any, group: str, needs: Needs, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "serves", serves)
    assert BACKENDS["native"].why_not(group, needs) == reason


@pytest.mark.parametrize(
    ("package", "source", "reason"),
    [
        ("absent_kernels", None, "absent_kernels is not installed (pip install it)"),
        ("empty_kernels", "", "empty_kernels is there without fast (pip install it)"),
        ("broken_kernels", "import no_such_module", "cannot be imported: No module named 'no_such_module'"),
        ("loading_kernels", "raise OSError('libx.so: not found\\nmore')", "imported: libx.so: not found"),
        ("silent_kernels", "raise RuntimeError", "cannot be imported: RuntimeError()"),
        ("good_kernels", "fast = 1", None),
    ],
)
def test_packages(
    package: str, source: str | None, reason: str | None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if source is not None:
        (tmp_path / f"{package}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    said = list(lacks_package(package, "fast", "pip install it", importing=True))
    assert (said == []) if reason is None else (len(said) == 1 and said[0].endswith(reason))


def test_compiled_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = BACKENDS["compile"]
    assert "seed" in str(compile_.why_not("attention", Needs(attention_dropout=True)))
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert compile_.why_not("norm", Needs()) == "there is no C++ compiler"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert compile_.why_not("norm", HOPPER) == "triton is not installed"


def config(**changes: Any) -> Config:
    tree: dict[str, Any] = {
        "model": {
            "num_layers": 1,
            "hidden_size": 48,
            "num_attention_heads": 6,
            "num_query_groups": 2,
            "ffn_hidden_size": 80,
            "activation": "swiglu",
            "seq_length": 32,
        },
        "data": {"tokenizer": "byte"},
        "parallel": {"tensor": 2},
        "train": {"micro_batch_size": 3, "global_batch_size": 3, "steps": 2, "output_dir": "x"},
        "optimizer": {"lr": 0.1},
    }
    for path, value in changes.items():
        section, key = path.split("__")
        tree.setdefault(section, {})[key] = value
    return build_config(tree)


def test_what_a_run_needs() -> None:
    cpu = torch.device("cpu")
    assert Needs.of(config(), cpu, torch.bfloat16) == Needs(
        "cpu",
        torch.bfloat16,
        None,
        head_dim=8,
        grouped=True,
        # of q and of q, k, v on each of two ranks; of the feed-forward part; tokens
        linear_sizes=(48, 24, 40, 40, 80, 96),
    )
    more = config(model__attention_dropout=0.1, data__reset_attention_mask=True, model__num_query_groups=6)
    found = Needs.of(more, cpu, torch.float32)
    assert (found.attention_dropout, found.documents, found.grouped) == (True, "runs", False)


def test_capability_is_the_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: (9, 0) if device.index == 1 else (8, 0)
    )
    assert Needs.on(torch.device("cuda", 1), torch.bfloat16) == HOPPER


def test_usable_backends_are_sorted_as_auto_would() -> None:
    found = usable("attention", Needs())
    assert found.index("sdpa") < found.index("reference") < found.index("compile")
    assert "sdpa_flash" not in found


def test_ranks_must_choose_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = build_ops(kernels(attention="sdpa"))
    monkeypatch.setattr(loop, "gather", lambda mine: [mine, mine])
    loop._check_same_kernels(ops)
    monkeypatch.setattr(loop, "gather", lambda mine: [mine, {**mine, "attention": "reference"}])
    with pytest.raises(ValueError, match="attention: rank 1 would take reference and rank 0 sdpa: install"):
        loop._check_same_kernels(ops)


def test_the_table_is_a_backend_each() -> None:
    assert all(isinstance(backend, Backend) for backend in BACKENDS.values())
    assert build_ops(kernels(attention="sdpa")).attention is sdpa.attention

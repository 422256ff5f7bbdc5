"""DeepSpeed's traps: each test fails where the way round it is taken out; its docstring says how."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from deepspeed.ops.op_builder import builder
from torch import Tensor

from megatron_lite.data.loader import Batch
from megatron_lite.parallel import layers
from megatron_lite.parallel.pipeline import StageLayer
from megatron_lite.training.engine import Engine
from megatron_lite.training.schedule import learning_rate
from tests.distributed import RankFailed, run_ranks
from tests.parity import BF16_LOSS, LOSS, assert_parity, one_process
from tests.training_case import (
    Case,
    global_batch,
    import_what_ranks_import,
    make_engine,
    rank_batches,
    train,
)

OFFLOAD = {"deepspeed.zero_optimization.offload_optimizer": {"device": "cpu"}}


@pytest.fixture(scope="module", autouse=True)
def _imports() -> None:
    import_what_ranks_import()


def own_batches(engine: Engine, step: int) -> list[Batch]:
    return rank_batches(step, engine.config, engine.mesh.data_rank, engine.mesh.data_size)


def held(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """All that training changes on this rank: working weights (partitions under ZeRO-3), masters and moments."""
    for name, parameter in engine.named_parameters():
        yield name, getattr(parameter, "ds_tensor", parameter).detach().clone()
    for piece in engine.pieces():
        yield f"{piece.name} {piece.kind} {piece.flat_start}", piece.data.clone()


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_sharded_parameters_count_in_the_norm(zero: int) -> None:
    """Without `tensor_model_parallel` DeepSpeed takes the norm of one rank's shards: 1.1 for 1.4."""
    assert_parity(Case(tensor=2, zero=zero, steps=3))


@pytest.mark.parametrize("case", [Case(pipeline=2, zero=0), Case(2, 2, zero=0, sequence=True)], ids=str)
def test_clipping_without_zero(case: Case) -> None:
    """DeepSpeed gives no norm at all here (nan), and clips by one that counts tied copies twice."""
    assert_parity(replace(case, steps=3))


@pytest.mark.parametrize("data", [1, 2])
def test_tied_gradients_kept_apart_from_the_weights(data: int) -> None:
    """ZeRO with fp32 accumulation in bf16 has no `weight.grad`: DeepSpeed would reduce nothing, without a word."""
    assert_parity(Case(pipeline=2, data=data, precision="bf16", settings=OFFLOAD))


def first_updates(case: Case) -> tuple[int, dict[str, float]]:
    engine = make_engine(case.config())
    before = {name: parameter.detach().clone() for name, parameter in engine.named_parameters()}
    train(engine, range(1))
    moved = {n: float((p.detach() - before[n]).float().abs().max()) for n, p in engine.named_parameters()}
    return engine.state()["optimizer_steps"], moved


def test_moments_begin_at_the_first_gradient() -> None:
    """In bf16 without ZeRO DeepSpeed's step of no gradient counts: 2 steps, and updates of 0.74 of the rate."""
    case = Case(zero=0, precision="bf16")
    ((steps, moved),) = run_ranks(1, first_updates, case)
    rate = learning_rate(case.config(), 0)
    assert steps == 1
    assert moved["blocks.0.mlp.linear_fc1.bias"] == pytest.approx(rate, rel=0.02)


def initial_masters(case: Case) -> tuple[set[torch.dtype], dict[str, dict[int, np.ndarray]]]:
    engine = make_engine(case.config())
    masters: dict[str, dict[int, np.ndarray]] = {}
    for piece in engine.pieces():
        if piece.kind == "weight":
            masters.setdefault(piece.name, {})[piece.flat_start] = piece.data.clone().numpy()
    return {p.dtype for p in engine.module.parameters()}, masters


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_partitioned_weights_start_as_all_others(precision: str) -> None:
    """`zero.Init(dtype=torch.float32)` would make bf16 weights on a CPU."""
    case = Case(zero=1, precision=precision)
    ((_, expected),) = run_ranks(1, initial_masters, case)
    found: dict[str, dict[int, np.ndarray]] = {}
    for dtypes, masters in run_ranks(2, initial_masters, replace(case, zero=3, data=2)):
        assert dtypes == {torch.float32 if precision == "fp32" else torch.bfloat16}
        for name, parts in masters.items():
            found.setdefault(name, {}).update(parts)
    assert found.keys() == expected.keys()
    for name, parts in found.items():
        assert np.array_equal(np.concatenate([parts[start] for start in sorted(parts)]), expected[name][0]), (
            name
        )


def linear_after_a_run(case: Case) -> tuple[bool, list[bool]]:
    original = F.linear
    engine = make_engine(case.config())
    train(engine, range(2))
    return F.linear is original, [bool(p.ds_persist) for p in engine.module.parameters()]  # type: ignore[attr-defined]


def test_zero3_leaves_torch_alone_and_partitions_small_parameters() -> None:
    """`memory_efficient_linear` replaces F.linear for the whole process; the default persistence threshold keeps
    every parameter of a small model whole, so that the parity tests of ZeRO-3 would test nothing."""
    for untouched, persistent in run_ranks(2, linear_after_a_run, Case(data=2, zero=3)):
        assert untouched
        assert not any(persistent)


def train_without_compiler(case: Case) -> list[tuple[float, float]]:
    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise RuntimeError(f"{self.name} would be compiled at start")

    builder.OpBuilder.jit_load = refuse
    return train(make_engine(case.config()), range(1))


@pytest.mark.parametrize(
    "case",
    [*(Case(zero=zero) for zero in range(4)), Case(zero=2, settings=OFFLOAD), Case(pipeline=2)],
    ids=str,
)
def test_nothing_is_compiled_at_start(case: Case) -> None:
    """DeepSpeed would build its shared-memory all-reduce when it joins the group: a minute, on every fresh machine."""
    run_ranks(case.world_size, train_without_compiler, case)


def infinite_step(case: Case) -> tuple[Any, bool, bool, list[float]]:
    """Two good steps, one whose loss is infinite on the first data-parallel rank, one good step again."""
    engine = make_engine(case.config())
    train(engine, range(2))
    before, counted = list(held(engine)), engine.state()["optimizer_steps"]
    weights_of = engine.loss_weights
    if engine.mesh.data_rank == 0:

        def overflowing(batches: list[Batch]) -> tuple[list[Tensor], float]:
            weights, tokens = weights_of(batches)
            return [weights[0] * torch.inf, *weights[1:]], tokens

        engine.loss_weights = overflowing  # type: ignore[method-assign]
    result = engine.train_step(own_batches(engine, 2), 2)
    engine.loss_weights = weights_of  # type: ignore[method-assign]
    same = all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(before, held(engine), strict=True))
    uncounted = engine.state()["optimizer_steps"] == counted
    return result, same, uncounted, [loss for loss, _ in train(engine, range(3, 5))]


def without_third_step(case: Case) -> list[float]:
    engine = make_engine(case.config())
    train(engine, range(2))
    return [loss for loss, _ in train(engine, range(3, 5))]


ANY_STAGE = [
    *(Case(data=2, zero=zero) for zero in range(4)),
    *(Case(data=2, zero=zero, precision="bf16") for zero in range(4)),
    Case(data=2, zero=2, settings=OFFLOAD),
    Case(data=2, zero=2, precision="bf16", settings=OFFLOAD),
    Case(data=2, zero=3, settings=OFFLOAD),
    Case(tensor=2, zero=3, precision="bf16"),
    Case(pipeline=2, zero=0),
    Case(pipeline=2, zero=1),
    Case(pipeline=2, data=2, zero=1, precision="bf16"),
    Case(2, 2, zero=1, precision="bf16", settings=OFFLOAD),
]


@pytest.mark.parametrize("case", ANY_STAGE, ids=str)
def test_a_gradient_that_is_not_finite_changes_nothing(case: Case) -> None:
    """DeepSpeed looks for overflow in fp16 alone: in fp32 and bf16 all weights would be nan after one bad step."""
    (expected,) = run_ranks(1, without_third_step, one_process(case))
    for result, same, uncounted, after in run_ranks(case.world_size, infinite_step, case):
        assert result.skipped and not np.isfinite(result.grad_norm) and not np.isfinite(result.loss)
        assert same, "weights, masters or moments have changed"
        assert uncounted, "Adam's bias correction counts a step that was not taken"
        assert after == pytest.approx(expected, abs=LOSS if case.precision == "fp32" else BF16_LOSS)


def masked_loss(case: Case) -> float:
    engine = make_engine(case.config())
    return engine.train_step(own_batches(engine, 0), 0).loss


def test_the_loss_is_a_mean_over_tokens() -> None:
    """A mean of micro-batch means weighs the tokens of a short document more."""
    case = Case(zero=0, settings={"data.tokenizer": "char:unused", "data.eod_mask_loss": True})
    whole = replace(case, settings=case.settings | {"train.micro_batch_size": 8})
    _, mask = global_batch(0, case.config())
    assert len(set(mask.sum(1).reshape(4, 2).sum(1))) > 1, "the micro-batches do not differ"
    (one_batch,) = run_ranks(1, masked_loss, whole)
    for split in (case, replace(case, data=2)):
        for loss in run_ranks(split.world_size, masked_loss, split):
            assert loss == pytest.approx(one_batch, abs=LOSS)


def blind_middle(case: Case) -> list[float]:
    engine = make_engine(case.config())
    losses = []
    for step in range(2):
        batches = own_batches(engine, step)
        if 0 < engine.mesh.pipeline_rank < engine.mesh.pipeline_size - 1:
            batches = [Batch(b.tokens * 0 - 9, b.labels * 0 - 9, b.loss_mask, None, None) for b in batches]
        losses.append(engine.train_step(batches, step).loss)
    return losses


def test_only_the_outer_stages_read_data() -> None:
    case = Case(pipeline=4)
    (expected,) = run_ranks(1, blind_middle, one_process(case))
    for losses in run_ranks(4, blind_middle, case):
        assert losses == pytest.approx(expected, abs=LOSS)


def too_few_batches(case: Case) -> None:
    engine = make_engine(case.config())
    batches = own_batches(engine, 0)
    engine.train_step(batches[:-1] if engine.mesh.rank == 1 else batches, 0)


@pytest.mark.parametrize("case", [Case(data=2), Case(pipeline=2)], ids=str)
def test_a_short_list_of_batches_is_refused(case: Case) -> None:
    """Its peers would wait for the rank until the timeout."""
    with pytest.raises(RankFailed, match=r"a step takes [24] micro-batches a rank, not [13]"):
        run_ranks(2, too_few_batches, case)


def changing_lengths(case: Case) -> list[float]:
    engine = make_engine(case.config())
    out = [loss for loss, _ in train(engine, range(2))]
    for length in (8, 16, 4):
        short = [
            Batch(*(np.ascontiguousarray(a[:, :length]) for a in batch[:3]), None, None)
            for batch in own_batches(engine, 9)
        ]
        loss, tokens = engine.eval_step(short)
        assert tokens == engine.config.train.global_batch_size * length
        out.append(loss)
    return out + [loss for loss, _ in train(engine, range(2, 4))]


@pytest.mark.parametrize("case", [Case(pipeline=2), Case(2, 2, 2, sequence=True, style="llama")], ids=str)
def test_the_sequence_length_may_change(case: Case) -> None:
    """Stages would receive into buffers of the first length: a crash where shapes meet, wrong numbers elsewhere."""
    (expected,) = run_ranks(1, changing_lengths, one_process(case))
    for losses in run_ranks(case.world_size, changing_lengths, case):
        assert losses == pytest.approx(expected, abs=LOSS)


def built_and_held(case: Case) -> tuple[list[str], list[str], bool]:
    made: list[str] = []
    create = layers.create_parameter

    def counting(name: str, *args: Any, **kwargs: Any) -> Any:
        made.append(name)
        return create(name, *args, **kwargs)

    layers.create_parameter = counting
    engine = make_engine(case.config())
    assert all(
        isinstance(layer, StageLayer) for layer in engine.module.modules() if hasattr(layer, "make_context")
    )
    names = [name for name, _ in engine.named_parameters()]
    return made, names, bool(engine.deepspeed.is_pipe_partitioned or engine.deepspeed.is_grad_partitioned)


def test_a_rank_builds_its_own_stage_only() -> None:
    """`partition_method="parameters"` builds every layer on every rank to count; partitioned activations break
    shapes that change under tensor parallelism."""
    every: set[str] = set()
    for made, names, partitioned in run_ranks(8, built_and_held, Case(2, 4, tied=False)):
        assert sorted(made) == sorted(names)
        assert len({name.split(".")[1] for name in names if name.startswith("blocks")}) == 1
        assert not partitioned
        every.update(names)
    assert {"embed.weight", "head.weight", "norm.weight"} < every


def is_fused_adam(case: Case) -> bool:
    optimizer = make_engine(case.config()).optimizer
    return isinstance(optimizer, torch.optim.AdamW) and all(
        group["fused"] for group in optimizer.param_groups
    )


@pytest.mark.parametrize("case", [Case(zero=3), Case(pipeline=2), Case(data=2)], ids=str)
def test_adam_is_torchs_fused_one(case: Case) -> None:
    """DeepSpeed's own is compiled at start; torch's default is ten times slower on a CPU."""
    assert all(run_ranks(case.world_size, is_fused_adam, case))

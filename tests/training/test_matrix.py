"""Any layout goes on from what any other saved: the same state to the last bit, the same losses.

Every source saves in the way of a run, beside its training; every target finds, verifies and loads what all of them
saved. `python -m tests.training.test_matrix` prints the largest differences of all pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from megatron_lite.checkpoint import Reader, resolve
from megatron_lite.inference.load import load_model, read_config
from megatron_lite.training.engine import Engine
from megatron_lite.training.saver import Saver
from megatron_lite.training.saving import Progress, find_start, load_checkpoint, read_progress
from tests.distributed import run_ranks
from tests.parity import BF16_LOSS, BF16_NORM, LOSS, NORM
from tests.training.whole_state import summary
from tests.training_case import Case, global_batch, import_what_ranks_import, make_engine, rank_batches, train

HALF, ALL = 5, 10
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
# 12 samples a step divide over 1, 2 and 3 data-parallel ranks, and no parameter's size divides by 3.
BATCH = {"train.global_batch_size": 12}

# What a model is made of; with dropout the micro batch is the same everywhere, as masks are drawn by micro-batch.
MODELS: dict[str, dict[str, Any]] = {
    "gpt2 tied": {"style": "gpt2", "tied": True},
    "gpt2 untied dropout": {"style": "gpt2", "tied": False, "model": DROPOUT},
    "llama tied": {"style": "llama", "tied": True},
    "llama untied": {"style": "llama", "tied": False},
}
BF16 = Case(precision="bf16")
OFFLOAD = {"deepspeed.zero_optimization.offload_optimizer": {"device": "cpu"}}
PERSISTENT = {"deepspeed.zero_optimization.stage3_param_persistence_threshold": 300}  # biases stay whole


def padded(multiple: int) -> dict[str, Any]:
    """The vocabulary of 61 in another number of rows than 64."""
    return {"make_vocab_size_divisible_by": multiple}


SOURCES: dict[str, tuple[str, Case]] = {
    "tp2 pp2 dp2 sequence": ("gpt2 tied", Case(2, 2, 2, zero=1, sequence=True)),
    "tp2 dp3 zero0": ("llama untied", Case(2, 1, 3, zero=0)),
    "tp2 dp2 zero2 offload": ("gpt2 tied", Case(2, 1, 2, zero=2, settings=OFFLOAD)),
    "dp3 zero3": ("llama tied", Case(data=3, zero=3, model=padded(7))),
    "tp4 sequence": ("gpt2 tied", Case(4, zero=1, sequence=True)),
    "pp3 dp2 zero0": ("llama tied", Case(1, 3, 2, zero=0)),
    "one rank": ("gpt2 untied dropout", Case(zero=0)),
    "tp2 dp3 zero3": ("llama untied", Case(2, 1, 3, zero=3)),
    "bf16 dp3 zero3": ("llama untied", replace(BF16, data=3, zero=3)),
    "bf16 tp2 pp2": ("gpt2 tied", replace(BF16, tensor=2, pipeline=2, zero=1)),
}
TARGETS: dict[str, Case] = {
    "one rank": Case(zero=0),
    "dp3 zero3": Case(data=3, zero=3, model=padded(1)),
    "dp3 zero2 offload": Case(data=3, zero=2, settings=OFFLOAD),
    "tp2 dp2 zero3": Case(2, 1, 2, zero=3),
    "tp4": Case(4, zero=1),
    "pp3 dp2": Case(1, 3, 2, zero=1),
    "tp2 pp2 zero0 sequence": Case(2, 2, sequence=True, zero=0),
    "tp2 dp3": Case(2, 1, 3, zero=1, model=padded(48)),
    "bf16 dp2 zero3": replace(BF16, data=2, zero=3, settings=PERSISTENT),
    "bf16 tp2 pp2": replace(BF16, tensor=2, pipeline=2, zero=1),
}


@dataclass
class Half:
    """The second half of a run, on one rank.

    Attributes:
        before: all of the state that it begins with, hashed.
        valid: the loss of the next step's batch, evaluated.
        steps: (loss, gradient norm).
    """

    progress: Progress
    before: dict[str, Any]
    valid: float
    steps: list[tuple[float, float]]


def case_of(model: str, layout: Case, folder: Path, **settings: Any) -> Case:
    accumulated = 2 if layout.pipeline > 1 else 1
    micro = 2 if "dropout" in model else 12 // layout.data // accumulated
    settings = {
        "train.output_dir": str(folder),
        "train.micro_batch_size": micro,
        **BATCH,
        **layout.settings,
        **settings,
    }
    kind = MODELS[model]
    shape = {"num_layers": 3, **kind.get("model", {}), **layout.model}
    return replace(layout, style=kind["style"], tied=kind["tied"], model=shape, settings=settings)


def progress_at(step: int) -> Progress:
    return Progress(step, step * 12, step * 12 * 16, {"sources": [[step, "a/b"]]})


def second_half(engine: Engine, progress: Progress, meanwhile: Callable[[], None] = lambda: None) -> Half:
    before = summary(engine)
    mesh = engine.mesh
    valid, _ = engine.eval_step(rank_batches(HALF, engine.config, mesh.data_rank, mesh.data_size))
    meanwhile()
    return Half(progress, before, valid, train(engine, range(HALF, ALL)))


def run_source(case: Case) -> Half:
    """Trains, saves half way while it trains on."""
    engine = make_engine(case.config())
    train(engine, range(HALF))
    with Saver(engine) as saver:
        return second_half(engine, progress_at(HALF), lambda: saver.save(progress_at(HALF)))


def run_target(cases: list[Case]) -> list[Half]:
    """Goes on from what each case loads; cases of one model, one after the other, share an engine."""
    halves, engine, made = [], None, None
    for case in cases:
        config = case.config()
        like = config.model, config.train.precision
        if made != like:
            engine, made = make_engine(config), like
        path = next(find_start(config))
        assert engine is not None and path is not None
        progress = read_progress(config, path)
        load_checkpoint(engine, path)
        halves.append(second_half(engine, progress))
    return halves


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Half]]]:
    """Folder, and each rank's uninterrupted second half, of every source."""
    return run_sources(tmp_path_factory.mktemp("sources"))


def run_sources(folder: Path) -> dict[str, tuple[Path, list[Half]]]:
    import_what_ranks_import()
    found = {}
    for name, (model, layout) in SOURCES.items():
        case = case_of(model, layout, folder / name)
        found[name] = folder / name, run_ranks(case.world_size, run_source, case)
    return found


def run_all(target: str, sources: dict[str, tuple[Path, list[Half]]], output: Path) -> dict[str, list[Half]]:
    """Each rank's second half after every source."""
    layout = TARGETS[target]
    names = sorted(SOURCES, key=lambda name: SOURCES[name][0])
    cases = [
        case_of(SOURCES[name][0], layout, output, **{"checkpoint.load": str(sources[name][0])})
        for name in names
    ]
    ranks = run_ranks(layout.world_size, run_target, cases)
    return {name: [halves[number] for halves in ranks] for number, name in enumerate(names)}


@pytest.mark.parametrize("target", TARGETS)
def test_goes_on_from_every_source(target: str, sources: Any, tmp_path: Path) -> None:
    for source, halves in run_all(target, sources, tmp_path).items():
        expected = sources[source][1][0]
        precisions = {SOURCES[source][1].precision, TARGETS[target].precision}
        loss, norm = (LOSS, NORM) if precisions == {"fp32"} else (BF16_LOSS, BF16_NORM)
        for rank, half in enumerate(halves):
            where = f"from {source}, rank {rank}"
            assert half.progress == expected.progress, where
            assert half.before == expected.before, where
            assert half.valid == pytest.approx(expected.valid, abs=loss), where
            for found, wanted in zip(half.steps, expected.steps, strict=True):
                assert found[0] == pytest.approx(wanted[0], abs=loss), where
                assert found[1] == pytest.approx(wanted[1], rel=norm), where


def test_is_evaluated_and_generates_by_one_process(sources: Any) -> None:
    """What `tools/generate.py` loads computes what the training run would."""
    for name, (folder, halves) in sources.items():
        with Reader(resolve(folder)) as reader:
            config = read_config(reader)
            model = load_model(reader, config)
        tokens = torch.from_numpy(global_batch(HALF, config)[0])
        logits = model(tokens[:, :-1], model.runtime.context())[..., : config.model.vocab_size]
        loss = float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
        bound = BF16_LOSS if SOURCES[name][1].precision == "bf16" else LOSS
        assert loss == pytest.approx(halves[0].valid, abs=bound), name


def main() -> None:
    with TemporaryDirectory() as folder:
        sources = run_sources(Path(folder))
        for target in TARGETS:
            for source, halves in run_all(target, sources, Path(folder) / "output").items():
                expected = sources[source][1][0]
                steps = [zip(half.steps, expected.steps, strict=True) for half in halves]
                worst = max(abs(found[0] - wanted[0]) for pairs in steps for found, wanted in pairs)
                state = "same" if all(half.before == expected.before for half in halves) else "DIFFERS"
                print(f"{source:22} -> {target:24} state {state}, loss {worst:.1e}", flush=True)


if __name__ == "__main__":
    main()

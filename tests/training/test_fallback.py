"""A run that finds damage while it loads takes the next best checkpoint, on all ranks, and all of its state from it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_lite.checkpoint import DamagedCheckpoint
from megatron_lite.checkpoint import reader as reader_module
from megatron_lite.checkpoint.index import FileEntry, read_index, write_index
from megatron_lite.checkpoint.latest import write_latest
from megatron_lite.checkpoint.reshard import reshard
from megatron_lite.training.engine import Engine
from megatron_lite.training.saver import Saver
from megatron_lite.training.saving import Progress
from tests import training_case
from tests.distributed import run_ranks
from tests.training.whole_state import summary
from tests.training_case import Case, import_what_ranks_import, load_start, make_engine, train


@pytest.fixture(scope="module", autouse=True)
def _imports() -> None:
    import_what_ranks_import()


def within(case: Case, folder: Path, **settings: Any) -> Case:
    return replace(case, settings={**case.settings, "train.output_dir": str(folder), **settings})


def save_two(case: Case) -> dict[str, Any]:
    """Steps 1 and 2; the state at step 1."""
    engine = make_engine(case.config())
    for step in (1, 2):
        train(engine, range(step - 1, step))
        if step == 1:
            first = summary(engine)
        Saver(engine).save(Progress(step, step * 8, step * 128), last=True)
    return first


def load(case: Case) -> tuple[str, list[str], list[int], dict[str, Any]]:
    """As a run does: the folder loaded in the end, what was wrong with others, sizes read for sums alone, state."""
    sizes: list[int] = []
    faults: list[str] = []
    original, load_checkpoint = reader_module.crc_of_range, training_case.load_checkpoint

    def noted(path: Path, begin: int, size: int) -> int:
        sizes.append(size)
        return original(path, begin, size)

    def told(engine: Engine, path: Path) -> None:
        try:
            load_checkpoint(engine, path)
        except DamagedCheckpoint as error:
            faults.append(str(error))
            raise

    reader_module.crc_of_range, training_case.load_checkpoint = noted, told
    engine = make_engine(case.config())
    path = load_start(engine)
    assert path is not None
    return path.name, faults, sizes, summary(engine) if engine.optimizer.state else {}


def damage(path: Path, kind: str) -> None:
    """Another bit in the last piece of a kind that a file holds."""
    with reader_module.Reader(path.parent) as reader:
        entry = reader._files[path.name]
        key = [key for key, piece in entry.pieces.items() if piece.kind == kind][-1]
        at = entry.ranges()[key].begin
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# Source and target: the same, fewer ranks, more; partitioned parameters; stages.
CASES = [
    (Case(data=2), Case(data=2)),
    (Case(data=2), Case()),
    (Case(2, 1, 1), Case(data=2, zero=3)),
    (Case(data=2, precision="bf16", zero=2), Case(2, 1, 1, precision="bf16")),
    (Case(), Case(pipeline=2)),
]


@pytest.mark.parametrize(("source", "target"), CASES, ids=lambda case: str(case))
@pytest.mark.parametrize("kind", ["weight", "exp_avg_sq"])
def test_all_ranks_take_the_one_before(source: Case, target: Case, kind: str, tmp_path: Path) -> None:
    first, *_ = run_ranks(source.world_size, save_two, within(source, tmp_path))
    newest = sorted((tmp_path / "checkpoints/step_00000002").glob("rank_*"))[-1]
    damage(newest, kind)
    for path, faults, sizes, state in run_ranks(target.world_size, load, within(target, tmp_path)):
        assert path == "step_00000001"
        (fault,) = faults
        assert f"{newest} is damaged: {kind}/" in fault and fault.count("is damaged") == 1
        assert state == first
        if source == target:
            # Two checkpoints, of which no rank reads more than its share of the headers a second time.
            assert len(sizes) <= 2, sizes


def test_weights_alone_do_not_look_at_moments(tmp_path: Path) -> None:
    run_ranks(1, save_two, within(Case(), tmp_path))
    newest = tmp_path / "checkpoints/step_00000002/rank_00000.safetensors"
    damage(newest, "exp_avg")
    only = {"checkpoint.weights_only": True, "checkpoint.resume": "never", "checkpoint.load": str(tmp_path)}
    ((path, faults, _, state),) = run_ranks(1, load, within(Case(), tmp_path / "other", **only))
    assert (path, faults, state) == ("step_00000002", [], {})
    damage(newest, "weight")
    ((path, faults, _, state),) = run_ranks(1, load, within(Case(), tmp_path / "other", **only))
    assert (path, len(faults), state) == ("step_00000001", 1, {})


def test_no_moments_stay_of_what_was_damaged(tmp_path: Path) -> None:
    """Weights imported into the output folder, and behind them a checkpoint of a run that began there."""
    run_ranks(1, save_two, within(Case(), tmp_path / "run"))
    one, two = (tmp_path / f"run/checkpoints/step_0000000{step}" for step in (1, 2))
    reshard(one, tmp_path, weights_only=True)
    two.rename(tmp_path / "checkpoints" / two.name)
    write_latest(tmp_path / "checkpoints" / two.name)
    case = within(Case(), tmp_path, **{"checkpoint.weights_only": True})
    ((path, faults, _, state),) = run_ranks(1, load, case)
    assert (path, faults) == (two.name, []) and state
    damage(tmp_path / "checkpoints" / two.name / "rank_00000.safetensors", "exp_avg")
    ((path, faults, _, state),) = run_ranks(1, load, case)
    assert (path, len(faults), state) == (one.name, 1, {})


def read_past_the_cache(case: Case) -> set[str]:
    """The steps of which something was read past the page cache."""
    found = set()
    read = reader_module.read_values

    def noted(path: Path, *arguments: Any, past_cache: bool, **options: Any) -> int:
        if past_cache:
            found.add(path.parent.name)
        return read(path, *arguments, past_cache=past_cache, **options)

    reader_module.read_values = noted
    load_start(make_engine(case.config()))
    return found


@pytest.mark.parametrize(
    ("case", "past"), [(Case(), True), (Case(data=2), True), (Case(data=2, zero=0), False)], ids=str
)
def test_what_one_rank_alone_reads_goes_past_the_page_cache(case: Case, past: bool, tmp_path: Path) -> None:
    run_ranks(case.world_size, save_two, within(case, tmp_path))
    assert (
        run_ranks(case.world_size, read_past_the_cache, within(case, tmp_path))
        == [{"step_00000002"} if past else set()] * case.world_size
    )


def load_without_a_file(case: Case) -> tuple[str, list[str], dict[str, Any]]:
    """The second rank does not see a file of the newest step, as on a file system that is late."""
    if dist.get_rank() == 1:
        original = reader_module.check_size

        def late(folder: Path, entry: FileEntry) -> str | None:
            if folder.name == "step_00000002":
                return f"{folder / entry.file} is missing"
            return original(folder, entry)

        reader_module.check_size = late
    path, faults, _, state = load(case)
    return path, faults, state


def test_what_one_rank_cannot_open_is_damaged_for_all(tmp_path: Path) -> None:
    first, *_ = run_ranks(2, save_two, within(Case(data=2), tmp_path))
    for path, faults, state in run_ranks(2, load_without_a_file, within(Case(data=2), tmp_path)):
        assert path == "step_00000001" and state == first
        assert len(faults) == 1 and faults[0].startswith("rank 1: ") and "is missing" in faults[0]


def test_an_index_with_a_hole_is_damaged(tmp_path: Path) -> None:
    first, *_ = run_ranks(2, save_two, within(Case(data=2), tmp_path))
    folder = tmp_path / "checkpoints/step_00000002"
    index = read_index(folder)
    entry = index.files[0]
    del entry.pieces[(key := next(iter(entry.pieces)))], entry.written.tensor_crcs[key]
    write_index(folder, index)
    for path, faults, _, state in run_ranks(2, load, within(Case(data=2), tmp_path)):
        assert path == "step_00000001" and state == first
        assert len(faults) == 1 and "index.json: " in faults[0]


def read_into_what(case: Case) -> list[int]:
    """Where in memory each whole piece was read to."""
    found = []
    read = reader_module.read_values

    def noted(path: Path, begin: int, dtype: torch.dtype, out: torch.Tensor, **options: Any) -> int:
        found.append(out.data_ptr())
        return read(path, begin, dtype, out, **options)

    reader_module.read_values = noted
    load_start(make_engine(case.config()))
    return found


@pytest.mark.parametrize(
    "case", [Case(), Case(data=2, zero=0), Case(data=2), Case(precision="bf16")], ids=str
)
def test_nothing_is_read_twice_to_the_same_place(case: Case, tmp_path: Path) -> None:
    run_ranks(case.world_size, save_two, within(case, tmp_path))
    for places in run_ranks(case.world_size, read_into_what, within(case, tmp_path)):
        assert places and len(set(places)) == len(places)

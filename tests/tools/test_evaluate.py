"""tools/evaluate.py: the figure that the training run reported, from its checkpoint alone."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.checkpoint import Piece, Reader, save
from megatron_lite.data.indexed import read_header
from megatron_lite.data.sidecar import Checksums, sidecar_of, write_sidecar
from megatron_lite.data.writer import WriterState
from megatron_lite.tokenizers import CharTokenizer, load_tokenizer
from tests.command_line import ROOT, rows, run_command, words, write_bytes
from tests.distributed import run_ranks
from tests.training_case import import_what_ranks_import

SETTINGS = (
    "train.steps=4",
    "train.eval_interval=2",
    "train.eval_steps=3",
    "checkpoint.interval=2",
    "checkpoint.weights_interval=2",
    "data.split=70,20,10",
)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_bytes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two stages and tensor ranks, with evaluations, checkpoints and weights alone at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    layout = ("parallel.tensor=2", "parallel.pipeline=2")
    results = run_command(words(prefix, folder, *SETTINGS, *layout), ranks=4)
    assert [result.status for result in results] == [0] * 4, results
    return folder


def evaluate(*arguments: str) -> tuple[int, str, str]:
    import_what_ranks_import()
    (result,) = run_ranks(1, _evaluate, arguments)
    return result


def _evaluate(arguments: tuple[str, ...]) -> tuple[int, str, str]:
    import contextlib
    import io
    import logging

    from tools.evaluate import main

    logging.root.handlers.clear()  # pytest's
    sys.argv = ["evaluate.py", "--device", "cpu", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main()
    return status, out.getvalue(), err.getvalue()


def loss_of(*arguments: str) -> float:
    status, out, err = evaluate(*arguments)
    assert (status, err) == (0, "")
    found = re.search(r"loss (\d+\.\d{6}) \| perplexity [\d.]+ \| ([\d,]+) tokens$", out.strip())
    assert found is not None, out
    return float(found[1])


def test_it_is_what_the_run_reported(run: Path) -> None:
    reported = {row["step"]: row["valid_loss"] for row in rows(run) if "valid_loss" in row}
    (test,) = (row["test_loss"] for row in rows(run) if "test_loss" in row)
    assert loss_of("--load", str(run)) == pytest.approx(reported[4], abs=2e-6)
    assert loss_of("--load", f"{run}/checkpoints/step_00000002") == pytest.approx(reported[2], abs=2e-6)
    assert loss_of("--load", str(run), "--split", "test") == pytest.approx(test, abs=2e-6)
    assert abs(reported[4] - reported[2]) > 1e-3 and abs(reported[4] - test) > 1e-3, "they can be told apart"


@pytest.mark.parametrize(("where", "step"), [("", 4), ("/step_00000002", 2)])
def test_weights_alone_will_do(run: Path, where: str, step: int) -> None:
    """Saved in bf16, they give the loss of the weights rounded to it."""
    reported = {row["step"]: row["valid_loss"] for row in rows(run) if "valid_loss" in row}
    found = loss_of("--load", f"{run}/weights{where}")
    assert found == pytest.approx(reported[step], abs=0.005)
    assert abs(found - reported[step]) > 2e-6, "rounded"
    assert abs(reported[4] - reported[2]) > 0.02, "they can be told apart"


def test_batches_and_tokens(run: Path, prefix: str) -> None:
    _, out, _ = evaluate("--load", str(run))
    assert f"{3 * 8 * 32:,} tokens" in out
    _, out, _ = evaluate("--load", str(run), "--steps", "1")
    assert f"{8 * 32:,} tokens" in out
    own = loss_of("--load", str(run), "--data", prefix)
    assert own != loss_of("--load", str(run))


def test_bf16_is_close_but_not_the_same(run: Path) -> None:
    exact, rounded = loss_of("--load", str(run)), loss_of("--load", str(run), "--dtype", "bf16")
    assert rounded == pytest.approx(exact, abs=0.02) and rounded != exact


def test_damage_is_not_evaluated_unless_asked_for(run: Path, tmp_path: Path) -> None:
    """A bit of an embedding's exponent: the loss was another, and nobody the wiser."""
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints/step_00000004"
    with Reader(newest) as reader:
        weight = reader.read("embed.weight", dim=0, start=0, stop=1)[0, :8].numpy().tobytes()
    (file,) = (path for path in newest.glob("*.safetensors") if weight in path.read_bytes())
    data = bytearray(file.read_bytes())
    data[data.index(weight) + 3] ^= 0x40
    file.write_bytes(data)
    older = loss_of("--load", f"{run}/checkpoints/step_00000002")
    status, out, err = evaluate("--load", str(tmp_path))
    assert status == 0 and f"step_00000002: step 2 | valid loss {older:.6f}" in out
    assert f"step_00000004 cannot be used: {file} is damaged: weight/embed.weight" in err
    assert f"falling back to checkpoint {tmp_path}/checkpoints/step_00000002" in err
    status, out, err = evaluate("--load", str(newest))
    assert (status, out) == (2, "") and err.startswith(f"error: {file} is damaged: weight/embed.weight")
    status, out, err = evaluate("--load", str(newest), "--no-check")
    assert (status, err) == (0, "") and "perplexity inf" in out


def test_bad_input_is_one_message(run: Path, tmp_path: Path) -> None:
    for arguments, message in {
        ("--load", str(tmp_path)): "no checkpoint there",
        ("--load", str(run), "--data", f"{tmp_path}/none"): f"{tmp_path}/none",
        ("--load", str(run), "--steps", "0"): "--steps",
        ("--load", str(run), "--steps", "-1"): "--steps",
    }.items():
        status, out, err = evaluate(*arguments)
        assert status == 2 and out == "", arguments
        assert err.startswith("error: ") and message in err and "Traceback" not in err


@pytest.fixture
def imported(run: Path, tmp_path: Path) -> Callable[[str | None], Path]:
    """The run's weights with another data section: no data named, and this tokenizer."""

    def make(tokenizer: str | None) -> Path:
        with Reader(run / "checkpoints/step_00000004") as reader:
            config = reader.metadata["config"] | {"data": {"tokenizer": tokenizer}}
            pieces = [Piece.whole(name, "weight", reader.read(name)) for name in reader.names()]
        return save(tmp_path / "imported", 4, pieces, {"config": config})

    return make


def test_a_checkpoint_that_names_no_data_nor_a_tokenizer(
    run: Path, prefix: str, imported: Callable[[str | None], Path]
) -> None:
    folder = str(imported(None))
    status, out, err = evaluate("--load", folder)
    assert (status, out) == (2, "")
    assert err == "error: the checkpoint names no data: give --data PREFIX, that of a .bin/.idx pair\n"
    assert loss_of("--load", folder, "--data", prefix) == loss_of("--load", str(run), "--data", prefix)


def test_a_tokenizer_that_was_moved(
    run: Path, prefix: str, tmp_path: Path, imported: Callable[[str | None], Path]
) -> None:
    gone = f"char:{tmp_path}/gone.json"
    folder = str(imported(gone))
    status, out, err = evaluate("--load", folder, "--data", prefix)
    assert (status, out) == (2, "") and f"error: the model's tokenizer, {gone}: " in err
    assert err.endswith("; say where it is now with --tokenizer SPEC\n")
    given = ("--load", folder, "--data", prefix, "--tokenizer", "byte")
    assert loss_of(*given) == loss_of("--load", str(run), "--data", prefix)


def test_data_that_were_moved(tmp_path: Path) -> None:
    gone = tmp_path / "data"
    gone.mkdir()
    run_command(words(write_bytes(gone), tmp_path / "run", "train.steps=1"))
    gone.rename(tmp_path / "elsewhere")
    status, out, err = evaluate("--load", f"{tmp_path}/run")
    assert (status, out) == (2, "")
    assert f"{gone}/bytes.idx: no such file" in err and "for data elsewhere give --data PREFIX" in err
    loss_of("--load", f"{tmp_path}/run", "--data", f"{tmp_path}/elsewhere/bytes")


def test_data_of_another_tokenizer(run: Path, tmp_path: Path) -> None:
    """What the message says can be done."""
    prefix = write_bytes(tmp_path)
    CharTokenizer.train([(ROOT / "LICENSE").read_text()]).save(tmp_path / "chars.json")
    spec = f"char:{tmp_path}/chars.json"
    made = load_tokenizer(spec)
    header = read_header(Path(f"{prefix}.idx"))
    state = WriterState(Path(f"{prefix}.bin").stat().st_size // 2, header.sequences, header.bounds - 1)
    write_sidecar(prefix, sidecar_of(made, np.dtype(np.uint16), state, Checksums.of_files(prefix)))
    status, out, err = evaluate("--load", str(run), "--data", prefix)
    assert (status, out) == (2, "")
    assert f"{prefix}: made with another tokenizer, {spec}, than byte; give --data made with byte, " in err
    assert f"or --tokenizer {spec}, where" in err and "data.tokenizer" not in err
    loss_of("--load", str(run), "--data", prefix, "--tokenizer", spec)


def test_an_interruption_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from tools import evaluate as tool

    def interrupted(_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(tool, "evaluate", interrupted)
    monkeypatch.setattr("sys.argv", ["evaluate.py", "--load", "x"])
    assert tool.main() == 130


def test_no_other_split_is_indexed(run: Path, tmp_path: Path) -> None:
    """A run's training index may be large, and is not needed."""
    prefix = write_bytes(tmp_path)
    loss_of("--load", str(run), "--data", prefix)
    assert len([path for path in (tmp_path / "index_cache").iterdir() if path.is_dir()]) == 1


def test_a_run_without_test_data(prefix: str, tmp_path: Path) -> None:
    run_command(words(prefix, tmp_path, "train.steps=1", "data.split=70,30,0"))
    status, _, err = evaluate("--load", str(tmp_path), "--split", "test")
    assert status == 2
    assert "the run has no test data: data.split is 70,30,0; give --data PREFIX" in err


def test_as_a_command(run: Path) -> None:
    done = subprocess.run(
        [sys.executable, "tools/evaluate.py", "--load", str(run), "--device", "cpu"],
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"{run}/checkpoints/step_00000004: step 4 | valid loss " in done.stdout

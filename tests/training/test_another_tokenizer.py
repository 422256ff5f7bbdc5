"""A checkpoint says which tokenizer it was trained with, and a start with another one is told so."""

import string
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.checkpoint import Reader, resolve
from megatron_lite.data import IndexedDatasetWriter
from megatron_lite.tokenizers import CharTokenizer
from tests.command_line import Result, run_command, words


def texts(folder: Path, name: str, characters: str, seed: int) -> str:
    """Data and tokenizer of these characters, at folder/name and folder/name.json; the prefix."""
    folder.mkdir(exist_ok=True)
    tokenizer = CharTokenizer(sorted(characters))
    tokenizer.save(folder / f"{name}_vocabulary.json")
    text = "".join(np.random.default_rng(seed).choice(sorted(characters), 4000))
    with IndexedDatasetWriter(folder / name, np.uint16) as writer:
        writer.add_sequence(np.array([*tokenizer.encode(text), tokenizer.eod_id]))
        writer.end_document()
    return str(folder / name)


def train(prefix: str, output: Path, *settings: str, ranks: int = 1) -> list[Result]:
    spec = f"data.tokenizer=char:{prefix}_vocabulary.json"
    results = run_command(words(prefix, output, spec, "train.steps=2", *settings), ranks)
    assert [(result.status, result.err) for result in results] == [(0, "")] * ranks, results
    return results


def warnings(out: str) -> list[str]:
    lines = [line[len("00:00:00 ") :] for line in out.splitlines()]
    return [line for line in lines if line.startswith(("data.tokenizer", "model.vocab_size"))]


ENGLISH, GREEK = string.printable[:65], string.printable[:40] + "αβγδεζηθικλμνξοπρστυφχψωΑΒΓΔΕΖΗΘΙΚΛΜ"


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> str:
    return texts(tmp_path_factory.mktemp("data"), "english", ENGLISH, 1)


@pytest.fixture(scope="module")
def trained(english: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step with 67 ids: 65 characters, unknown ones, and the end of a document."""
    output = tmp_path_factory.mktemp("trained")
    assert warnings(train(english, output, "train.exit_after_steps=1")[0].out) == []
    return output


def fingerprint(output: Path) -> str:
    with Reader(resolve(output)) as reader:
        value: str = reader.metadata["tokenizer_fingerprint"]
        return value


def started_from(trained: Path, way: str) -> list[str]:
    return [f"checkpoint.load={trained}", "checkpoint.weights_only=true"][: 1 + (way == "weights")]


@pytest.mark.parametrize("way", ["load", "weights"])
def test_another_texts_tokenizer_is_told_by_the_first_rank(way: str, trained: Path, tmp_path: Path) -> None:
    """Both vocabularies are padded to 128 rows, so that sizes do not tell."""
    greek = texts(tmp_path, "greek", GREEK, 2)
    first, second = train(greek, tmp_path / "run", *started_from(trained, way), "parallel.tensor=2", ranks=2)
    found = warnings(first.out)
    assert len(found) == 2 and second.out == ""
    assert found[0].startswith(
        f"data.tokenizer char:{greek}_vocabulary.json is not the tokenizer that "
        f"{trained}/checkpoints/step_00000001 was trained with (that was char:"
    )
    assert "english_vocabulary.json): ids mean other tokens than in training. Go on only where" in found[0]
    assert found[1].startswith("model.vocab_size was 67 and is 78")
    assert fingerprint(tmp_path / "run") != fingerprint(trained)


def test_a_resume_with_a_vocabulary_file_that_was_written_anew_is_told(tmp_path: Path) -> None:
    prefix = texts(tmp_path / "data", "text", ENGLISH, 1)
    train(prefix, tmp_path / "run", "train.exit_after_steps=1")
    texts(tmp_path / "data", "text", string.printable[5:70], 1)
    found = warnings(train(prefix, tmp_path / "run")[0].out)
    assert len(found) == 1 and "was trained with (the file has changed since): ids mean other" in found[0]


def test_the_same_tokenizer_elsewhere_is_the_same(english: str, trained: Path, tmp_path: Path) -> None:
    elsewhere = texts(tmp_path / "moved", "english", ENGLISH, 1)
    out = train(elsewhere, tmp_path / "run", f"checkpoint.load={trained}")[0].out
    assert warnings(out) == [] and fingerprint(tmp_path / "run") == fingerprint(trained)


def test_checkpoints_and_runs_that_do_not_know_their_tokenizer(
    english: str, trained: Path, tmp_path: Path
) -> None:
    """Data without a sidecar are taken by a run that has no tokenizer; what the checkpoint says is handed on."""
    none = ("data.tokenizer=null", "model.vocab_size=67", f"checkpoint.load={trained}")
    (result,) = train(english, tmp_path / "run", *none)
    assert len(found := warnings(result.out)) == 1
    assert found[0].endswith(
        "english_vocabulary.json and is None: other samples follow, documents may be repeated or left out"
    )
    assert fingerprint(tmp_path / "run") == fingerprint(trained)

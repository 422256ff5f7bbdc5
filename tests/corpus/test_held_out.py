import json
from pathlib import Path

import pytest

from megatron_lite.corpus import CorpusError, held_out
from megatron_lite.corpus.held_out import TrainingTexts, first_samples, is_held_out


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_the_same_documents_are_held_out_in_any_order(tmp_path: Path) -> None:
    numbers = [f"document {number}" for number in range(2000)]
    path, back = write(tmp_path / "a.jsonl", numbers), write(tmp_path / "b.jsonl", numbers[::-1])
    forth_texts, back_texts = TrainingTexts([path], 0.1), TrainingTexts([back], 0.1)
    trained = list(forth_texts)
    assert trained == list(back_texts)[::-1]
    kept = [sample.text for sample in forth_texts.held_out]
    assert kept == [sample.text for sample in back_texts.held_out][::-1]
    assert sorted(kept + trained) == sorted(numbers) and 150 < len(kept) < 250
    where, text = forth_texts.held_out[0]
    assert where == f"{path}:{numbers.index(text) + 1}"
    assert (forth_texts.documents, forth_texts.rejected) == (2000, 0)
    assert all(is_held_out(text, 0.2) for text in kept), "a larger share holds the smaller one"


def test_what_is_kept_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "HELD_OUT_BYTES", 10)
    texts = ["äää", "bbb", "ééé", "dddd"]
    path = write(tmp_path / "a.jsonl", texts)
    assert [s.text for s in first_samples(TrainingTexts([path], 0.0))] == ["äää", "bbb"]
    source = TrainingTexts([path], 1 - 1e-9)
    assert list(source) == [] and [s.text for s in source.held_out] == ["äää", "bbb"]
    path = write(tmp_path / "a.jsonl", ["", "bbbbbb", "äéü", "d"])
    source = TrainingTexts([path], 0.0)
    assert list(source) == ["", "bbbbbb", "äéü", "d"]
    assert [s.text for s in source.seen] == ["bbbbbb", "äé"], "cut at a whole character"


def test_bad_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{\n{"text": "b"}\n')
    with pytest.raises(CorpusError, match=f"{path}:2: not JSON"):
        list(TrainingTexts([path], 0.0))
    texts = TrainingTexts([path], 0.0, on_error="skip")
    assert list(texts) == ["a", "b"] and (texts.documents, texts.rejected) == (2, 1)
    assert f"{path}:2: not JSON" in caplog.text

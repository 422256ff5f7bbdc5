"""examples/quickstart.py, but for the whole run, which is `make train`."""

import json
from pathlib import Path

import pytest

from examples import quickstart
from megatron_lite.config import load_config
from megatron_lite.tokenizers import load_tokenizer
from tests.command_line import ROOT

CONFIG = ROOT / "configs/quickstart.json"


@pytest.mark.parametrize("gpus", range(17))
def test_layout_suits_the_gpus_there_are(gpus: int) -> None:
    ranks, settings = quickstart.layout(gpus)
    config = load_config(CONFIG, settings, world_size=ranks)  # raises where the ranks do not fit
    model_ranks = config.parallel.tensor * config.parallel.pipeline
    expected = {0: (8, 4), 1: (1, 1), 2: (2, 2), 3: (2, 2)}.get(gpus, (4, 4) if gpus < 8 else (8, 4))
    assert (ranks, model_ranks) == expected
    assert ranks <= gpus or not gpus


@pytest.mark.slow
def test_text_of_this_machine_becomes_a_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    monkeypatch.setattr(quickstart, "VOCABULARY", 300)
    corpus = quickstart.write_corpus()
    assert list(corpus.parent.iterdir()) == [corpus], "one pass, one file"
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    assert sum(map(len, texts)) > 1_000_000
    assert all(len(text) >= 32 for text in texts)
    small = tmp_path / "small.jsonl"
    small.write_text("\n".join(json.dumps({"text": text}) for text in texts[:200]))
    quickstart.train_tokenizer(small)
    tokenizer = load_tokenizer(f"hf:{tmp_path / quickstart.RUN}/tokenizer.json")
    assert tokenizer.vocab_size == 300 and tokenizer.eod_id is not None
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]
    assert f"{quickstart.RUN}/docs.jsonl: " in capsys.readouterr().out


def test_the_configuration_reads_what_the_stages_write() -> None:
    config = load_config(CONFIG)
    assert config.data.tokenizer == f"hf:{quickstart.RUN}/tokenizer.json"
    assert config.data.train == f"{quickstart.RUN}/docs_text_document"
    assert config.train.output_dir == str(quickstart.RUN)


def test_a_stage_that_fails_ends_all_with_its_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    (tmp_path / "stage.py").write_text("import sys\nsys.exit(int(sys.argv[1]))\n")
    quickstart.command("stage.py", "0")
    with pytest.raises(SystemExit) as error:
        quickstart.command("stage.py", "7")
    assert error.value.code == 7

import dataclasses
import json
import zlib
from pathlib import Path

import numpy as np
import pytest

from megatron_lite.config import DataConfig
from megatron_lite.data import DatasetError, IndexedDatasetWriter
from megatron_lite.data.sidecar import (
    Sidecar,
    check_datasets,
    check_sidecars,
    read_sidecar,
    sidecar_path,
    write_sidecar,
)


def make(prefix: Path) -> Sidecar:
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        writer.add_documents(np.array([1, 2, 3]), [2, 0, 1])
    sidecar = Sidecar("byte", "f" * 32, 257, 256, False, "plain", "uint16", 3, 2, 3, writer.checksums)
    write_sidecar(prefix, sidecar)
    return sidecar


def test_what_is_written_is_read_and_the_checksums_are_of_the_files(tmp_path: Path) -> None:
    sidecar = make(tmp_path / "x")
    assert read_sidecar(tmp_path / "x") == sidecar
    content = json.loads((tmp_path / "x.json").read_text())
    assert content["format"] == "megatron_lite dataset" and content["version"] == 1
    for end in ("bin", "idx"):
        value = zlib.crc32((tmp_path / f"x.{end}").read_bytes())
        assert content["checksums"][f"crc32 of .{end}"] == f"{value:08x}"


def test_the_right_tokenizer_and_no_sidecar_pass(tmp_path: Path) -> None:
    make(tmp_path / "x")
    check_sidecars([str(tmp_path / "x"), str(tmp_path / "absent")], "f" * 32)
    check_sidecars([str(tmp_path / "x")], None)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(
        DatasetError, match=r"x: made with another tokenizer, byte .*x\.json.*data\.tokenizer"
    ):
        check_sidecars([str(tmp_path / "x")], "e" * 32)


@pytest.mark.parametrize("where", ["train", "valid", "test"])
def test_every_dataset_of_a_config_is_checked(tmp_path: Path, where: str) -> None:
    make(tmp_path / "x")
    others = ((1.0, str(tmp_path / "absent")), (0.5, str(tmp_path / "x")))
    config = DataConfig.model_validate({"train": "absent", where: others})
    check_datasets(config, "f" * 32)
    with pytest.raises(DatasetError, match="another tokenizer"):
        check_datasets(config, "e" * 32)


@pytest.mark.parametrize(
    ("field", "value"), [("documents", 4), ("sequences", 3), ("tokens", 4), ("dtype", "int32")]
)
def test_counts_that_differ_are_refused(tmp_path: Path, field: str, value: object) -> None:
    sidecar = make(tmp_path / "x")
    write_sidecar(tmp_path / "x", dataclasses.replace(sidecar, **{field: value}))
    with pytest.raises(DatasetError, match=f"{field} {value}, but the pair beside it has"):
        check_sidecars([str(tmp_path / "x")], None)


def test_a_pair_written_over_loses_its_sidecar(tmp_path: Path) -> None:
    make(tmp_path / "x")
    with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([5])
    assert read_sidecar(tmp_path / "x") is None and not sidecar_path(tmp_path / "x").exists()


def test_a_json_file_of_the_users_is_no_sidecar_and_stays(tmp_path: Path) -> None:
    corpus = tmp_path / "x.json"
    for content in ('{"text": "a"}', '{"text": "a"}\n{"text": "b"}\n', "[]", " " * (1 << 20) + "{}"):
        corpus.write_text(content)
        with IndexedDatasetWriter(tmp_path / "x", np.uint16) as writer:
            writer.add_document([5])
        check_sidecars([str(tmp_path / "x")], "f" * 32)
        with pytest.raises(DatasetError, match="would be written over"):
            write_sidecar(tmp_path / "x", make(tmp_path / "other"))
        assert corpus.read_text() == content


def test_a_damaged_or_newer_sidecar_is_reported(tmp_path: Path) -> None:
    make(tmp_path / "x")
    path = tmp_path / "x.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"version": 2}))
    with pytest.raises(DatasetError, match="version 2, known is 1"):
        read_sidecar(tmp_path / "x")
    del content["tokens"]
    path.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match="'tokens' is missing"):
        read_sidecar(tmp_path / "x")

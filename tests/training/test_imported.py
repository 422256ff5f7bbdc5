"""From imports through training, and to a Hugging Face folder again, as the README says it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
transformers = pytest.importorskip("transformers")

from megatron_lite.checkpoint import CheckpointError, Reader, resolve  # noqa: E402
from megatron_lite.checkpoint.foreign import import_foreign  # noqa: E402
from megatron_lite.checkpoint.huggingface import export_huggingface, import_huggingface  # noqa: E402
from megatron_lite.config import load_config  # noqa: E402
from tests.checkpoint import test_foreign_universal as universal  # noqa: E402
from tests.command_line import Result, rows, run_command, write_bytes  # noqa: E402

# As many ids as the byte tokenizer has, with which the data are made, and two more.
SMALL = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "bos_token_id": 257,
    "eos_token_id": 256,
}
GENERATION = {"temperature": 0.7, "top_p": 0.8, "do_sample": True, "eos_token_id": [256, 258]}


def mistral(folder: Path) -> Path:
    """A folder as transformers saves it, with recommended settings for generation."""
    torch.manual_seed(1)
    config = transformers.MistralConfig(**SMALL, sliding_window=None)
    transformers.MistralForCausalLM(config).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    return folder


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def ended(results: list[Result]) -> str:
    assert [(result.status, result.err) for result in results] == [(0, "")] * len(results), results
    return results[0].out


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    import_huggingface(mistral(folder / "hf"), folder / "ours")
    return folder / "ours"


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_bytes(tmp_path_factory.mktemp("data"))


def settings(prefix: str, output: Path, *more: str) -> list[str]:
    given = [f"data.train={prefix}", "data.tokenizer=byte", f"train.output_dir={output}", "train.device=cpu"]
    given += ["model.seq_length=32", *more]
    return [word for setting in given for word in ("--set", setting)]


def test_a_run_starts_from_the_configuration_that_an_import_writes(
    prefix: str, imported: Path, tmp_path: Path
) -> None:
    config = load_config(imported / "config.json")
    assert config.train.output_dir == str(imported / "run") and config.data.tokenizer is None
    with Reader(resolve(imported)) as reader:
        assert reader.metadata["config"] == config.model_dump(mode="json")
        weights = {name: reader.read(name) for name in reader.names()}
    command = ["--config", str(imported / "config.json")]
    arguments = [*command, *settings(prefix, tmp_path, "train.steps=2", "optimizer.lr=1e-12")]
    out = ended(run_command([*arguments, "--set", "train.exit_after_steps=1"]))
    assert f"starting from {imported}/checkpoints/step_00000000 at step 0" in out
    with Reader(resolve(tmp_path)) as reader:
        assert all(torch.allclose(reader.read(name), weights[name], atol=1e-9) for name in weights)
    assert "at step 1" in ended(run_command(arguments)), "the same command goes on"
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_run_goes_on_from_an_import_of_another_system(
    prefix: str, tmp_path: Path, weights_only: bool
) -> None:
    """At the step that was imported, where all that training needs came along; else with the weights, from step 0."""
    model = universal.OURS["gpt2"].model_copy(update={"vocab_size": 257, "seq_length": 32})
    theirs = universal.GPT2 | {"vocab_size": 257, "seq_length": 32, "max_position_embeddings": 32}
    # Moments of squares are no less than 0.
    state = {key: value.abs() for key, value in universal.state_of(model).items()}
    source = universal.write(tmp_path / "theirs", state, universal.module_name, theirs, vocabulary=257)
    imported = import_foreign(source, tmp_path / "ours", weights_only=weights_only)
    config = tmp_path / "ours" / "config.json"
    with Reader(imported.folder) as reader:
        assert reader.metadata["config"] == load_config(config).model_dump(mode="json")
    first = 0 if weights_only else 40
    more = settings(prefix, tmp_path / "run", f"train.steps={first + 2}", "optimizer.lr=1e-12")
    out = ended(run_command(["--config", str(config), *more]))
    assert f"starting from {imported.folder} at step {first}" in out
    assert [row["step"] for row in rows(tmp_path / "run")] == [first + 1, first + 2]
    with Reader(resolve(tmp_path / "run")) as reader:
        for name in set(reader.names()) - {"embed.weight"}:  # whose rows of padding were left out
            assert torch.allclose(reader.read(name), state["weight", name], atol=1e-9), name
        progress = reader.metadata["progress"]
        assert progress["consumed_samples"] == 2 + (0 if weights_only else 400)


def test_an_import_leaves_a_configuration_that_is_there(tmp_path: Path) -> None:
    source = mistral(tmp_path / "hf")
    before = (source / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"config\.json is there already; give another folder"):
        import_huggingface(source, source)
    assert (source / "config.json").read_bytes() == before and not (source / "checkpoints").exists()


def test_family_and_generation_settings_come_through_training(
    prefix: str, imported: Path, tmp_path: Path
) -> None:
    """On ranks and through a resume, so that it is also what was resumed from that hands them on."""
    command = ["--config", str(imported / "config.json")]
    more = ("train.steps=2", "train.global_batch_size=2", "checkpoint.interval=1", "parallel.tensor=2")
    arguments = [*command, *settings(prefix, tmp_path / "run", *more)]
    ended(run_command([*arguments, "--set", "train.exit_after_steps=1"], ranks=2))
    ended(run_command([*arguments, "--set", "checkpoint.load=null"], ranks=2))
    exported = export_huggingface(resolve(tmp_path / "run"), tmp_path / "exported")
    assert exported.config["architectures"] == ["MistralForCausalLM"]
    assert exported.config["eos_token_id"] == 256 and exported.config["bos_token_id"] == 257
    assert read(tmp_path / "exported" / "generation_config.json") == GENERATION

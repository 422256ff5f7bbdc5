"""Every configuration that is shipped loads and fits the ranks that it is for; the schema is current."""

import json
from pathlib import Path

import pytest

from megatron_lite.config import load_config
from megatron_lite.config.schema import json_schema

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RANKS = {
    "gpt2_125m": [8],
    "gpt_1.3b": [8],
    "llama3_70b": [256],
    "llama3_8b": [8, 64],
    "quickstart": [8],
    "shakespeare_char": [1],
    "tiny": [1, 2, 4, 8],
}
SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.json") if path.stem != "schema")


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configuration(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.json")
    assert config.description
    for ranks in RANKS[name]:
        config.check_world(ranks)
        assert config.warnings(ranks) == []


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_configuration_says_where_its_tokenizer_comes_from(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.json")
    kind, _, path = str(config.data.tokenizer).partition(":")
    if path.startswith("data/"):  # others are written by the example that uses them
        folder = path.removesuffix("tokenizer.json").rstrip("/") + "/"
        assert f"into {folder}" in (config.description or ""), kind


def test_no_shipped_configuration_recomputes_what_flash_attention_does_not_keep() -> None:
    assert [
        name for name in SHIPPED if load_config(CONFIGS / f"{name}.json").train.recompute == "selective"
    ] == []


def test_sizes_are_what_the_names_say() -> None:
    billions = {"gpt2_125m": 0.125, "gpt_1.3b": 1.3, "llama3_8b": 8.03, "llama3_70b": 70.55}
    for name, size in billions.items():
        count = load_config(CONFIGS / f"{name}.json").model.parameter_count()
        assert count == pytest.approx(size * 1e9, rel=0.015), name


def test_tiny_on_eight_ranks_in_three_dimensions() -> None:
    config = load_config(CONFIGS / "tiny.json", ["parallel.tensor=2", "parallel.pipeline=2"])
    assert (config.data_parallel_size(8), config.accumulation_steps(8), config.warnings(8)) == (2, 4, [])


def test_schema_is_current() -> None:
    text = (CONFIGS / "schema.json").read_text()
    assert text == json.dumps(json_schema(), indent=2) + "\n", (
        "run: python -m megatron_lite.config --schema > configs/schema.json"
    )

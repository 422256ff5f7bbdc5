"""Models from checkpoints: any layout's, in any type, ties and all, without drawing weights that are thrown away."""

from pathlib import Path

import pytest
import torch

from megatron_lite.checkpoint import CheckpointError, Reader, save
from megatron_lite.config import ConfigError
from megatron_lite.inference import generate, load_model, read_config
from megatron_lite.model.gpt import GPT
from megatron_lite.model.runtime import Runtime
from megatron_lite.parallel import parameter as parameter_module
from megatron_lite.parallel.mesh import build_mesh
from megatron_lite.parallel.parameter import spec_of
from tests.distributed import run_ranks
from tests.inference.case import PROMPTS, STYLES, make_config, make_model, recompute_greedy, save_model
from tests.training_case import Case


def load(folder: Path, tensor: int = 1, dtype: torch.dtype = torch.float32) -> GPT:
    with Reader(folder) as reader:
        config = read_config(reader, tensor)
        mesh = build_mesh(tensor) if tensor > 1 else None
        return load_model(reader, config, mesh=mesh, dtype=dtype)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("tied", [True, False])
def test_what_was_saved_comes_back(
    tmp_path: Path, style: str, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(style, tie_embeddings=tied)
    model = make_model(config)
    folder = save_model(model, config, tmp_path)

    def drawn(*_: object) -> None:
        raise AssertionError("a weight was drawn, to be overwritten")

    monkeypatch.setattr(parameter_module, "draw_normal", drawn)
    loaded = load(folder)
    assert (loaded.head.weight is loaded.embed.weight) == tied
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    expected = dict(model.named_parameters())
    assert dict(loaded.named_parameters()).keys() == expected.keys()
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, expected[name])
        assert spec_of(parameter) == spec_of(expected[name])
    tokens = torch.tensor(PROMPTS[2:])
    torch.testing.assert_close(loaded(tokens), model(tokens), rtol=1e-5, atol=1e-5)


def test_in_another_type(tmp_path: Path) -> None:
    config = make_config("llama")
    model = make_model(config)
    loaded = load(save_model(model, config, tmp_path), dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.bfloat16())
    assert len(generate(loaded, PROMPTS, 5, temperature=0)) == 3


def load_and_generate(folder: Path, tensor: int) -> list[list[int]]:
    return generate(load(folder, tensor), PROMPTS, 10, temperature=0)


def train_and_save(case: Case, folder: Path) -> None:
    """What the training loop saves, without the loop."""
    from megatron_lite.training.saving import gather
    from tests.training_case import make_engine, train

    engine = make_engine(case.config())
    train(engine, range(case.steps))
    metadata = {"config": engine.config.model_dump(mode="json")}
    world = {"rank": engine.mesh.rank, "world_size": engine.mesh.world_size, "gather": gather}
    save(folder, case.steps, engine.pieces(), metadata, **world)


@pytest.mark.parametrize(
    "case",
    [
        Case(tensor=2, pipeline=2, style="gpt2", steps=2),
        Case(tensor=2, sequence=True, style="llama", tied=False, steps=2),
        # ZeRO-0 in bf16 is refused with tensor parallelism, which must not keep two ranks from generating.
        Case(zero=0, precision="bf16", style="llama", steps=2),
    ],
    ids=str,
)
def test_a_checkpoint_of_any_layout(tmp_path: Path, case: Case) -> None:
    run_ranks(case.world_size, train_and_save, case, tmp_path)
    folder = tmp_path / f"step_{case.steps:08d}"
    model = load(folder)
    # A model never trained would give other tokens; and one whose tied head was lost would too.
    config = case.config().model
    assert not torch.equal(model.norm.weight, GPT(config, Runtime()).norm.weight)
    reader = Reader(folder)
    for parameter in model.parameters():
        assert torch.equal(parameter, reader.read(spec_of(parameter).name))
    prompts = [prompt[:5] for prompt in PROMPTS]
    expected = [recompute_greedy(model, prompt, 10) for prompt in prompts]
    assert generate(model, prompts, 10, temperature=0) == expected
    both = run_ranks(2, load_and_generate, folder, 2)
    assert both == [load_and_generate(folder, 1)] * 2


def test_too_many_ranks_for_the_model(tmp_path: Path) -> None:
    config = make_config("llama")  # 8 heads in 4 groups
    with (
        Reader(save_model(make_model(config), config, tmp_path)) as reader,
        pytest.raises(ConfigError, match=r"parallel.tensor: 3 .*nearest"),
    ):
        read_config(reader, tensor=3)


def test_a_checkpoint_that_says_nothing_of_its_model(tmp_path: Path) -> None:
    config = make_config("gpt2")
    folder = save_model(make_model(config), config, tmp_path)
    with Reader(folder) as reader:
        reader.metadata = {}
        with pytest.raises(CheckpointError, match='metadata holds no "config"'):
            read_config(reader)


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    config = make_config("gpt2")
    with Reader(save_model(make_model(config), config, tmp_path)) as reader:
        with pytest.raises(CheckpointError, match=r"linear_qkv.weight is \(96, 32\), .* makes it \(64, 32\)"):
            load_model(reader, make_config("gpt2", num_query_groups=2))
        with pytest.raises(CheckpointError, match=r"blocks\.4\..* is not there"):
            load_model(reader, make_config("gpt2", num_layers=5))

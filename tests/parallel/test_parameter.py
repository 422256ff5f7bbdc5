"""Parameters: the same initial values on every layout, and what is recorded of them."""

import math

import pytest
import torch
from torch import Tensor, nn

from megatron_lite.parallel import parameter
from megatron_lite.parallel.mesh import Mesh
from megatron_lite.parallel.parameter import create_parameter, derive_seed, spec_of


def shards(
    size: int, shape: tuple[int, ...], dim: int | None, seed: int = 1, name: str = "w"
) -> list[nn.Parameter]:
    meshes = [Mesh(rank=rank, tensor_size=size) for rank in range(size)]
    return [create_parameter(name, shape, mesh, dim=dim, std=0.02, seed=seed) for mesh in meshes]


def whole(shape: tuple[int, ...], seed: int = 1, name: str = "w") -> Tensor:
    return shards(1, shape, None, seed, name)[0].detach()


@pytest.mark.parametrize("block", [1 << 22, 100, 35, 7, 1])
@pytest.mark.parametrize(
    ("shape", "dim"), [((24, 12), 0), ((24, 12), 1), ((2, 12, 5), 1), ((6, 8, 4), 2), ((24,), 0)]
)
@pytest.mark.parametrize("size", [2, 4])
def test_slices_are_those_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dim: int, size: int, block: int
) -> None:
    """Whatever the block size: blocks that end within a slice, slices within a block, blocks of one row."""
    monkeypatch.setattr(parameter, "_DRAW_BLOCK", block)
    parts = [part.detach() for part in shards(size, shape, dim)]
    assert torch.equal(torch.cat(parts, dim), whole(shape))
    assert all(torch.equal(part, whole(shape)) for part in shards(size, shape, None))


def test_blocks_outside_the_slice_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parameter, "_DRAW_BLOCK", 10)
    drawn: list[object] = []

    def counting(*parts: object) -> int:
        drawn.append(parts[-1])
        return derive_seed(*parts)

    monkeypatch.setattr(parameter, "derive_seed", counting)
    create_parameter("w", (16, 5), Mesh(rank=1, tensor_size=4), dim=0, std=1.0)
    assert drawn == [2, 3]


def test_distribution() -> None:
    values = whole((500, 400))
    assert values.mean().item() == pytest.approx(0, abs=5 * 0.02 / math.sqrt(200_000))
    assert values.std().item() == pytest.approx(0.02, rel=0.01)


def test_name_and_seed_decide() -> None:
    assert torch.equal(whole((8, 8)), whole((8, 8)))
    assert not torch.equal(whole((8, 8)), whole((8, 8), seed=2))
    assert not torch.equal(whole((8, 8)), whole((8, 8), name="v"))
    state = torch.get_rng_state()
    whole((8, 8))
    assert torch.equal(torch.get_rng_state(), state), "torch's own generator was used"


def test_seeds_never_change() -> None:
    """A value of today: another one would give every run other weights and other dropout."""
    assert derive_seed(1234, "embed.weight", 0) == 73465826954980744
    assert 0 <= derive_seed("x") < 1 << 63
    assert len({derive_seed(1, 23), derive_seed(12, 3), derive_seed("1", 23), derive_seed(1, 23, 0)}) == 4


def test_record() -> None:
    made = create_parameter("fc1.weight", (2, 12, 5), Mesh(rank=2, tensor_size=3), dim=1, std=0.1)
    spec = spec_of(made)
    assert (spec.name, spec.global_shape, spec.dim, spec.start, spec.stop) == (
        "fc1.weight",
        (2, 12, 5),
        1,
        8,
        12,
    )
    assert spec.shape == tuple(made.shape) == (2, 4, 5)
    assert made.tensor_model_parallel is True  # type: ignore[attr-defined]
    norm = create_parameter("norm.weight", (5,), Mesh(rank=2, tensor_size=3), fill=1.0)
    assert torch.equal(norm, torch.ones(5)) and spec_of(norm).shape == (5,)
    assert norm.tensor_model_parallel is False  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "shape", "decays"),
    [
        ("linear.weight", (4, 4), True),
        ("fc1.weight", (2, 4, 4), True),
        ("norm.weight", (4,), False),
        ("linear.bias", (4,), False),
        ("fc1.bias", (2, 4), False),
    ],
)
def test_matrices_decay(name: str, shape: tuple[int, ...], decays: bool) -> None:
    assert spec_of(create_parameter(name, shape, Mesh())).decays is decays


def test_dtype_is_rounded_from_fp32() -> None:
    low = create_parameter("w", (8, 8), Mesh(), std=0.02, seed=1, dtype=torch.bfloat16)
    assert low.dtype == torch.bfloat16 and torch.equal(low.detach(), whole((8, 8)).bfloat16())


def test_meta_draws_nothing() -> None:
    made = create_parameter("w", (1 << 40, 2), Mesh(), std=0.02, device="meta")
    assert made.is_meta and spec_of(made).global_shape == (1 << 40, 2)


def test_errors() -> None:
    with pytest.raises(ValueError, match="10 does not divide over 4"):
        create_parameter("w", (10, 2), Mesh(tensor_size=4), dim=0)
    with pytest.raises(TypeError, match="create_parameter"):
        spec_of(nn.Parameter(torch.zeros(1)))

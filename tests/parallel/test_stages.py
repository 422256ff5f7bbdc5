"""The division into stages: as even as can be, by cost."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from megatron_lite.parallel.stages import Layer, stage_bounds


def model(blocks: list[float], head: float = 0.0, embed: float = 0.0) -> list[Layer]:
    def build(_: nn.Parameter | None) -> nn.Module:
        raise AssertionError("dividing must not build")

    return [
        Layer("embed", build, embed),
        Layer("position", build),
        *(Layer(f"blocks.{i}", build, cost, repeated=True) for i, cost in enumerate(blocks)),
        Layer("norm", build),
        Layer("head", build, head),
    ]


def stage_costs(layers: list[Layer], bounds: list[int]) -> list[float]:
    return [sum(layer.cost for layer in layers[a:b]) for a, b in pairwise(bounds)]


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(0, 30), st.integers(0, 30), st.data())
def test_no_division_has_a_cheaper_dearest_stage(
    blocks: list[int], head: int, embed: int, data: st.DataObject
) -> None:
    stages = data.draw(st.integers(1, len(blocks)))
    layers = model([float(b) for b in blocks], float(head), float(embed))
    bounds = stage_bounds(layers, stages)
    assert bounds[0] == 0 and bounds[-1] == len(layers) and len(bounds) == stages + 1
    for a, b in pairwise(bounds):
        assert any(layer.repeated for layer in layers[a:b])
    best = min(
        max(stage_costs(layers, [0, *(2 + cut for cut in cuts), len(layers)]))
        for cuts in combinations(range(1, len(blocks)), stages - 1)
    )
    assert max(stage_costs(layers, bounds)) == best


def blocks_of(layers: list[Layer], bounds: list[int]) -> list[int]:
    return [sum(layer.repeated for layer in layers[a:b]) for a, b in pairwise(bounds)]


def test_a_dear_head_gets_fewer_blocks() -> None:
    layers = model([1.0] * 12, head=3.0)
    assert blocks_of(layers, stage_bounds(layers, 4))[-1] == 1
    layers = model([1.0] * 12, head=0.0)
    assert blocks_of(layers, stage_bounds(layers, 4)) == [3, 3, 3, 3]


def test_equals_stay_even() -> None:
    """Where the dearest stage is given anyway, the others are not made uneven."""
    layers = model([1.0] * 7, head=100.0)
    assert blocks_of(layers, stage_bounds(layers, 4)) == [2, 2, 2, 1]


def test_many_layers_are_divided_at_once() -> None:
    layers = model([1.0] * 126, head=2.5)
    assert sum(blocks_of(layers, stage_bounds(layers, 16))) == 126


def test_blocks_by_the_user() -> None:
    layers = model([1.0] * 6)
    assert stage_bounds(layers, 3, [1, 3, 2]) == [0, 3, 6, 10]
    assert stage_bounds(layers, 1) == [0, 10]


@pytest.mark.parametrize("blocks", [[2, 4], [1, 2, 2], [0, 3, 3], [7, -2, 1]])
def test_blocks_that_do_not_fit(blocks: list[int]) -> None:
    with pytest.raises(ValueError, match="do not divide 6 blocks into 3 stages"):
        stage_bounds(model([1.0] * 6), 3, blocks)


def test_more_stages_than_blocks() -> None:
    with pytest.raises(ValueError, match="2 transformer blocks cannot fill 3 pipeline stages"):
        stage_bounds(model([1.0] * 2), 3)

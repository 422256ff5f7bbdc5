"""Where pieces lie: tilings are told from gaps and overlaps."""

from dataclasses import replace

import pytest
import torch

from megatron_lite.checkpoint import CheckpointError, Piece
from megatron_lite.checkpoint.layout import Span, check_coverage, rectangles, stored


def piece(
    dim=None, start=0, stop=0, flat_start=0, numel=12, name="w", kind="weight", shape=(3, 4), dtype=None
):
    return Piece(name, kind, shape, dim, start, stop, flat_start, torch.zeros(numel, dtype=dtype))


def check(*pieces):
    check_coverage([stored(p, str(p.data.dtype)) for p in pieces])


@pytest.mark.parametrize(
    "pieces",
    [
        [piece()],
        [piece(flat_start=0, numel=5), piece(flat_start=5, numel=7)],
        [piece(dim=0, start=0, stop=3)],
        [piece(1, 0, 1, numel=3), piece(1, 1, 4, 0, 4), piece(1, 1, 4, 4, 5)],
        [piece(), piece(kind="exp_avg"), piece(kind="exp_avg_sq")],
        [piece(shape=(), numel=1)],
    ],
)
def test_tilings_are_accepted_in_any_order(pieces):
    check(*pieces)
    check(*reversed(pieces))


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        ([], "nothing to save"),
        ([piece(numel=11)], "11:12 is missing"),
        ([piece(flat_start=1, numel=11)], "0:1 is missing"),
        ([piece(), piece()], "0:12 is there twice"),
        ([piece(numel=5), piece(flat_start=4, numel=8)], "4:5 is there twice"),
        ([piece(0, 0, 1, numel=4), piece(0, 2, 3, numel=4)], "dimension 0 .*: 1:2 is missing"),
        ([piece(0, 0, 2, numel=8), piece(0, 1, 3, numel=8)], "1:2 is there twice"),
        (
            [piece(0, 0, 1, numel=4), piece(1, 0, 4, numel=12)],
            "sharded along dimension .0. and others are not",
        ),
        ([piece(0, 0, 1, numel=4), piece(1, 1, 4, numel=9)], "sharded along dimension"),
        ([piece(kind="exp_avg")], "no rank holds weight of w"),
        ([piece(), piece(name="v"), piece(kind="exp_avg")], "no rank holds exp_avg of v"),
        ([piece(numel=6), piece(flat_start=6, numel=6, dtype=torch.float16)], "differ in dtype"),
        ([piece(), piece(shape=(4, 4), numel=16)], "differ in shape"),
        ([piece(), piece(kind="exp_avg", shape=(4, 3))], "weight and its optimizer state differ in shape"),
    ],
)
def test_what_does_not_tile_is_named(pieces, says):
    with pytest.raises(CheckpointError, match=says):
        check(*pieces)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (piece(kind="momentum"), "kind must be one of"),
        (replace(piece(), data=torch.zeros(3, 4)), "data must be 1-D"),
        (piece(dim=2, stop=3), "no dimension 2"),
        (piece(0, 2, 4, numel=8), "outside dimension 0"),
        (piece(0, 2, 2, numel=0), "outside dimension 0"),
        (piece(flat_start=1), "flat range 1:13 is outside"),
        (piece(flat_start=-1, numel=3), "outside its shard"),
        (piece(1, 0, 2, 3, 4), "flat range 3:7 is outside"),
    ],
)
def test_a_piece_that_contradicts_itself_is_named(broken, says):
    with pytest.raises(CheckpointError, match=f"piece of w.*{says}"):
        stored(broken, "F32")


def test_a_flat_range_is_at_most_three_rectangles_that_hold_just_its_elements():
    shape, dim, start, stop = (4, 3, 2), 1, 1, 3
    matrix = torch.arange(24).view(4, 6)
    shard = torch.arange(24).view(shape)[:, 1:3].reshape(-1)
    for low in range(len(shard)):
        for high in range(low + 1, len(shard) + 1):
            boxes = rectangles(shape, dim, Span(start, stop, low, high))
            assert len(boxes) <= 3
            parts = [matrix[b.top : b.bottom, b.left : b.right].reshape(-1) for b in boxes]
            assert [b.offset for b in boxes] == [sum(map(len, parts[:i])) for i in range(len(parts))]
            assert torch.equal(torch.cat(parts), shard[low:high])

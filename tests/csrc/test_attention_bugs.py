"""Bugs planted in the CUDA attention, one at a time, are caught by the check that its other tests make."""

import pytest

from tests.csrc.attention_check import SOURCES, check
from tests.csrc.emulation import EmulatorError, compiled

FORWARD, BACKWARD = SOURCES
TILE, DROPOUT = "attention_tile.cuh", "attention_dropout.cuh"
BUGS = {
    "forward: no barrier": (
        FORWARD,
        "    __syncthreads();  // this tile is there",
        "    // this tile is there",
    ),
    "forward: waits for too little": (
        FORWARD,
        "    copy_async_wait<0>();\n    __sync",
        "    copy_async_wait<1>();\n    __sync",
    ),
    "forward: next tile over this one": (FORWARD, "load(next.first, stage ^ 1)", "load(next.first, stage)"),
    "forward: no rescale": (FORWARD, "if (shrink != 1.0f)", "if (false)"),
    "forward: sum of one lane": (FORWARD, "total += __shfl_xor_sync(kAllLanes, total, 2);", ""),
    "forward: keys beyond the end": (FORWARD, "key + Columns > p.keys ||", ""),
    "forward: diagonal tile not masked": (
        FORWARD,
        "key + Columns - 1 > query + p.shift()",
        "key > query + p.shift() + Rows",
    ),
    "forward: last tile left out": (
        FORWARD,
        "min(p.keys, query + Rows + p.shift())",
        "min(p.keys, query + p.shift())",
    ),
    "documents: others not masked": (TILE, "masked = !range.same(own);", ""),
    "mask: off by one": (TILE, "if (key > min(last_key", "if (key >= min(last_key"),
    "mask: triangle from the top left": (TILE, "return keys - queries;", "return 0;"),
    "backward: rows for columns": (TILE, "query = KeyRows ? c : r, key", "query = KeyRows ? r : r, key"),
    "backward: documents of rows for columns": (
        TILE,
        "if (id != rows[min(row + 16 * m, last",
        "if (id != columns[min(row + 16 * m, last",
    ),
    "documents: last ids": (TILE, "batch * (last_row + int64_t(1))", "batch * int64_t(last_row)"),
    "documents: touching ranges left out": (TILE, "low <= other.high &&", "low < other.high &&"),
    "documents: a stretch is judged by its beginning": (
        TILE,
        "min(first + stretch, end)",
        "min(first + Columns, end)",
    ),
    "copy: other swizzle": (TILE, "copy_async(tile + to,", "copy_async(tile + (i + row) * D + chunk * 8,"),
    "copy: rows beyond the end": (TILE, "? rows - first - row : 0", "? Rows : 0"),
    "scores: other swizzle": (
        TILE,
        "2 * k, lane % 8 + lane / 16 * 8, lane / 8 % 2",
        "2 * k, lane % 8 + lane / 8 % 2 * 8, lane / 16",
    ),
    "values: rows of the wrong lanes": (
        TILE,
        "chunk + n, lane % 16, lane / 16",
        "chunk + n, lane / 2, lane % 2",
    ),
    "store: lanes not in step": (TILE, "  __syncwarp();\n  for (int i = lane", "  for (int i = lane"),
    "store: rows beyond the end": (TILE, "first + r < rows && column", "first + r <= rows && column"),
    "backward: no barrier": (
        BACKWARD,
        "    __syncthreads();  // this tile is there",
        "    // this tile is there",
    ),
    "backward: waits for too little": (
        BACKWARD,
        "    copy_async_wait<0>();\n    __sync",
        "    copy_async_wait<1>();\n    __sync",
    ),
    "backward: delta forgotten": (BACKWARD, "(dp[m][n][e] - mine[e].y)", "dp[m][n][e]"),
    "backward: half of delta": (BACKWARD, "int lanes = width / 2;", "int lanes = width / 4;"),
    "backward: queries beyond the end": (
        BACKWARD,
        "sum == -INFINITY ? INFINITY : sum * kLog2E",
        "sum * kLog2E",
    ),
    "backward: first queries left out": (
        BACKWARD,
        "max(0, row - p.shift()) / Columns",
        "max(0, row - p.shift() + Columns) / Columns",
    ),
    "backward: other heads of the group": (BACKWARD, "KeyRows ? head + heads : head + 1", "head + 1"),
    "backward: diagonal tile not masked": (
        BACKWARD,
        "last_key > first_query + p.shift()",
        "last_key > first_query + p.shift() + 2 * Rows",
    ),
    "backward: scale": (BACKWARD, "*= p.scale * p.kept", "*= p.kept"),
    "dropout: of the sums too": (FORWARD, "p.kept / total", "1.0f / total"),
    "dropout: this slice's heads": (TILE, "first_plane + head", "head"),
    "dropout: lanes keep what they draw": (
        DROPOUT,
        "return swap_bits<1, 2, 0x33333333u>(bits)",
        "return bits",
    ),
    "dropout: low half of the number": (DROPOUT, "uint64_t number =", "uint32_t number ="),
    "dropout: odd row": (DROPOUT, "r = row + g + i / 2 % 2 * 8,", "r = row + g,"),
    "backward: dropout at the transposed position": (
        DROPOUT,
        "number = ((plane * p.queries + query) * p.keys + key) / 4",
        "number = ((plane * p.queries + (KeyRows ? key : query)) * p.keys + (KeyRows ? query : key)) / 4",
    ),
    "backward: dropout of other lanes": (DROPOUT, "swap_bits<4, 1, 0x55555555u>(bits)", "bits"),
    "backward: dropout of dV left out": (BACKWARD, "if (KeyRows && p.drops) drop(s, bits);", ""),
    "backward: delta of what is dropped": (BACKWARD, "delta * share_kept", "delta"),
    "backward: stage of the columns' numbers": (
        BACKWARD,
        "queries + (KeyRows ? stage * Columns : warp_row)",
        "queries + (KeyRows ? 0 : warp_row)",
    ),
    "backward: numbers of another warp's rows": (
        BACKWARD,
        "queries + (KeyRows ? stage * Columns : warp_row)",
        "queries + (KeyRows ? stage * Columns : 0)",
    ),
    "backward: a warp leaves out its diagonal": (
        BACKWARD,
        "first_key > last_query + p.shift())",
        "first_key + 32 > last_query + p.shift())",
    ),
}
ONE_SIZE = (  # compiles a sixteenth of the kernels
    (
        FORWARD,
        "dtype == MLITE_BF16 ? forward_by_size<Bf16> : forward_by_size<Fp16>",
        "launch_forward<Bf16, 64, 128, 64, 4>",
    ),
    (
        BACKWARD,
        "dtype == MLITE_BF16 ? backward_by_size<Bf16> : backward_by_size<Fp16>",
        "launch_backward<Bf16, 64, 64, TileShape<128, 32, 4>, TileShape<128, 32, 4>>",
    ),
)


def check_one_size(edits: tuple[tuple[str, str, str], ...] = (), backward: bool = True) -> None:
    library = compiled(*(SOURCES if backward else SOURCES[:1]), edits=(*ONE_SIZE, *edits))
    check(library, (1, 1, 1, 20, 70, 64), causal=False, backward=backward)
    check(library, (1, 2, 1, 150, 213, 64), backward=backward)
    check(library, (2, 1, 1, 90, 150, 64), causal=False, segments="documents", backward=backward)
    check(library, (1, 1, 1, 20, 900, 64), causal=False, segments="documents", backward=backward)
    check(library, (2, 1, 1, 20, 72, 64), causal=False, drop=(0.4, 3, 2, 2**30), backward=backward)
    check(library, (1, 1, 1, 20, 37, 64), drop=(0.4, 3, 0, 1), backward=backward)


def test_one_size_is_right() -> None:
    check_one_size()


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_caught(bug: str) -> None:
    with pytest.raises((AssertionError, EmulatorError)) as caught:
        check_one_size((BUGS[bug],), backward=bug.startswith("backward"))
    print(bug, "->", caught.value)

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_lite.corpus import CorpusError, _text
from megatron_lite.corpus.dedup import Substrings
from tests.corpus.dedup.case import run


def without_repeats(texts: list[str], length: int) -> list[str]:
    """Every window, looked up in the set of all before."""
    seen: set[bytes] = set()
    results = []
    for text in texts:
        data = text.encode()
        gone = [False] * len(data)
        for start in range(len(data) - length + 1):
            window = data[start : start + length]
            if window in seen:
                gone[start : start + length] = [True] * length
            seen.add(window)
        kept = ""
        at = 0
        for character in text:
            size = len(character.encode())
            # A character stays if any byte of it does.
            kept += "" if all(gone[at : at + size]) else character
            at += size
        results.append(kept)
    return results


@given(
    st.lists(
        st.one_of(
            st.text(st.sampled_from("ab"), max_size=60),
            st.lists(st.sampled_from(["ünïcödé ", "abcdefgh", "🙂🙂", "x"]), max_size=10).map("".join),
        ),
        max_size=8,
    ),
    st.integers(8, 13),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_as_if_every_window_were_looked_up(tmp_path: Path, texts: list[str], length: int) -> None:
    expected = without_repeats(texts, length)
    kept, ids, _ = run(tmp_path, texts, Substrings(length))
    stays = [n for n, text in enumerate(expected) if text.strip() or text == texts[n]]
    assert ids == stays and kept == [expected[number] for number in stays]


def test_characters_cut_in_part_stay(tmp_path: Path) -> None:
    # ä is C3 A4, ü C3 BC and Ĥ C4 A4: a byte more in common than characters.
    texts = ["abcdefghä", "abcdefghü", "ä12345678", "Ĥ12345678", "abcdefgh", "bcdefghö"]
    kept = run(tmp_path, texts, Substrings(9))[0]
    assert kept == ["abcdefghä", "ü", "ä12345678", "Ĥ", "abcdefgh", "bcdefghö"] == without_repeats(texts, 9)


def test_planted_spans_are_cut_and_nothing_else(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    texts = ["".join(chr(97 + c) for c in random.integers(0, 26, 500)) for _ in range(40)]
    span, short = texts[0][100:300], texts[1][100:299]
    texts[20] = texts[20][:50] + span + texts[20][50:]
    texts[30] = texts[30][:77] + short + texts[30][77:]
    kept, _, report = run(tmp_path, texts, Substrings(200), piece_bytes=2000)
    assert report["bytes"]["cut"] in range(200, 204)  # a neighbouring character may agree by chance
    assert [n for n, text in enumerate(texts) if kept[n] != text] == [20]
    assert report["rules"][0]["examples"][0]["removed"].startswith(span[:100])


@given(st.binary(max_size=200), st.integers(1, 20), st.integers(1, 20))
def test_winnowing_leaves_no_gap_and_keeps_order(data: bytes, width: int, window: int) -> None:
    data = bytes(byte % 3 for byte in data)
    hashes, positions = _text.winnow(data, width, window)
    count = len(data) - width + 1
    every = [int(_text.winnow(data[at : at + width], width, 1)[0][0]) for at in range(max(count, 0))]
    assert hashes.tolist() == [every[at] for at in positions] and (np.diff(positions) > 0).all()
    for start in range(count - window + 1):
        chosen = [at for at in positions.tolist() if start <= at < start + window]
        assert min(every[start : start + window]) in [every[at] for at in chosen]


@given(st.binary(min_size=30, max_size=80), st.integers(1, 10))
def test_windows_are_fingerprinted_by_their_bytes(data: bytes, width: int) -> None:
    data = bytes(byte % 2 for byte in data)
    ranges = np.array([[0, 5], [5, 5], [7, len(data) - width + 1]])
    starts = [*range(5), *range(7, len(data) - width + 1)]
    found = [tuple(row) for row in _text.window_hashes(data, ranges, width).tolist()]
    windows = [data[start : start + width] for start in starts]
    assert len(found) == len(windows)
    assert len(set(zip(found, windows, strict=True))) == len(set(found)) == len(set(windows))
    with pytest.raises(IndexError, match="leaves the text"):
        _text.window_hashes(data, np.array([[0, len(data) - width + 2]]), width)


def test_pieces_workers_and_memory_change_nothing(tmp_path: Path) -> None:
    random = np.random.default_rng(6)
    blocks = ["".join(chr(97 + c) for c in random.integers(0, 26, 40)) for _ in range(30)]
    texts = ["".join(blocks[i] for i in random.integers(0, 30, 4)) for _ in range(60)]
    results = []
    for number, (workers, memory, size) in enumerate(
        [(1, 1 << 30, 1 << 20), (1, 50_000, 999), (2, 90_000, 3000)]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        settings = {"workers": workers, "memory": memory, "piece_bytes": size}
        results.append(run(folder, texts, Substrings(30), **settings)[:2])
    assert all(before == after for before, after in itertools.pairwise(results))


def test_length_is_at_least_eight(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="at least 8"):
        run(tmp_path, ["a"], Substrings(7))

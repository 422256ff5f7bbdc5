import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_lite.corpus import CorpusError, _text
from megatron_lite.corpus.dedup import MinHash
from megatron_lite.corpus.dedup.words import table
from tests.corpus.dedup.case import run


def signatures(texts: list[str], rule: MinHash) -> np.ndarray:
    return _text.minhash(texts, rule.ngram, table(), *rule.permutations())[0]


def pair(random: np.random.Generator, words: int, similarity: float) -> list[str]:
    """Two texts of as many words, whose sets of words have about that Jaccard index."""
    shared = round(2 * words * similarity / (1 + similarity))
    drawn = [f"w{number}" for number in random.choice(10**9, 2 * words - shared, replace=False)]
    return [" ".join(drawn[:words]), " ".join(drawn[words - shared :])]


def test_signatures_are_the_lowest_of_each_permutation() -> None:
    rule = MinHash(ngram=3, bands=5, rows=3)
    texts = ["one two three four one two three", "ONE, two", "", "--", "東京都庁舎", "x " * 50]
    found, words = _text.minhash(texts, 3, table(), *rule.permutations())
    assert words.tolist() == [7, 2, 0, 0, 5, 50] and found.shape == (6, 15)
    a, b = rule.permutations()
    assert (a % 2 == 1).all() and len(set(a.tolist())) == 15
    for text, signature in zip(texts, found, strict=True):
        hashes = (_text.ngram_hashes(text, 3, table(), True) >> np.uint64(32)).astype(np.uint32)
        expected = (a[:, None] * hashes + b[:, None]).min(axis=1, initial=2**32 - 1)
        assert signature.tolist() == expected.tolist()


@pytest.mark.parametrize("similarity", [0.2, 0.5, 0.8, 0.95])
def test_the_estimate_is_the_jaccard_index(similarity: float) -> None:
    rule = MinHash(ngram=1, bands=16, rows=8)
    random = np.random.default_rng(2)
    texts = [text for _ in range(200) for text in pair(random, 300, similarity)]
    one, two = (set(text.split()) for text in texts[:2])
    true = len(one & two) / len(one | two)
    found = signatures(texts, rule)
    estimates = (found[0::2] == found[1::2]).mean(axis=1)
    variance = true * (1 - true) / 128
    assert abs(estimates.mean() - true) < 4 * math.sqrt(variance / 200)
    assert 0.6 < estimates.var() / variance < 1.5  # of 200 draws; independent permutations give 1


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8])
def test_pairs_are_found_with_the_chance_of_the_s_curve(tmp_path: Path, similarity: float) -> None:
    rule = MinHash(ngram=1)
    random = np.random.default_rng(3)
    texts = [text for _ in range(300) for text in pair(random, 200, similarity)]
    one, two = (set(text.split()) for text in texts[:2])
    chance = rule.chance(len(one & two) / len(one | two))
    dropped = run(tmp_path, texts, rule, piece_bytes=100_000, memory=1 << 24)[2]["rules"][0]["documents"]
    assert abs(dropped - 300 * chance) < 4 * math.sqrt(300 * chance * (1 - chance))


def test_the_report_states_the_s_curve(tmp_path: Path) -> None:
    report = run(tmp_path, ["a b c d e f"], MinHash())[2]["rules"][0]
    assert report["threshold"] == 0.719
    assert report["chance_at_similarity"]["0.8"] == pytest.approx(1 - (1 - 0.8**8) ** 14, abs=1e-6)


FEW_WORDS = st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=8).map(" ".join), max_size=20)


@given(texts=FEW_WORDS, verify=st.sampled_from([0.0, 0.25, 0.5, 0.625, 0.8]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_clusters_by_hand(tmp_path: Path, texts: list[str], verify: float) -> None:
    rule = MinHash(ngram=1, bands=4, rows=2, verify=verify)
    found = signatures(texts, rule).reshape(len(texts), 4, 2)
    cluster = list(range(len(texts)))
    for i, j in itertools.combinations([n for n, text in enumerate(texts) if text], 2):
        if (found[i] == found[j]).all(axis=1).any():
            low, high = sorted((cluster[i], cluster[j]))
            cluster = [low if number == high else number for number in cluster]
    kept: list[int] = []
    for number in range(len(texts)):
        leaders = [other for other in kept if cluster[other] == cluster[number]]
        alike = [other for other in leaders if (found[other] == found[number]).mean() >= verify]
        if not alike:
            kept.append(number)
    assert run(tmp_path, texts, rule)[1] == kept


def test_a_chain_of_likeness_is_broken_by_verification(tmp_path: Path) -> None:
    words = [f"w{number}" for number in range(400)]
    texts = [
        " ".join(words[start : start + 200]) for start in range(0, 160, 10)
    ]  # neighbours: 0.9, ends: 0.14
    assert len(run(tmp_path, texts, MinHash(ngram=1))[1]) == 1
    kept, ids, _ = run(tmp_path, texts, MinHash(ngram=1, verify=0.7))
    assert 3 <= len(kept) <= 8
    found = signatures(texts, MinHash(ngram=1))
    for number in set(range(len(texts))) - set(ids):
        assert max((found[number] == found[other]).mean() for other in ids if other < number) >= 0.7


def test_pieces_workers_and_memory_change_nothing(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    texts = [text for _ in range(60) for text in pair(random, 20, 0.9)]
    texts = [texts[number] for number in random.permutation(len(texts))]
    results = []
    for number, (workers, memory, size) in enumerate(
        [(1, 1 << 30, 1 << 20), (1, 10_000, 300), (2, 30_000, 3000)]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        settings = {"workers": workers, "memory": memory, "piece_bytes": size}
        _, ids, report = run(folder, texts, MinHash(ngram=1, verify=0.6), **settings)
        results.append((ids, [row["dropped_text"] for row in report["rules"][0]["examples"]]))
    assert len(results[0][0]) < 100 and all(before == after for before, after in itertools.pairwise(results))


def test_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    for rule in (MinHash(ngram=0), MinHash(bands=0), MinHash(verify=1.5), MinHash(seed=-1)):
        with pytest.raises(CorpusError, match="minhash: "):
            run(tmp_path, ["a"], rule)

"""tokenizer.json of a SentencePiece model, which gives the same ids.

What transformers makes of a .model by itself gives other ids for texts with spaces in front or in a row, so that
nothing is left to it. The library behind tokenizer.json works on the same two algorithms; the differences are in what
comes before, and in what follows of equal scores.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

SPACE = "▁"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
UNIGRAM, BPE = 1, 2
# Normalisations that compose characters, which the library's reading of their tables does not do as it should.
_COMPOSING = ("nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf")
_MARKER = "\ufdd0"  # a noncharacter
# Before what joins the character in front of it: marks (those of Unicode 17 by number), joiners, some letters.
_JOINING = r"(?<=.)(?=[\p{M}\x{1ACF}-\x{1AEB}\x{E33}\x{EB3}\x{200C}\x{200D}\x{FF9E}\x{FF9F}])|(?<=\r)(?=\n)"


class UnknownModel(ValueError):
    """What a SentencePiece model has that cannot be said in a tokenizer.json."""


class Piece(NamedTuple):
    """An entry of the vocabulary, with the numbers of sentencepiece_model.proto for its kind."""

    text: str
    score: float
    kind: int


class Model(NamedTuple):
    """What a .model file says; of the special tokens the names, None for one that it does not have."""

    pieces: list[Piece]
    algorithm: int
    byte_fallback: bool
    space_behind: bool
    normalization: str
    table: bytes
    space_first: bool
    single_spaces: bool
    escaped_spaces: bool
    unknown: str | None
    first: str | None
    last: str | None

    @property
    def special_ids(self) -> dict[str, int]:
        """Ids of the pieces that stand for no text."""
        return {piece.text: number for number, piece in enumerate(self.pieces) if piece.kind == _CONTROL}


def read_model(content: bytes) -> Model:
    """Read a .model file, of which the SentencePiece library shows too little. It is valid, as the library has it."""
    pieces, trainer, normalizer = [], {}, {}
    for number, value in _fields(content):
        if number == 1:
            piece = dict(_fields(value))
            (score,) = struct.unpack("<f", piece.get(2, bytes(4)))
            pieces.append(Piece(piece.get(1, b"").decode(), score, piece.get(3, _NORMAL)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    control = {piece.text for piece in pieces if piece.kind == _CONTROL}
    first, last = (trainer.get(number, name).decode() for number, name in ((46, b"<s>"), (47, b"</s>")))
    return Model(
        pieces,
        algorithm=trainer.get(3, UNIGRAM),
        byte_fallback=bool(trainer.get(35, 0)),
        space_behind=bool(trainer.get(24, 0)),
        normalization=normalizer.get(1, b"").decode(),
        table=normalizer.get(2, b""),
        space_first=bool(normalizer.get(3, 1)),
        single_spaces=bool(normalizer.get(4, 1)),
        escaped_spaces=bool(normalizer.get(5, 1)),
        unknown=next((piece.text for piece in pieces if piece.kind == _UNKNOWN), None),
        first=first if first in control else None,
        last=last if last in control else None,
    )


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protobuf message: an int, or the bytes of anything else."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or varint()
        yield key >> 3, message[at : at + size]
        at += size


def of_sentencepiece(model: Model) -> dict[str, Any]:
    """tokenizer.json of a model; a second for 32,000 pieces. Raises UnknownModel."""
    _check(model)
    # At most so many spaces that the text did not begin with.
    spaces = 1000 if model.single_spaces else int(model.space_first)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": piece.text, "special": piece.kind != _USER_DEFINED}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            | {"normalized": piece.kind == _USER_DEFINED}
            for number, piece in enumerate(model.pieces)
            if piece.kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(model)},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                _replace(SPACE, " "),
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": spaces, "stop": 0},
            ],
        },
        "model": _bpe(model) if model.algorithm == BPE else _unigram(model),
    }


def notes_of(model: Model) -> list[str]:
    """Where the ids may be others all the same, in words."""
    notes = []
    if model.algorithm == UNIGRAM:
        # SentencePiece adds up scores in fp32, the other library in fp64.
        notes.append(
            "of equally likely divisions of a text it may take another, so that the order of ids differs"
        )
        # Its type "llama" merges pairs by score; that for unigram models it takes for T5 alone.
        notes.append("llama.cpp divides texts as with a BPE model, so that many words get other ids there")
    if model.table:
        notes.append("two accents of a letter in another order than Unicode's are read otherwise")
    return notes


def _check(model: Model) -> None:
    kinds = {piece.kind for piece in model.pieces}
    known = {piece.text for piece in model.pieces if piece.kind == _NORMAL}
    faults = {
        "it is neither BPE nor unigram": model.algorithm not in (UNIGRAM, BPE),
        "spaces belong to the word before them": model.space_behind,
        "spaces are left as they are": not model.escaped_spaces,
        f"it has pieces of kind {max(kinds)}": not kinds
        <= {_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE},
        "it has no unknown piece": model.unknown is None,
        # The library would divide the text there first, and normalise the parts one by one.
        "it has symbols of the user, and puts or takes away spaces": _USER_DEFINED in kinds
        and (model.space_first or model.single_spaces or bool(model.table)),
        f"its normalisation is {model.normalization or 'unknown'}": bool(model.table)
        and model.normalization not in _COMPOSING,
        "a piece has a space": any(" " in text for text in known),
        "a piece has a character that is none": not {letter for text in known for letter in text} <= known,
    }
    if found := [fault for fault, true in faults.items() if true]:
        raise UnknownModel("; ".join(found))


def _normalizers(model: Model) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    if model.table:
        # The library goes by clusters of characters, and where a short one begins with something to be replaced, it
        # drops the rest: a sign over "½", the second accent of a letter. So letters are composed before, but for the
        # mark that is two, and what is left of the clusters is taken apart.
        table = base64.b64encode(model.table).decode()
        steps += [
            _replace("\u0344", _MARKER + "\u0308\u0301"),
            {"type": "NFC"},
            _replace_all(_JOINING, _MARKER),
        ]
        steps += [{"type": "Precompiled", "precompiled_charsmap": table}, _replace(_MARKER, "")]
    if model.single_spaces:
        steps += [_replace_all(r"\A +| +\z", ""), _replace_all(" {2,}", " ")]
    if model.space_first:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append(_replace(" ", SPACE))
    if model.single_spaces:
        steps.append(_replace_all(rf"{SPACE}+\z", ""))  # those that were this letter in the text
    return steps


def _replace(text: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": text}, "content": content}


def _replace_all(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _bpe(model: Model) -> dict[str, Any]:
    """Every way to make a piece of two others, best score first."""
    numbers = {piece.text: number for number, piece in enumerate(model.pieces)}
    scores = {piece.text: piece.score for piece in model.pieces if piece.kind == _NORMAL}
    merges = [
        (-score, numbers[text], text[:at], text[at:])
        for text, score in scores.items()
        for at in range(1, len(text))
        if text[:at] in scores and text[at:] in scores
    ]
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "vocab": numbers,
        "merges": [f"{left} {right}" for *_, left, right in sorted(merges)],
    }


def _unigram(model: Model) -> dict[str, Any]:
    # The library reads names like "<0x0A>" in a text, too, where they are not dearer than their letters. (They still
    # are cheaper than a letter that is not in the vocabulary.)
    never = 100 * min(0.0, *(piece.score for piece in model.pieces)) - 100
    return {
        "type": "Unigram",
        "unk_id": next(n for n, piece in enumerate(model.pieces) if piece.kind == _UNKNOWN),
        "vocab": [[p.text, p.score if p.kind in (_NORMAL, _USER_DEFINED) else never] for p in model.pieces],
        "byte_fallback": model.byte_fallback,
    }

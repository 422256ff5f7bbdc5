"""JSON lines: blocks of whole lines out of a file, and one line to the object in it."""

from __future__ import annotations

import datetime
import decimal
import json
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from types import NoneType
from typing import Any, BinaryIO, cast

from megatron_lite.corpus.files import CorpusError, require

BOM = b"\xef\xbb\xbf"
_DEEPER = 2000  # levels of nesting more, so that the judge reads all that orjson does (1024)
_KEYS_NAMED = 8  # of those that a record has, where the one asked for is missing
_ORJSON_INTEGERS = 2.0**63  # whole numbers below minus this, or above twice it, come out of orjson as floats


def line_blocks(file: BinaryIO, block_bytes: int) -> Iterator[tuple[int, bytes]]:
    """(number of the first line, whole lines), each of about `block_bytes`; a longer line is a block of its own.

    Only a block without a final "\\n" can be the last one.
    """
    first = 1
    rest: list[bytes] = []  # of a line that has not ended; joined once, however long it gets
    while block := file.read(block_bytes):
        end = block.rfind(b"\n") + 1
        if end == 0:
            rest.append(block)
            continue
        data = b"".join([*rest, memoryview(block)[:end]])
        rest = [block[end:]] if end < len(block) else []
        yield first, data
        first += data.count(b"\n")
    if rest:
        yield first, b"".join(rest)


def parse_line(line: bytes) -> dict[str, Any]:
    """The JSON object of one line, the standard library being the judge of what JSON is.

    A byte order mark at the start is passed over. NUL and other control characters are not JSON unless escaped; a
    carriage return at the end is blank. Whole numbers are exact.

    Raises ValueError with the reason where there is none.
    """
    try:
        content = _loads(line.removeprefix(BOM).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(line, error)) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"a JSON {type(content).__name__}, not an object")
    return content


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        limit = sys.getrecursionlimit()
        sys.setrecursionlimit(limit + _DEEPER)
        try:
            return json.loads(text)
        finally:
            sys.setrecursionlimit(limit)


def fast_parser(exact: bool) -> Callable[[bytes], dict[str, Any]]:
    """`parse_line`, several times as fast where orjson is installed: what orjson refuses is judged by `parse_line`, so
    that results and reasons are the same without it.

    exact: whole numbers of more than 64 bits, which orjson rounds, are wanted exactly
    """
    try:
        orjson_loads = require("orjson", "").loads
    except CorpusError:
        return parse_line

    def parse(line: bytes) -> dict[str, Any]:
        try:
            content = orjson_loads(line)
        except ValueError:
            return parse_line(line)
        if type(content) is not dict or (exact and _has_rounded(content)):
            return parse_line(line)
        return content

    return parse


def _has_rounded(value: Any) -> bool:
    if isinstance(value, float):
        return abs(value) >= _ORJSON_INTEGERS
    if isinstance(value, dict):
        return any(map(_has_rounded, value.values()))
    return isinstance(value, list) and any(map(_has_rounded, value))


def fast_dumper() -> Callable[[dict[str, Any]], bytes]:
    """`dump_line`, an order of magnitude faster where orjson is installed; the bytes are the same."""
    try:
        orjson_dumps = require("orjson", "").dumps
    except CorpusError:
        return dump_line

    def dump(content: dict[str, Any]) -> bytes:
        if not _alike(content):
            return dump_line(content)
        try:
            return cast(bytes, orjson_dumps(content)) + b"\n"
        except TypeError:  # an integer of more than 64 bits, half a surrogate pair
            return dump_line(content)

    return dump


def dump_line(content: dict[str, Any]) -> bytes:
    """The object as one line of compact JSON in UTF-8. Times are written as ISO 8601, decimals as text.

    Raises CorpusError for a value that JSON cannot hold (bytes out of a Parquet column).
    """
    line = _RAW.encode(content)
    try:
        return line.encode("utf-8") + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair in a field that passes through: escaped, as it came
        return _ESCAPED.encode(content).encode("ascii") + b"\n"


def _alike(value: Any) -> bool:
    """Whether orjson writes the value as the standard library does: some floats it spells another way."""
    kind = type(value)
    if kind is dict:
        return all(type(key) is str for key in value) and all(map(_alike, value.values()))
    return kind in (str, int, bool, NoneType) or (kind is list and all(map(_alike, value)))


def _plain_value(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return str(value)
    raise CorpusError(f"a {type(value).__name__} cannot be written as JSON; leave that column out")


_RAW = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=_plain_value)
_ESCAPED = json.JSONEncoder(separators=(",", ":"), default=_plain_value)


def text_under(content: dict[str, Any], key: str, whole: bool = True) -> str:
    """The text under `key`. Raises ValueError where there is none, or one that is not Unicode.

    whole: `content` has all keys of the record, so that the message can name those there are
    """
    if key not in content:
        raise ValueError(f'no key "{key}"; {_keys(content)}' if whole else f'no key "{key}"')
    text = content[key]
    if not isinstance(text, str):
        raise ValueError(f'"{key}" is {"null" if text is None else f"a {type(text).__name__}"}, not a text')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f'"{key}" holds half a surrogate pair at character {error.start + 1}') from None
    return text


def _keys(content: dict[str, Any]) -> str:
    names = [f'"{name}"' for name in islice(content, _KEYS_NAMED)]
    if not names:
        return "the object is empty"
    more = f" and {len(content) - len(names)} more" if len(content) > len(names) else ""
    return f"there are {', '.join(names)}{more}" if len(content) > 1 else f"there is {names[0]}"


def not_utf8(data: bytes, error: UnicodeDecodeError) -> str:
    """The reason, with the byte counted from 1 in the file's own line, byte order mark included."""
    return f"not UTF-8 at byte {error.start + 1 + len(BOM) * data.startswith(BOM)}"

"""Masking of personal data that has a form: e-mail and public IP addresses, phone and card numbers, IBANs.

Written to leave look-alikes alone, at the price of missing some: versions and section numbers ("version 1.2.3.4"),
dates, times, private addresses, phone numbers written with spaces alone ("555 123 4567") or as bare digits.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from functools import partial

from megatron_lite.corpus.cleaning.page import Change, Edit, Page, Rule
from megatron_lite.corpus.cleaning.settings import PersonalDataSettings

_EMAIL = re.compile(
    r"(?<![\w.%+-])[A-Za-z0-9_][A-Za-z0-9._%+-]{0,63}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}"
    r"[A-Za-z]{2,24}(?![\w-])"
)
_IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}(?![\w:]|\.\d)")
# Four numbers with dots after one of these, or after "Browser/", are no address; nor is "1.2.3.4. Title" a line.
_NUMBERED = re.compile(
    r"(?:\b(?:versions?|ver|v|release|rev|revision|build|section|sec|chapter|table|figure|fig|clause|article"
    r"|appendix|item)\.?|§|\brv:|\w/)\s*$",
    re.IGNORECASE,
)
_LINE_START, _HEADING = re.compile(r"(?:\A|\n)[ \t]*\Z"), re.compile(r"\.[ \t]+\w")
_REACH = 12  # characters before, as long as the longest of them and a space
# E.164: a plus and up to 15 digits, in groups.
_PHONE_PLUS = re.compile(r"(?<![\w+])\+[1-9]\d{0,3}(?:[ .-]?(?:\(\d{1,5}\)|\d{1,5})){2,5}(?![\w]|[.-]\d)")
# North America: area code and exchange begin with 2 to 9.
_PHONE_NANP = re.compile(
    r"(?<![\w.+/-])(?:1[ .-])?(?:\([2-9]\d\d\) ?[2-9]\d\d[ .-]|[2-9]\d\d([.-])[2-9]\d\d\1|[2-9]\d\d [2-9]\d\d-)"
    r"\d{4}(?![\w]|[.-]\d)"
)
# Bare, in fours, or in the 4-6-5 of American Express; one kind of separator.
_CARD = re.compile(
    r"(?<![\w.+-])(?:\d{13,19}|\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{1,3})?|\d{4}([ -])\d{6}\2\d{5})(?!\w|[.-]\d)"
)
# First digits and lengths that issuers use; others are order numbers and the like.
_ISSUERS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}|3[47]\d{13}"
    r"|(?:6011|65\d\d|64[4-9]\d|35\d\d)\d{12}|3(?:0[0-5]|[689]\d)\d{11}|62\d{14,17}"
)
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?:(?: [A-Z0-9]{4}){2,7}(?: [A-Z0-9]{1,3})?|[A-Z0-9]{11,30})(?!\w)")


def personal_data_rule(settings: PersonalDataSettings) -> Rule:
    """Puts each kind's replacement where it is found, longer kinds of numbers before shorter ones."""
    kinds = [
        (name, replacement, find)
        for name, find in _KINDS.items()
        if (replacement := getattr(settings, name)) is not None
    ]

    def rule(page: Page) -> Edit | None:
        text, changes = page.text, []
        for name, replacement, find in kinds:
            text, count = find(text, replacement)
            if count:
                changes.append(Change(name, count, "masked"))
        return Edit(text, changes, {}) if changes else None

    return rule


Check = Callable[[re.Match[str]], bool]


def _mask(
    hint: re.Pattern[str], patterns: tuple[re.Pattern[str], ...], check: Check, text: str, replacement: str
) -> tuple[str, int]:
    """(`text` with `replacement` for every match that passes the check, how many).

    hint: a part of every match that is found fast, since most texts hold none
    """
    count = 0

    def replace(match: re.Match[str]) -> str:
        nonlocal count
        if not check(match):
            return match[0]
        count += 1
        return replacement

    if hint.search(text):
        for pattern in patterns:
            text = pattern.sub(replace, text)
    return text, count


def _is_public(match: re.Match[str]) -> bool:
    before = match.string[max(0, match.start() - _REACH) : match.start()]
    if _NUMBERED.search(before):
        return False
    if _LINE_START.search(before) and _HEADING.match(match.string, match.end()):
        return False
    try:
        return ipaddress.ip_address(match[0]).is_global
    except ValueError:
        return False


def _is_phone(match: re.Match[str]) -> bool:
    digits = sum(map(str.isdigit, match[0]))
    return 10 <= digits <= 15 or (digits == 9 and not match[0][1:].isdigit())


def _is_card(match: re.Match[str]) -> bool:
    digits = re.sub(r"\D", "", match[0])
    return _ISSUERS.fullmatch(digits) is not None and luhn(digits)


def luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B: every second digit from the right doubled, the sum of digits is a multiple of 10."""
    doubled = "".join(str(2 * int(digit)) for digit in digits[-2::-2])
    return (sum(map(int, doubled)) + sum(map(int, digits[-1::-2]))) % 10 == 0


def _is_iban(match: re.Match[str]) -> bool:
    """ISO 13616: the first four characters moved to the end, letters as 10 to 35, is 1 modulo 97."""
    code = match[0].replace(" ", "")
    return 15 <= len(code) <= 34 and int("".join(str(int(c, 36)) for c in code[4:] + code[:4])) % 97 == 1


_LONG_NUMBER = re.compile(r"\d[\d ().-]{7,}\d")
_KINDS: dict[str, Callable[[str, str], tuple[str, int]]] = {
    "iban": partial(_mask, re.compile(r"[A-Z]\d\d[ \dA-Z]{4}"), (_IBAN,), _is_iban),
    "credit_card": partial(_mask, _LONG_NUMBER, (_CARD,), _is_card),
    "email": partial(_mask, re.compile("@"), (_EMAIL,), lambda match: True),
    "ip_address": partial(
        _mask, re.compile(r"\d\.\d{1,3}\.\d|[23][\dA-Fa-f]{3}:"), (_IPV4, _IPV6), _is_public
    ),
    "phone": partial(_mask, _LONG_NUMBER, (_PHONE_PLUS, _PHONE_NANP), _is_phone),
}

"""Every kind of personal data, and what looks like it and is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lite.corpus.cleaning import CleaningSettings, build_rules, clean_document
from megatron_lite.corpus.cleaning.personal_data import luhn
from tests.corpus.cleaning.case import clean, only

FOUND = [
    ("email", "jane.doe+news@mail.example.co.uk"),
    ("email", "x_1%y-z@a-b.info"),
    ("ip_address", "8.8.8.8"),
    ("ip_address", "93.184.216.34"),
    ("ip_address", "9.9.9.9"),
    ("ip_address", "2001:4860:4860::8888"),
    ("ip_address", "2a00:1450:4001:081b:0000:0000:0000:200e"),
    ("phone", "+44 20 7946 0958"),
    ("phone", "+1 (555) 123-4567"),
    ("phone", "+4915112345678"),
    ("phone", "+298 123 456"),
    ("phone", "(555) 234-5678"),
    ("phone", "800-555-0199"),
    ("phone", "1-800-555-0199"),
    ("phone", "415.555.2671"),
    ("credit_card", "4111111111111111"),
    ("credit_card", "4111 1111 1111 1111"),
    ("credit_card", "5500-0000-0000-0004"),
    ("credit_card", "3782 822463 10005"),
    ("credit_card", "6011000990139424"),
    ("iban", "GB82 WEST 1234 5698 7654 32"),
    ("iban", "DE89370400440532013000"),
]
REPLACEMENTS = CleaningSettings().personal_data.model_dump(exclude={"enabled"})
DEFAULT = build_rules(only("personal_data", **REPLACEMENTS))


@pytest.mark.parametrize(("kind", "data"), FOUND)
@pytest.mark.parametrize(
    "around",
    ["{}", "Write to {}.", "({}), or", "a: {};\nb", "<{}>", "call {} now", "ask {}. Then"],
)
def test_what_is_masked(kind: str, data: str, around: str) -> None:
    outcome = clean_document(around.format(data), DEFAULT)
    assert outcome.text == around.format(REPLACEMENTS[kind])
    assert [tuple(change) for change in outcome.changes] == [(f"personal_data.{kind}", 1, "masked")]


@pytest.mark.parametrize(("kind", "data"), FOUND)
def test_a_kind_that_is_null_is_left_alone(kind: str, data: str) -> None:
    others = {name: value for name, value in REPLACEMENTS.items() if name != kind}
    assert clean(data, "personal_data", **others).text == data


LOOK_ALIKES = [
    *(
        "version 8.8.8.8",
        "v8.8.8.8",
        "Version: 1.2.3",
        "see § 4.3.2.1",
        "Section 4.3.2.1",
        "1.2.3.4.5",
        "x1.2.3.4",
    ),
    *(
        "10.0.0.1",
        "192.168.1.20",
        "172.16.0.9",
        "127.0.0.1",
        "0.0.0.0",
        "169.254.1.1",
        "203.0.113.7",
        "256.1.2.3",
    ),
    *("fe80::1", "2001:db8::1", "::1", "std::vector", "20:15:30", "2021:12:31", "08.08.08.08"),
    *("2021-03-04", "04/03/2021", "2021-03-04T12:30:00+01:00", "12:30:00 +0100", "31.12.2021", "1999-2004"),
    *(
        "978-0-306-40615-7",
        "ISBN 9780306406157",
        "3.14159265358979",
        "1,234,567,890",
        "555 123 4567",
        "5551234567",
    ),
    *(
        "4111111111111112",
        "1234567890123456",
        "4111 1111-1111 1111",
        "41111111111111111111",
        "1600000000000000",
    ),
    *("GB82 WEST 1234 5698 7654 33", "DE00370400440532013000", "AB12", "SHA256ABCDEF0123456789"),
    *("user@localhost", "@decorator.name", "a @ b.com", "left-pad@1.3.0", "x@y", "foo@", "@example.com"),
    *("+1", "+123456789", "x+1234567890", "200-300", "123-456-7890", "a-800-555-0199-1", "800-555-01999"),
]


@pytest.mark.parametrize("text", LOOK_ALIKES)
def test_look_alikes_stay(text: str) -> None:
    outcome = clean_document(text, DEFAULT)
    assert (outcome.text, outcome.changes) == (text, [])


def test_addresses_in_urls_are_masked() -> None:
    assert clean_document("http://8.8.4.4:80/x", DEFAULT).text == "http://<IP_ADDRESS>:80/x"


def test_all_are_counted() -> None:
    outcome = clean_document("a@b.org, c@d.org and 8.8.4.4", DEFAULT)
    assert outcome.text == "<EMAIL>, <EMAIL> and <IP_ADDRESS>"
    assert [(change.check, change.amount) for change in outcome.changes] == [
        ("personal_data.email", 2),
        ("personal_data.ip_address", 1),
    ]


def test_ones_own_replacement_is_taken_as_it_is() -> None:
    assert clean("a@b.org", "personal_data", email=r"\1 ü").text == r"\1 ü"


@given(st.integers(0, 10**15))
def test_luhn_finds_every_wrong_digit(number: int) -> None:
    """Of ten possible check digits one is right."""
    assert sum(luhn(f"{number}{digit}") for digit in range(10)) == 1


@given(st.text(alphabet="0123456789+-.() @:aGB", max_size=60))
def test_any_text_is_masked_once(text: str) -> None:
    """No crash, and what was masked is not found again."""
    once = clean_document(text, DEFAULT).text
    assert once is None or clean_document(once, DEFAULT).changes == []

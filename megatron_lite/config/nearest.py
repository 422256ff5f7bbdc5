"""The nearest legal number to one that is not."""

from __future__ import annotations


def nearest_divisor(number: int, wanted: int) -> int:
    """The divisor of `number` nearest to `wanted`, the smaller one when two are as near."""
    return min((d for d in range(1, number + 1) if number % d == 0), key=lambda d: (abs(d - wanted), d))


def nearest_multiple(number: int, of: int) -> int:
    """The positive multiple of `of` nearest to `number`."""
    return max(1, (2 * number + of) // (2 * of)) * of

"""The nearest legal values of a number, for error messages."""

from __future__ import annotations


def divisors(value: int) -> list[int]:
    """Return the divisors of a positive number, ascending."""
    return [divisor for divisor in range(1, value + 1) if value % divisor == 0]


def nearest(legal: list[int], wanted: int) -> str:
    """Return the four legal values next to the one that was wanted, as text."""
    near = sorted(legal, key=lambda value: abs(value - wanted))[:4]
    return ", ".join(str(value) for value in sorted(near)) or "none"


def nearest_multiples(value: int, factor: int) -> str:
    """Return the positive multiples of a factor next to a value, as text."""
    below, above = value // factor * factor, -(-value // factor) * factor
    return f"{below} or {above}" if below else str(above)

"""Money is whole nano units, rounded once, half to even, and printed exactly."""

from decimal import ROUND_HALF_EVEN, Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tollway.schemas.money import NANO, decimal_text, round_half_even

AMOUNTS = st.integers(-(10**30), 10**30)


@settings(deadline=None)
@given(AMOUNTS, st.integers(1, 10**20))
def test_rounding_is_half_even(numerator: int, denominator: int) -> None:
    """Any quotient rounds as the exact fraction does, ties to the even neighbour."""
    assert round_half_even(numerator, denominator) == round(Fraction(numerator, denominator))


@pytest.mark.parametrize(
    ("numerator", "expected"), [(1, 0), (3, 2), (5, 2), (7, 4), (-1, 0), (-3, -2), (-5, -2), (4, 2), (0, 0)]
)
def test_ties_go_to_the_even_number(numerator: int, expected: int) -> None:
    """A half rounds to the even neighbour, below zero too, so that many lines drift neither up nor down."""
    assert round_half_even(numerator, 2) == expected


def test_a_division_by_nothing_is_an_error() -> None:
    """No denominator, no amount."""
    with pytest.raises(ZeroDivisionError):
        round_half_even(1, 0)


@settings(deadline=None)
@given(AMOUNTS)
def test_decimal_text_is_exact(amount_nano: int) -> None:
    """The text of an amount, read as a decimal, is that amount to the last nano unit."""
    with localcontext(prec=60, rounding=ROUND_HALF_EVEN):
        assert Decimal(decimal_text(amount_nano)) * NANO == amount_nano


@pytest.mark.parametrize(
    ("amount_nano", "text"),
    [
        (0, "0"),
        (1, "0.000000001"),
        (-1, "-0.000000001"),
        (1_500_000_000, "1.5"),
        (10 * NANO, "10"),
        (-100 * NANO, "-100"),
        (10**14, "100000"),
    ],
)
def test_decimal_text_has_no_padding(amount_nano: int, text: str) -> None:
    """Trailing zeros of the fraction go, those of whole units stay."""
    assert decimal_text(amount_nano) == text

"""Money is integer nano units (10⁻⁹) of an asset; the only place that rounds."""

NANO = 10**9


def round_half_even(numerator: int, denominator: int) -> int:
    """numerator / denominator to the nearest integer, ties to even. Raises ZeroDivisionError."""
    quotient, rest = divmod(numerator, denominator)
    twice = 2 * rest
    if twice > denominator or (twice == denominator and quotient & 1):
        return quotient + 1
    return quotient


def decimal_text(amount_nano: int) -> str:
    """1_500_000_000 → "1.5": exact, for people and for ClickHouse's Decimal(38, 9)."""
    sign, amount = ("-", -amount_nano) if amount_nano < 0 else ("", amount_nano)
    whole, nano = divmod(amount, NANO)
    return f"{sign}{whole}" if not nano else f"{sign}{whole}.{nano:09d}".rstrip("0")

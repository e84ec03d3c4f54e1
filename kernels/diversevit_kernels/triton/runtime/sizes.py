"""Numbers of tiles, and widths of tiles."""


def cdiv(a: int, b: int) -> int:
    """Tiles of size ``b`` that cover ``a``."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``."""
    return 1 << max(0, n - 1).bit_length()


def split_width(width: int) -> tuple[int, ...]:
    """Tile widths, powers of two and at least 16, that cover ``width``.

    One piece, or three of a quarter each where those suffice. All are equal, so that one register layout serves them
    all; more and smaller ones cost more registers than their padding saves (the compile report: five of 16 spill in
    float32). ``64 -> (64,)``, ``72 -> 3 x 32``, ``80 -> 3 x 32``, ``104 -> (128,)``, ``256 -> (256,)``.
    """
    whole = max(16, power_of_two(width))
    quarter = whole // 4
    return (quarter,) * 3 if quarter >= 16 and width <= 3 * quarter else (whole,)

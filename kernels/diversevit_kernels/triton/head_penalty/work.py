"""The matrix products of the penalties' kernels, as they are executed: with the padding of heads and tiles."""

from ..runtime.launch import Launch
from ..runtime.sizes import cdiv


def _statistics(one: Launch) -> int:
    """R by token; by sample it is ``_products``'."""
    x, const = one.args[0], one.constants["const"]
    return 0 if x is None else one.grid[0] * _heads(one, const.E)


def _products(one: Launch) -> int:
    """X Y^T, by sample."""
    return _parts(one, 1)


def _backward(one: Launch) -> int:
    """M G."""
    return _parts(one, 1, first=3)


def _double_backward(one: Launch) -> int:
    """M ddG and M_dot G; dG again where it is asked for; by token ddG G^T before."""
    dgrads, m_dot, const = one.args[3], one.args[5], one.constants["const"]
    before = one.grid[0] * _heads(one, const.E) if m_dot is None else 0
    return before + _parts(one, 2 + (dgrads is not None), first=8)


def _parts(one: Launch, products: int, first: int = 3) -> int:
    """Products of each program with its part of a group; ``first``: the place of the number of groups."""
    const = one.constants["const"]
    _, N, span, parts = one.args[first : first + 4]
    if const.BY_TOKEN:
        return products * one.grid[0] * _heads(one, span)
    elements = N * const.E
    of_group = sum(_heads(one, min(span, elements - i * span)) for i in range(parts))
    return products * one.grid[0] // parts * of_group


def _heads(one: Launch, elements: int) -> int:
    """FLOPs of a product of two operands [HEADS, elements], or of an H x H matrix with one."""
    tile = one.configuration["BLOCK_K"]
    return 2 * one.constants["const"].HEADS ** 2 * cdiv(elements, tile) * tile


def _route(one: Launch) -> int:
    """r W."""
    T, J, E = _tiles(one)
    along = cdiv(3 * one.constants["const"].d, J) * J
    return 2 * one.grid[0] * T * E * along * _pairs(one)


def _route_back(one: Launch) -> int:
    """u W^T."""
    T, J, E = _tiles(one)
    along = cdiv(one.constants["const"].D, E) * E
    return 2 * one.grid[0] * T * J * along * _pairs(one)


def _weight(one: Launch) -> int:
    """r^T u."""
    T, J, E = _tiles(one)
    tokens, parts = one.args[6], one.args[8]
    return 2 * one.grid[0] // parts * J * E * cdiv(tokens, T) * T * _pairs(one)


def _tiles(one: Launch) -> tuple[int, int, int]:
    c = one.configuration
    return c["BLOCK_T"], c["BLOCK_J"], c["BLOCK_E"]


def _pairs(one: Launch) -> int:
    return 2 if one.args[2] is not None else 1


PRODUCTS = {
    "head_penalty_statistics": _statistics,
    "head_penalty_products": _products,
    "head_penalty_backward": _backward,
    "head_penalty_double_backward": _double_backward,
    "routed_penalty_route": _route,
    "routed_penalty_route_back": _route_back,
    "routed_penalty_weight": _weight,
}
"""Launch table -> FLOPs of a launch."""

"""The matrix products of attention's kernels as they are executed: with the padding of tiles, recomputation included.

A program of a row kernel walks tiles of keys, one of a column kernel tiles of queries; a causal mask shortens the walk.
Each pair of tiles costs some products over d and some over dv.
"""

from collections.abc import Callable

from ..runtime.launch import Launch
from ..runtime.sizes import cdiv

Pairs = Callable[[Launch], int]


def _rows(one: Launch) -> int:
    """Pairs of a query and a key in all tiles of row programs."""
    args, tile, keys = one.args[0], one.configuration["BLOCK_M"], one.configuration["BLOCK_N"]
    if not one.constants["const"].IS_CAUSAL:
        return one.grid[0] * tile * cdiv(args.Nk, keys) * keys
    tiles = cdiv(args.Nq, tile)
    walked = sum(cdiv(min(args.Nk, (i + 1) * tile), keys) for i in range(tiles))
    return one.grid[0] // tiles * walked * tile * keys


def _columns(one: Launch) -> int:
    """The same of column programs, each for a group of heads."""
    args, const = one.args[0], one.constants["const"]
    tile, keys = one.configuration["BLOCK_M"], one.configuration["BLOCK_N"]
    tiles, rows = cdiv(args.Nk, keys), cdiv(args.Nq, tile)
    walked = tiles * rows
    if const.IS_CAUSAL:
        walked = sum(max(0, rows - i * keys // tile) for i in range(tiles))
    return one.grid[0] // tiles * walked * tile * keys * const.GROUP


def _whole_heads(one: Launch) -> int:
    """The same of programs that hold a head's keys."""
    tile = one.configuration["BLOCK_M"]
    return one.grid[0] * cdiv(one.args[0].Nq, tile) * tile * one.configuration["BLOCK_N"]


def _heads_by_rows(one: Launch) -> int:
    """The same of programs that do a head's row tiles, without what they do for columns."""
    args, tile, keys = one.args[0], one.configuration["ROW_TILE"], one.configuration["ROW_KEYS"]
    return one.grid[0] * cdiv(args.Nq, tile) * tile * cdiv(args.Nk, keys) * keys


def _heads_by_columns(one: Launch) -> int:
    args, tile, keys = one.args[0], one.configuration["BLOCK_M"], one.configuration["BLOCK_N"]
    return one.grid[0] * cdiv(args.Nq, tile) * tile * cdiv(args.Nk, keys) * keys


def _masked_tiles(one: Launch) -> int:
    """The same of the mask's gradient: every tile of every head once."""
    args, tile, keys = one.args[0], one.configuration["BLOCK_M"], one.configuration["BLOCK_N"]
    heads = args.q.ptr.shape[0] * args.H
    return heads * cdiv(args.Nq, tile) * tile * cdiv(args.Nk, keys) * keys


def _forward(one: Launch) -> tuple[int, int]:
    return 1, 1  # S; O


def _backward_rows(one: Launch) -> tuple[int, int]:
    return 2, 1  # S, dQ; dP


def _backward_columns(one: Launch) -> tuple[int, int]:
    return 2, 2  # S, dK; dP, dV


def _backward_both(one: Launch) -> tuple[int, int]:
    return 3, 2


def _scores(one: Launch) -> tuple[int, int]:
    """S and ddS; dP and Y: what every kernel of the double backward begins with."""
    args = one.args[0]
    return 1 + (args.ddq is not None) + (args.ddk is not None), 1 + (args.ddv is not None)


def _row_results(one: Launch) -> tuple[int, int]:
    """gQ; gdO."""
    args, dds = one.args[0], one.constants["const"].HAS_DDS
    return 1 + (args.ddk is not None), dds + (args.ddv is not None)


def _column_results(one: Launch) -> tuple[int, int]:
    """gK; gV."""
    args, dds = one.args[0], one.constants["const"].HAS_DDS
    return 1 + (args.ddq is not None), int(dds)


def _double_rows(one: Launch) -> tuple[int, int]:
    """Walking its keys in one pass a program also sums the mean key, (46)."""
    mean_key = one.constants["const"].HAS_DDS and not one.constants.get("ALL_KEYS_IN_TILE")
    return _sum(_scores(one), _row_results(one), (int(mean_key), 0))


def _double_columns(one: Launch) -> tuple[int, int]:
    return _sum(_scores(one), _column_results(one))


def _double_both(one: Launch) -> tuple[int, int]:
    return _sum(_scores(one), _row_results(one), _column_results(one))


def _double_few(one: Launch) -> tuple[int, int]:
    """It walks its keys twice."""
    return _sum(_scores(one), _double_both(one))


def _mask_gradient(one: Launch) -> tuple[int, int]:
    """S and dP; of a double backward ddS and Y too."""
    return (1, 1) if one.args[0].ddq is one.args[0].ddk is one.args[0].ddv else _scores(one)


def _sum(*products: tuple[int, int]) -> tuple[int, int]:
    wide, values = zip(*products, strict=True)
    return sum(wide), sum(values)


def _products(pairs: Pairs, of: Callable[[Launch], tuple[int, int]]) -> Pairs:
    def count(one: Launch) -> int:
        const, (wide, values) = one.constants["const"], of(one)
        width, value_width = sum(const.WIDTHS), sum(const.VALUE_WIDTHS)
        return 2 * pairs(one) * (wide * width + values * value_width)

    return count


def _by_head(one: Launch) -> int:
    rows = _products(_heads_by_rows, _double_rows)(one)
    return rows + _products(_heads_by_columns, _double_columns)(one)


PRODUCTS = {
    **dict.fromkeys(
        ("attention_forward", "attention_forward_few_queries"), _products(_rows, _forward)
    ),
    **dict.fromkeys(
        ("attention_backward_rows", "attention_backward_rows_all_keys"),
        _products(_rows, _backward_rows),
    ),
    "attention_backward_columns": _products(_columns, _backward_columns),
    "attention_backward_few_queries": _products(_rows, _backward_both),
    **dict.fromkeys(
        (
            "attention_double_backward_rows",
            "attention_double_backward_rows_all_keys",
            "attention_double_backward_rows_plain",
        ),
        _products(_rows, _double_rows),
    ),
    **dict.fromkeys(
        ("attention_double_backward_columns", "attention_double_backward_columns_plain"),
        _products(_columns, _double_columns),
    ),
    "attention_double_backward_few_queries": _products(_rows, _double_few),
    "attention_double_backward_head_all_keys": _products(_whole_heads, _double_both),
    "attention_double_backward_head": _by_head,
    "attention_mask_gradient": _products(_masked_tiles, _mask_gradient),
}
"""Launch table -> FLOPs of a launch."""

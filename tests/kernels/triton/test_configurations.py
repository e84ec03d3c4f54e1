"""The launch table and autotuning, as far as they go without a GPU."""

from types import SimpleNamespace

import pytest
import torch

device = pytest.importorskip("diversevit_kernels.triton.runtime.device")
from diversevit_kernels.triton.attention import configs as attention  # noqa: E402
from diversevit_kernels.triton.gelu import configs as gelu  # noqa: E402
from diversevit_kernels.triton.head_penalty import configs as head_penalty  # noqa: E402
from diversevit_kernels.triton.layer_norm import configs as layer_norm  # noqa: E402
from diversevit_kernels.triton.runtime import autotune, copies, launch, sizes, sums  # noqa: E402
from diversevit_kernels.triton.runtime.plan import (  # noqa: E402
    AMPERE,
    ANY_SIZE,
    EVERY_CHIP,
    HALF,
    HOPPER,
    INTERPRETER,
    SINGLE,
    Configuration,
    LaunchTable,
    row,
    target_of,
)

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
BFLOAT16 = torch.empty(0, dtype=torch.bfloat16, device="meta")
FLOAT32 = torch.empty(0, dtype=torch.float32, device="meta")
TABLES = {
    table.name: table
    for module in (attention, gelu, layer_norm, head_penalty, sums, copies)
    for table in vars(module).values()
    if isinstance(table, LaunchTable)
}


def served_twice(table):
    """The family, element size and width of each launch that more than one row serves."""
    ends = sorted({end for row in table.rows for end in (row.above + 1, row.up_to)})
    for family in device.FAMILIES.values():
        for itemsize in ANY_SIZE:
            for width in ends:  # rows that overlap do so at one of their ends
                if sum(row.serves(family, itemsize, width) for row in table.rows) > 1:
                    yield family, itemsize, width


@pytest.mark.parametrize("name", TABLES)
def test_a_launch_is_served_by_one_row_at_most(name):
    assert not list(served_twice(TABLES[name]))


@pytest.mark.parametrize("widths", [(0, 65), (32, 64), (63, 256), (127, 128)], ids=str)
def test_rows_that_overlap_are_found(widths):
    common = {"warps": 4, "stages": 1}
    table = LaunchTable(
        "k",
        row(AMPERE + HOPPER, HALF, (0, 64), **common),
        row(HOPPER, HALF + SINGLE, (64, 128), **common),
        row(AMPERE, HALF, (64, 128), **common),
    )
    assert not list(served_twice(table))
    more = LaunchTable("k", *table.rows, row(HOPPER, HALF, widths, **common))
    assert {found[:2] for found in served_twice(more)} == {("hopper", 2)}


@pytest.mark.parametrize("name", TABLES)
def test_rows_name_families_that_exist(name):
    for one in TABLES[name].rows:
        assert set(one.families) <= set(device.FAMILIES.values())
        assert one.above < one.up_to


def test_every_table_is_named_after_what_it_launches():
    assert len(TABLES) == 33
    assert {name.partition("_")[0] for name in TABLES} == {
        *("attention", "dense", "gelu", "head", "layer", "partial", "routed", "total")
    }


@pytest.mark.parametrize(
    ("architecture", "family"),
    [
        *(("sm_80", "ampere"), ("sm_89", "ampere"), ("sm_90", "hopper"), ("sm_100", "blackwell")),
        *(("sm_103", "blackwell"), ("sm_120", "rtx_blackwell"), ("sm_75", "older_nvidia")),
        *(("gfx942", "amd"), ("xpu", "other"), ("interpreter", "interpreter")),
    ],
)
def test_the_longest_beginning_of_a_name_counts(architecture, family):
    assert device.family(architecture) == family
    assert {*EVERY_CHIP, *INTERPRETER} == set(device.FAMILIES.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("like", [BFLOAT16, FLOAT32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("width", [16, 64, 80, 128, 256])
def test_every_architecture_has_rows(architecture, like, width):
    with device.pretend(architecture):
        for table in (attention.FORWARD, attention.DOUBLE_BACKWARD_ROWS):
            assert table.plan(target_of(like, width)).configuration.warps in (1, 2, 4, 8)


def test_a_kernel_without_a_row_is_refused_in_one_line():
    with (
        device.pretend("sm_90"),
        pytest.raises(NotImplementedError, match="no launch configuration for width 64"),
    ):
        LaunchTable("no_rows").plan(target_of(BFLOAT16, 64))


def test_a_row_serves_its_families_sizes_and_widths_only():
    one = row(HOPPER, HALF, (32, 64), warps=4, stages=1, BLOCK=16)
    assert one.serves("hopper", 2, 64)
    assert one.serves("hopper", 2, 33)
    assert not one.serves("hopper", 2, 32)
    assert not one.serves("hopper", 2, 65)
    assert not one.serves("hopper", 4, 64)
    assert not one.serves("ampere", 2, 64)


def test_a_plan_is_looked_up_once():
    with device.pretend("sm_90"):
        plan = attention.FORWARD.plan(target_of(BFLOAT16, 64))
        assert attention.FORWARD.plan(target_of(BFLOAT16, 64)) is plan
        assert attention.FORWARD.plan(target_of(BFLOAT16, 128)) is not plan
    with device.pretend("sm_80"):
        assert attention.FORWARD.plan(target_of(BFLOAT16, 64)) is not plan


def test_precision_follows_torch(monkeypatch):
    with device.pretend("sm_90"):
        assert device.precision(BFLOAT16) == "ieee"
        assert device.precision(FLOAT32) == "tf32x3"
        assert device.precision(FLOAT32, "bf16x6") == "bf16x6"
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
        assert device.precision(FLOAT32) == "tf32"
        assert device.precision(FLOAT32, "bf16x6") == "tf32"
    monkeypatch.undo()
    with device.pretend("sm_80"):
        assert device.precision(FLOAT32, "bf16x6") == "tf32x3"
    with device.pretend("gfx942"):
        assert device.precision(FLOAT32) == "ieee"


def test_a_whole_tile_must_hold_all_keys():
    table = attention.BACKWARD_ROWS_ALL_KEYS
    with device.pretend("sm_80"):
        target = target_of(BFLOAT16, 64)
    plan = table.plan(target)
    held = plan["BLOCK_N"]
    holding = table.holding(held, "BLOCK_N", target)
    assert holding is not None
    assert (holding.configuration, holding.whole) == (plan.configuration, "BLOCK_N")
    assert table.holding(held + 1, "BLOCK_N", target) is None
    assert LaunchTable("no_rows").holding(1, "BLOCK_N", target) is None


def test_heads_fill_a_chip_twice_over():
    with device.pretend("sm_90"):
        assert not device.fills(BFLOAT16, 263)
        assert device.fills(BFLOAT16, 264)
    with device.pretend("unheard_of"):
        assert not device.fills(BFLOAT16, 10**9)


SPLIT = {1: (16,), 16: (16,), 24: (32,), 48: (16,) * 3, 64: (64,), 72: (32,) * 3, 80: (32,) * 3}
SPLIT |= {96: (32,) * 3, 97: (128,), 112: (128,), 128: (128,), 160: (64,) * 3, 256: (256,)}


@pytest.mark.parametrize(("width", "tiles"), SPLIT.items())
def test_widths_are_split_into_powers_of_two(width, tiles):
    assert sizes.split_width(width) == tiles


class TestAutotuning:
    options = [Configuration((("BLOCK", b),), 4, 1) for b in (16, 32, 64)]

    def test_the_fastest_that_fits_wins(self):
        timed = []

        def seconds(c):
            timed.append(c["BLOCK"])
            return 1 / c["BLOCK"]

        chosen = autotune.fastest(self.options, lambda c: c["BLOCK"] * 100, 3200, seconds)
        assert chosen["BLOCK"] == 32
        assert timed == [16, 32]  # what does not fit is not run

    def test_none_fits(self):
        with pytest.raises(NotImplementedError, match="none of 3 candidates fits 1 bytes"):
            autotune.fastest(self.options, lambda c: 2, 1, lambda c: 0.0)

    def test_a_tile_that_holds_everything_is_not_made_smaller(self):
        """The table has smaller ones, which would hold a part."""
        with device.pretend("sm_90"):
            plan = attention.BACKWARD_FEW_QUERIES.plan(target_of(FLOAT32, 64))
        holding = plan.holding(20, "BLOCK_N")
        assert holding is not None
        assert min(c["BLOCK_N"] for c in plan.candidates()) == 16
        assert {c["BLOCK_N"] for c in holding.candidates()} == {32}
        assert plan.holding(33, "BLOCK_N") is None

    def test_the_tables_choice_comes_first_and_once(self):
        with device.pretend("sm_90"):
            plan = attention.FORWARD.plan(target_of(BFLOAT16, 64))
        tried = plan.candidates()
        assert tried[0] == plan.configuration
        assert len(tried) == len(set(tried)) > 6
        interpreted = {r.configuration.tiles for r in plan.table.rows if r.families == INTERPRETER}
        assert not interpreted & {c.tiles for c in tried}

    def test_it_is_opt_in(self, monkeypatch):
        monkeypatch.setattr(device, "INTERPRETED", False)
        assert not device.autotuning()
        with device.autotune():
            assert device.autotuning()
            with device.pretend("sm_90"):
                assert not device.autotuning()
            with device.autotune(False):
                assert not device.autotuning()
        assert not device.autotuning()

    def test_a_launch_is_tuned_once(self, monkeypatch):
        """The first launch of a kind times the candidates, the next ones use what was found."""
        launched = []

        class Kernel:
            def __getitem__(self, grid):
                return lambda *args, **keywords: launched.append((grid, keywords))

            def warmup(self, *args, **keywords):
                shared = keywords["BLOCK_M"] * 1024
                return SimpleNamespace(metadata=SimpleNamespace(shared=shared))

        def do_bench(run, return_mode):
            run()
            return launched[-1][1]["num_warps"]  # fewer warps: faster

        monkeypatch.setattr(launch, "autotuning", lambda: True)
        monkeypatch.setattr(autotune, "shared_memory", lambda device: 64 * 1024)
        monkeypatch.setattr(autotune.triton.testing, "do_bench", do_bench)
        monkeypatch.setattr(autotune, "_measured", {})
        with device.pretend("sm_90"):
            plan = attention.FORWARD.plan(target_of(BFLOAT16, 64))

        def run(x):
            launch.run_kernel(plan, Kernel(), lambda c: c["BLOCK_M"], x)

        for _ in range(2):
            before = len(launched)
            run(BFLOAT16)
        assert len(launched) == before + 1
        tuned = launched[-1]
        assert tuned == launched[-2]
        assert tuned[1]["num_warps"] == 4
        assert tuned[0] == (tuned[1]["BLOCK_M"],)
        assert all(keywords["BLOCK_M"] <= 64 for _, keywords in launched)
        run(BFLOAT16.new_empty(0, 1))
        assert len(launched) > before + 2  # another shape is another kind

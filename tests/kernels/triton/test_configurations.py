"""The launch table and autotuning, as far as they go without a GPU."""

from types import SimpleNamespace

import pytest
import torch

configurations = pytest.importorskip("diversevit_kernels.triton.runtime.configurations")
from diversevit_kernels.triton.runtime import launch  # noqa: E402
from diversevit_kernels.triton.runtime.autotune import fastest  # noqa: E402

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
HALF = torch.empty(0, dtype=torch.bfloat16, device="meta")
SINGLE = torch.empty(0, dtype=torch.float32, device="meta")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("like", [HALF, SINGLE], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("width", [16, 64, 80, 128, 256])
def test_every_architecture_has_rows(architecture, like, width):
    with configurations.pretend(architecture):
        for kernel in ("attention_forward", "attention_double_backward_rows"):
            assert configurations.configuration(kernel, like, width).warps in (1, 2, 4, 8)


def test_a_kernel_without_a_row_is_refused_in_one_line():
    with (
        configurations.pretend("sm_90"),
        pytest.raises(NotImplementedError, match="no launch configuration for width 64"),
    ):
        configurations.configuration("no_such_kernel", HALF, 64)


def test_a_row_serves_its_architectures_sizes_and_widths_only():
    row = configurations._row("k", ("sm_9",), (2,), 64, warps=4, stages=1, BLOCK=16)
    assert row.serves("k", "sm_90", 2, 64)
    assert not row.serves("k", "sm_90", 2, 65)
    assert not row.serves("k", "sm_90", 4, 64)
    assert not row.serves("k", "sm_80", 2, 64)
    assert not row.serves("other", "sm_90", 2, 64)
    wide = configurations._row("k", width=64, above=32, warps=4, stages=1)
    assert wide.serves("k", "sm_90", 2, 33)
    assert not wide.serves("k", "sm_90", 2, 32)


def test_precision_follows_torch(monkeypatch):
    with configurations.pretend("sm_90"):
        assert configurations.precision(HALF) == "ieee"
        assert configurations.precision(SINGLE) == "tf32x3"
        assert configurations.precision(SINGLE, "bf16x6") == "bf16x6"
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
        assert configurations.precision(SINGLE) == "tf32"
        assert configurations.precision(SINGLE, "bf16x6") == "tf32"
    monkeypatch.undo()
    with configurations.pretend("sm_80"):
        assert configurations.precision(SINGLE, "bf16x6") == "tf32x3"
    with configurations.pretend("gfx942"):
        assert configurations.precision(SINGLE) == "ieee"


def test_a_whole_tile_must_hold_all_keys():
    name = "attention_backward_rows_whole"
    with configurations.pretend("sm_80"):
        held = configurations.configuration(name, HALF, 64)["BLOCK_N"]
        assert configurations.fits(name, HALF, 64, "BLOCK_N", held)
        assert not configurations.fits(name, HALF, 64, "BLOCK_N", held + 1)
        assert not configurations.fits("no_such_kernel", HALF, 64, "BLOCK_N", 1)


def test_heads_fill_a_chip_twice_over():
    with configurations.pretend("sm_90"):
        assert not configurations.fills(HALF, 263)
        assert configurations.fills(HALF, 264)
    with configurations.pretend("unheard_of"):
        assert not configurations.fills(HALF, 10**9)


SPLIT = {1: (16,), 16: (16,), 24: (32,), 48: (16,) * 3, 64: (64,), 72: (32,) * 3, 80: (32,) * 3}
SPLIT |= {96: (32,) * 3, 97: (128,), 112: (128,), 128: (128,), 160: (64,) * 3, 256: (256,)}


@pytest.mark.parametrize(("width", "tiles"), SPLIT.items())
def test_widths_are_split_into_powers_of_two(width, tiles):
    assert launch.split_width(width) == tiles


class TestAutotuning:
    options = [configurations.Configuration((("BLOCK", b),), 4, 1) for b in (16, 32, 64)]

    def test_the_fastest_that_fits_wins(self):
        timed = []

        def seconds(c):
            timed.append(c["BLOCK"])
            return 1 / c["BLOCK"]

        chosen = fastest(self.options, lambda c: c["BLOCK"] * 100, 3200, seconds)
        assert chosen["BLOCK"] == 32
        assert timed == [16, 32]  # what does not fit is not run

    def test_none_fits(self):
        with pytest.raises(NotImplementedError, match="none of 3 candidates fits 1 bytes"):
            fastest(self.options, lambda c: 2, 1, lambda c: 0.0)

    def test_the_tables_choice_comes_first_and_once(self):
        with configurations.pretend("sm_90"):
            tried = configurations.candidates("attention_forward", HALF, 64)
            assert tried[0] == configurations.configuration("attention_forward", HALF, 64)
        assert len(tried) == len(set(tried)) > 6

    def test_it_is_opt_in(self, monkeypatch):
        monkeypatch.setattr(configurations, "INTERPRETED", False)
        assert not configurations.autotuning()
        with configurations.autotune():
            assert configurations.autotuning()
            with configurations.pretend("sm_90"):
                assert not configurations.autotuning()
            with configurations.autotune(False):
                assert not configurations.autotuning()
        assert not configurations.autotuning()

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
        monkeypatch.setattr(launch, "shared_memory", lambda device: 64 * 1024)
        monkeypatch.setattr(launch.triton.testing, "do_bench", do_bench)
        monkeypatch.setattr(launch, "_measured", {})
        configuration = launch.configuration
        monkeypatch.setattr(launch, "configuration", lambda *a: _pretending(configuration, *a))
        candidates = launch.candidates
        monkeypatch.setattr(launch, "candidates", lambda *a: _pretending(candidates, *a))
        for _ in range(2):
            launch.launch("attention_forward", Kernel(), lambda c: c["BLOCK_M"], HALF, 64)
        tuned = launched[-1]
        assert tuned == launched[-2]
        assert tuned[1]["num_warps"] == 4
        assert tuned[0] == (tuned[1]["BLOCK_M"],)
        assert all(keywords["BLOCK_M"] <= 64 for _, keywords in launched)


def _pretending(f, *args):
    with configurations.pretend("sm_90"):
        return f(*args)

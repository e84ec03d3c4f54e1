"""The counts are what they say, see inside our operators, and a slower kernel fails the check."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

import diversevit_fast as dvf
from benchmarks import timing
from diversevit_fast.ops import backends
from diversevit_kernels.cpu.attention import formulas
from diversevit_kernels.cpu.runtime import cpp_library, inductor
from tools.kernel_analysis import ratios
from tools.kernel_analysis.ratios import COUNTS, TOLERANCE, counting, slower

RECORDED = Path(__file__).parents[2] / "benchmarks/results/ratios.json"


def counted(f):
    with counting() as counts:
        f()
    return {what: counts.counts[what] for what in COUNTS}


class TestCounts:
    def test_a_product(self):
        x, y = torch.ones(3, 5), torch.ones(5, 7)
        size = 4 * (15 + 35 + 21)
        assert counted(lambda: x @ y) == {
            "products": 2 * 3 * 5 * 7,
            "traffic": size,
            "memory": 4 * 21,
            "calls": 1,
        }

    @pytest.mark.parametrize("how", ["out", "in place"])
    def test_a_product_into_memory_that_is_there(self, how):
        x, y, out = torch.ones(2, 3, 5), torch.ones(2, 5, 7), torch.zeros(2, 3, 7)
        job = {
            "out": lambda: torch.bmm(x, y, out=out),
            "in place": lambda: out.baddbmm_(x, y),
        }[how]
        read = 4 * 2 * (15 + 35 + (21 if how == "in place" else 0))
        expect = {"products": 2 * 2 * 3 * 5 * 7, "traffic": read + 4 * 42, "memory": 0, "calls": 1}
        assert counted(job) == expect

    def test_views_and_empty_memory_do_nothing(self):
        x = torch.ones(4, 6)
        found = counted(lambda: (x.view(2, 12)[:1].T, x.detach(), x.reshape(-1), x.new_empty(5)))
        assert found == {"products": 0, "traffic": 0, "memory": 20, "calls": 0}

    def test_memory_is_what_is_alive_at_once(self):
        x = torch.ones(100)

        def job():
            for _ in range(3):
                y = x + 1
                del y

        assert counted(job)["memory"] == 400

    @pytest.mark.parametrize("how", ["matmul", "einsum"])
    def test_a_composite_product_inside_an_operator(self, how, monkeypatch):
        jobs = {
            "matmul": lambda q, k, *_: q @ k.mT,
            "einsum": lambda q, k, *_: torch.einsum("bhid,bhjd->bhij", q, k),
        }
        q, k, v = (torch.randn(2, 3, 16, 8) for _ in range(3))
        before = counted(lambda: dvf.attention(q, k, v))
        altered(monkeypatch, "attention_forward", jobs[how])
        after = counted(lambda: dvf.attention(q, k, v))
        assert after["products"] - before["products"] == 2 * 2 * 3 * 16 * 16 * 8

    def test_our_operators_count_by_what_they_run(self):
        q, k, v = (torch.randn(2, 3, 16, 8) for _ in range(3))
        found = counted(lambda: dvf.attention(q, k, v))
        assert found["products"] == 2 * (2 * 2 * 3 * 16 * 16 * 8)

    @pytest.fixture
    def refusing(self, monkeypatch):
        """Nothing may be compiled."""

        def refuse(*args):
            raise AssertionError("compiles")

        for compiler in (inductor, cpp_library):
            monkeypatch.setattr(compiler, "_load", refuse)
        monkeypatch.setenv("DIVERSEVIT_COMPILE", "0")

    def test_a_formula_is_one_call(self, refusing):
        q = torch.randn(1, 1, 256, 8)
        run = formulas.fused(formulas.FORWARD, q, q)
        assert run is None
        with counting() as counts:
            run = formulas.fused(formulas.FORWARD, q, q)
            run(torch.randn(256, 256))
        size = 4 * 256 * 256
        found = {what: counts.counts[what] for what in ("traffic", "calls")}
        assert found == {
            "traffic": size + 2 * size + 2 * 4 * 256,
            "calls": 2,
        }  # with randn, which writes

    def test_a_kernel_is_one_call(self, refusing):
        x, dy, ddx = torch.randn(3, 70, 30).unbind()
        size = x.numel() * 4
        found = counted(lambda: torch.ops.diversevit.gelu_double_backward(x, dy, ddx, "none"))
        assert found == {"products": 0, "traffic": 5 * size, "memory": 2 * size, "calls": 1}
        found = counted(lambda: dvf.layer_norm(x, 30))
        rows = 2 * 4 * 70
        assert found == {
            "products": 0,
            "traffic": 2 * size + rows,
            "memory": size + rows,
            "calls": 1,
        }

    def test_everything_is_as_before_afterwards(self):
        before = backends._kernels, inductor.compiled
        with pytest.raises(ZeroDivisionError):
            counted(lambda: 1 / 0)
        assert (backends._kernels, inductor.compiled) == before


@pytest.fixture(scope="module")
def tiny():
    pytest.importorskip("timm")
    return ratios.ratios(tiny=True)


def test_counts_repeat(tiny):
    assert ratios.ratios(tiny=True) == tiny


def altered(monkeypatch, function, change):
    """Our kernel ``function`` with ``change`` done to its arguments first."""
    operator = re.sub("_(forward|backward|double_backward)$", "", function)
    module = import_module(f"diversevit_kernels.cpu.{operator}")
    kernel = getattr(module, function)

    def worse(first, *rest, **options):
        change(*first) if isinstance(first, tuple) else change(first, *rest)
        return kernel(first, *rest, **options)

    monkeypatch.setattr(module, function, worse)


WORSE = {
    "a product": ("attention_backward", "products", lambda q, k, *_: q @ k.mT),
    "a pass": ("gelu_backward", "traffic", lambda x, *_: x + 1),
    "a small call": ("layer_norm_backward", "calls", lambda x, *_: x[:1, :1] + 1),
    "a copy that stays": ("gelu_double_backward", "memory", lambda x, *_: KEPT.append(x.clone())),
}
KEPT: list[torch.Tensor] = []


@pytest.mark.parametrize("how", WORSE)
def test_a_slower_kernel_is_seen(how, tiny, monkeypatch):
    function, what, change = WORSE[how]
    altered(monkeypatch, function, change)
    lines = slower(ratios.ratios(tiny=True), tiny)
    KEPT.clear()
    operator = function.removesuffix("_backward").removesuffix("_double")
    assert any(
        line.startswith(operator) and f", {what}: ours / baseline is" in line for line in lines
    )


def test_only_what_grew_beyond_the_tolerance_is_named():
    recorded = {"row": {"products": 1.0, "traffic": 2.0}}
    assert not slower({"row": {"products": 1 + TOLERANCE, "traffic": 0.1}}, recorded)
    assert slower({"row": {"products": 1.2, "traffic": 2.0}}, recorded) == [
        "row, products: ours / baseline is 1.200, was 1.000 (+20 %)"
    ]
    assert slower({"new": {"calls": 1.0}}, recorded) == [
        "new, calls: no recorded ratio; run with --record"
    ]


def test_the_command(monkeypatch, tmp_path, capsys):
    found = {"row": {"products": 1.0}}
    monkeypatch.setattr(ratios, "ratios", lambda: found)
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    threads = torch.get_num_threads()
    try:
        assert ratios.main(["--record"]) == 0
        assert json.loads((tmp_path / "ratios.json").read_text())["ratios"] == found
        assert ratios.main([]) == 0
        found["row"] = {"products": 1.5}
        capsys.readouterr()
        assert ratios.main([]) == 1
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().err == (
        "slower: row, products: ours / baseline is 1.500, was 1.000 (+50 %)\n"
    )


def test_every_row_is_recorded():
    recorded = json.loads(RECORDED.read_text())["ratios"]
    assert list(recorded) == [name for name, *_ in ratios.rows()]
    assert all(set(row) >= {"traffic", "memory", "calls"} for row in recorded.values())

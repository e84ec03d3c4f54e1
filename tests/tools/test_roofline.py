"""The cost model counts what it says, and its thresholds bite."""

import copy
import os

import pytest
import torch

from tools.kernel_analysis import roofline
from tools.kernel_analysis.operators import OPERATORS, missing, run_orders_eagerly
from tools.kernel_analysis.tensor_traffic import TensorTraffic

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="counts in the interpreter"
)
TOKENS = 20


def skip_if_missing(operator: str) -> None:
    if reason := missing(operator):
        pytest.skip(reason)


@interpreted
@pytest.mark.parametrize("operator", OPERATORS)
def test_counts_of_an_operator(operator):
    """No order moves less than it must, nor asks for less than it touches."""
    skip_if_missing(operator)
    orders = roofline.count(operator, TOKENS, "sm_90")
    assert list(orders) == list(roofline.ORDERS)
    for one in orders.values():
        assert one.compulsory <= one.unique <= one.requested
        assert 0 <= one.useful_flops <= one.dot_flops
        assert one.kernels


@interpreted
def test_compulsory_bytes_of_attention():
    """Forward: q, k, v in, o and the statistics out; double backward also do, ddq, ddk, ddv in, four gradients out."""
    skip_if_missing("attention")
    orders = roofline.count("attention", TOKENS, "sm_90")
    tensor, statistics = TOKENS * 64 * 2, 2 * TOKENS * 4
    assert orders["forward"].compulsory == 4 * tensor + statistics
    assert 7 * tensor + statistics <= orders["backward"].compulsory <= 8 * tensor + statistics
    assert (
        11 * tensor + statistics <= orders["double_backward"].compulsory <= 13 * tensor + statistics
    )


@interpreted
def test_chips_with_the_same_tiles_are_counted_once():
    skip_if_missing("attention")
    results = roofline.measure(["attention"], [TOKENS], ["A100", "B200"])
    assert sorted(chip for row in results for chip in row["chips"]) == ["A100", "B200"]
    text = roofline.table(results)
    assert "A100 us" in text
    assert "attention_forward" in text


def test_eager_traffic_grows_with_the_square_of_the_tokens():
    def moved(operator: str, tokens: int) -> int:
        with TensorTraffic() as traffic:
            run_orders_eagerly(operator, tokens, torch.float32, lambda _: None)
        return traffic.total

    assert moved("attention", 512) > 3.2 * moved("attention", 256)
    assert moved("gelu", 64) == 2 * moved("gelu", 32)


def test_a_launch_is_bound_by_its_slower_side():
    peak = roofline.Peak("sm_90", flops=100.0, bandwidth=10.0)
    compute, memory = {"dot_flops": 200, "unique": 1}, {"dot_flops": 1, "unique": 50}
    assert roofline.bound([compute, memory], peak) == 2.0 + 5.0
    assert roofline.bound([compute], peak, scale=3) == 6.0


def passing() -> dict:
    last = {"unique": 110, "requested": 390, "compulsory": 100}
    other = {"unique": 45, "requested": 50, "compulsory": 40}
    return {
        **{"operator": "attention", "tokens": 197, "chips": ["H100 SXM"]},
        "orders": {"forward": other, "backward": other, "double_backward": last},
        "eager": {"forward": 300, "backward": 300, "double_backward": 800},
    }


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("orders", "double_backward", "unique"), 131, "unique 1.31x"),
        (("orders", "double_backward", "requested"), 401, "requested 4.01x"),
        (("eager", "double_backward"), 500, "eager moves 5.50x"),
        (("tokens",), 196, "nothing to check"),
        (("operator",), "gelu", "nothing to check"),
    ],
    ids=["unique", "requested", "eager", "other tokens", "no attention"],
)
def test_thresholds_bite(path, value, said):
    row = passing()
    assert roofline.verdicts([row]) == []
    worse = copy.deepcopy(row)
    *parents, last = path
    place = worse
    for name in parents:
        place = place[name]
    place[last] = value
    (line,) = roofline.verdicts([worse])
    assert said in line
    assert "\n" not in line


def test_pipes_of_a_loop():
    from collections import Counter

    from tools.kernel_analysis.issue_slots import PIPES, cycles, tensor_flops
    from tools.kernel_analysis.machine_code import Loop

    assert tensor_flops("HMMA.16816.F32.BF16") == 2 * 16 * 8 * 16
    assert tensor_flops("HGMMA.64x128x16.F32.BF16") == 2 * 64 * 128 * 16 // 4
    assert tensor_flops("UTCHMMA") is None
    code = Counter({"HMMA.16816.F32.BF16": 32, "FFMA": 64, "MUFU.EX2": 8, "LDSM.16.M88.4": 4})
    found = cycles(Loop(0, True, code), warps=4, pipes=PIPES["sm_80"])
    assert found == {"tensor": 256.0, "fma": 128.0, "mufu": 64.0, "lsu": 16.0, "issue": 108.0}
    unknown = cycles(Loop(0, True, Counter({"UTCHMMA": 1})), warps=4, pipes=PIPES["sm_100"])
    assert unknown["tensor"] is None

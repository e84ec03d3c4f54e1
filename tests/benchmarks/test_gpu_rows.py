"""Rows of a GPU: what operators have to do, counted; what tables say of it; what is no result."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import anchors, records, report
from benchmarks.cases import anchor_specs, shapes
from benchmarks.orders import BWD, DOUBLE_BWD, FWD, ORDERS
from benchmarks.peaks import PEAKS, peak_of
from benchmarks.registry import IMPLEMENTATIONS, named
from benchmarks.work import flops, moved_bytes
from benchmarks.workloads import OperatorSpec, OperatorWorkload, run

B, H, N, D = 2, 3, 7, 8  # of attention in these tests


def spec_of(operator: str, order: str, dtype: torch.dtype = torch.float32, **more) -> OperatorSpec:
    return OperatorSpec(operator, shapes(operator, 197, tiny=True), dtype, order, "cpu", **more)


@pytest.mark.parametrize(("order", "products"), [(FWD, 2), (BWD, 6), (DOUBLE_BWD, 16)])
def test_flops_of_attention(order, products):
    """q k^T and P v; two products for the derivative of each; and two more for each of those four and of q k^T."""
    assert flops(spec_of("attention", order)) == products * 2 * B * H * N * N * D
    pairs = N * (N + 1) // 2
    assert flops(spec_of("attention", order, causal=True)) == products * 2 * B * H * pairs * D


@pytest.mark.parametrize(("order", "products"), [(FWD, 1), (BWD, 3), (DOUBLE_BWD, 9)])
def test_flops_of_penalties(order, products):
    """The cosines of one pair of heads per token; before them, the routing of three pieces, thrice as often derived."""
    cosines = 2 * B * N * H * H * (H * D)
    assert flops(spec_of("head_penalty", order)) == products * cosines
    routing = 2 * B * N * 3 * H * D * (H * D)
    assert flops(spec_of("routed_head_penalty", order)) == products * (cosines + routing)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("operator", ["layer_norm", "gelu"])
def test_elementwise_operators_have_no_products(operator, order):
    assert flops(spec_of(operator, order)) == 0


@pytest.mark.parametrize("operator", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_those_of_the_tensors_of_each_order(operator, dtype):
    """Everything that a run of each order is given and returns, added up over the orders."""
    total = 0
    for order in ORDERS:
        t = OperatorWorkload(spec_of(operator, order, dtype)).tensors
        given = [
            *t.inputs,
            *([t.do] if order != FWD else []),
            *(t.dd if order == DOUBLE_BWD else []),
        ]
        returned = run(named(operator, "eager").function, t, order)
        total += sum(x.numel() * x.element_size() for x in (*given, *returned))
        assert moved_bytes(spec_of(operator, order, dtype)) == total


def test_causal_attention_is_checked_against_causal_attention():
    spec = spec_of("attention", DOUBLE_BWD, causal=True)
    workload = OperatorWorkload(spec)
    ours = named("attention", "ours")
    workload.check(ours, workload.job(ours)())
    full = OperatorWorkload(spec._replace(causal=False))
    with pytest.raises(AssertionError, match="exceeds budget"):
        workload.check(ours, full.job(ours)())


def test_a_check_of_some_samples_sees_no_others(monkeypatch):
    monkeypatch.setattr("benchmarks.workloads.CHECKED_BYTES", 8 * H * N * N)  # of one sample
    workload = OperatorWorkload(spec_of("attention", DOUBLE_BWD))
    assert workload.spec.checked_samples == 1
    ours = named("attention", "ours")
    results = workload.job(ours)()
    results[0][1] += 1
    workload.check(ours, results)
    results[0][0] += 1
    with pytest.raises(AssertionError, match="exceeds budget"):
        workload.check(ours, results)


def test_a_chip_that_is_not_in_the_table_has_no_peak():
    assert peak_of("NVIDIA H200") == PEAKS["H200"]
    assert peak_of("NVIDIA H200 NVL") is None
    assert PEAKS["H200"].flops("bfloat16") == 989e12
    assert PEAKS["H200"].flops("float64") is None


SECONDS = {FWD: 1e-3, BWD: 4e-3, DOUBLE_BWD: 12e-3}


def recorded(device: str = "NVIDIA H200") -> dict:
    """Compact rows of every anchor's shape, ours and one that is twice as fast."""
    rows = []
    for operator in ("attention", "layer_norm"):
        for spec in anchor_specs(operator):
            for name, share in (("ours", 1.0), ("eager", 0.5)):
                seconds = share * SECONDS[spec.order]
                rows.append(
                    {
                        **{"workload": operator, "group": spec.group, "order": spec.order},
                        **{"implementation": name, "dtype": "bfloat16", "first_order_only": False},
                        **{"flops": flops(spec), "bytes": moved_bytes(spec)},
                        **{"device_seconds": seconds, "device_how": "graph of 20, L2 warm"},
                        **{
                            "host_seconds": 2e-5,
                            "seconds": [3 * seconds] * 3,
                            "peak_bytes": 1 << 20,
                        },
                    }
                )
    return {"machine": {"device": device, "torch": "2"}, "rows": rows}


def stored(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "chip.json"
    path.write_text(json.dumps(content))
    return path


def test_tables_of_a_gpu_have_device_and_host_time_and_shares_of_the_peak(tmp_path):
    text = report.markdown(records.read(stored(tmp_path, recorded())))
    work = 4 * 32 * 32 * 512**2 * 64  # of the forward, in a millisecond
    moved = 4 * 32 * 32 * 512 * 64 * 2
    cells = [
        *("32x32x512x64 bfloat16 fwd", "ours", "1000 us (graph of 20, L2 warm)", "1.00", "20 us"),
        f"{work / 1e9:.3g} T ({work / 1e-3 / 989e12:.0%})",
        f"{moved / 1e6:.0f} G ({moved / 1e-3 / 4.8e12:.0%})",
        *("3 ms", "3 - 3", "1.00", "1.0 MiB"),
    ]
    assert f"| {' | '.join(cells)} |" in text
    assert "| eager | 500 us (graph of 20, L2 warm) | 0.50 | 20 us |" in text
    assert "without the host" in text
    summary = report.summary(records.read(stored(tmp_path, recorded())), "full")
    assert "| attention 32x32x512x64 bfloat16 fwd+bwd | 4 ms | 0.50 | 1.0 |" in summary
    assert "Operators: the device's time" in summary


def test_published_figures_stand_beside_the_same_of_ours(tmp_path):
    rows = records.read(stored(tmp_path, recorded()))
    forward = 4 * 32 * 32 * 512**2 * 64
    found = {(one.rows, one.quantity): anchors.figure(one, rows) for one in anchors.ANCHORS}
    assert found[anchors.ATTENTION, anchors.FORWARD_RATE] == f"{forward / 1e-3 / 1e12:.3g}"
    assert found[anchors.ATTENTION, anchors.BACKWARD_RATE] == f"{2.5 * forward / 3e-3 / 1e12:.3g}"
    assert found[anchors.HVP, anchors.ALL_ORDERS] == "12"
    tensor = 16384 * 4096 * 2
    share = (2 * tensor + 2 * 4096 * 2) / 1e-3 / 4.8e12
    assert str(found[anchors.NORM, anchors.FORWARD_SHARE]).endswith(f", {share:.0%}")
    lines = report.markdown(rows).split("### published figures")[1].splitlines()
    assert sum(line.startswith("| ") for line in lines) == 1 + len(anchors.ANCHORS)
    assert not anchors.table([row for row in rows if row.implementation != "ours"])


def test_an_unknown_chip_has_no_shares_and_that_is_said_once(tmp_path):
    text = report.markdown(records.read(stored(tmp_path, recorded("Chip X"))))
    assert "no data sheet known of Chip X" in text
    assert text.count("Chip X") == 2  # and where the conditions name the device
    assert " T |" in text
    assert " T (" not in text


def test_what_was_refused_is_told_with_its_reason(tmp_path):
    content = recorded()
    content["rows"][1] |= {"seconds": [], "refused": "SDPA flash: no reason"}
    rows = records.read(stored(tmp_path, content))
    text = report.markdown(rows)
    assert text.count("Left out: bfloat16, SDPA flash: no reason.") == 1
    assert "3 interleaved rounds" in text
    report.summary(rows, "full")


def test_what_a_fake_gpu_measured_is_refused(tmp_path, capsys):
    path = stored(tmp_path, recorded(records.FAKE))
    assert report.main([str(path)]) == 1
    assert "no results" in capsys.readouterr().err


def test_a_recorded_row_keeps_what_a_gpu_adds(tmp_path):
    path = stored(tmp_path, recorded())
    rows = records.read(path)
    records.write(path, rows)
    assert [row.info for row in records.read(path)] == [
        {**dict.fromkeys(records.MACHINE), **row.info} for row in rows
    ]
    assert rows[1].device_ratio == pytest.approx(0.5)

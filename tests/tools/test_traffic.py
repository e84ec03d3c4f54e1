"""Tests of the interpreter's instruments, on tiny kernels whose traffic is known by hand."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from tools.interpreter import traffic  # noqa: E402
from tools.interpreter.quick import quick  # noqa: E402
from tools.interpreter.sanitizer import sanitizer  # noqa: E402
from tools.interpreter.traffic import counting, unique_bytes  # noqa: E402
from tools.kernel_analysis.tensor_traffic import TensorTraffic  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="counts in the interpreter"
)


@pytest.fixture(autouse=True)
def restored():
    """No test may leave the interpreter patched."""
    from triton.runtime import interpreter

    owners = (interpreter.InterpreterBuilder, interpreter.GridExecutor)
    before = [dict(vars(owner)) for owner in owners], interpreter._convert_float
    yield
    assert ([dict(vars(owner)) for owner in owners], interpreter._convert_float) == before


@triton.jit
def _copy_kernel(x_ptr, y_ptr, stride, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at * stride, mask=at < n, other=0.0)
    tl.store(y_ptr + at, x, mask=at < n)


@triton.jit
def _first_row_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    """Every program reads the same BLOCK elements, and writes its own."""
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + tl.program_id(0) * BLOCK + at, tl.load(x_ptr + at))


@triton.jit
def _product_kernel(x_ptr, y_ptr, M, BLOCK: tl.constexpr):
    """y = exp(x xᵀ) of a [M, BLOCK] matrix padded to [BLOCK, BLOCK]."""
    at = tl.arange(0, BLOCK)
    inside = (at[:, None] < M) & (at[None, :] >= 0)
    x = tl.load(x_ptr + at[:, None] * BLOCK + at[None, :], mask=inside, other=0.0)
    y = tl.exp(tl.dot(x, tl.trans(x), input_precision="ieee"))
    tl.store(y_ptr + at[:, None] * BLOCK + at[None, :], y, mask=inside)


def test_masked_lanes_do_not_count():
    x, y = torch.randn(10), torch.empty(10)
    with counting() as launches:
        _copy_kernel[(2,)](x, y, 1, 10, BLOCK=8)
    (launch,) = launches
    assert torch.equal(x, y)
    assert (launch.kernel, launch.programs) == ("_copy_kernel", 2)
    assert launch.read.requested == launch.written.requested == 40
    assert (launch.requested, launch.unique) == (80, 80)
    assert launch.dot_flops == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_byte_read_twice_is_requested_twice_and_unique_once(dtype):
    size = dtype.itemsize
    x, y = torch.randn(8).to(dtype), torch.empty(24, dtype=dtype)
    with counting() as launches:
        _first_row_kernel[(3,)](x, y, BLOCK=8)
        _first_row_kernel[(3,)](x, y, BLOCK=8)
    for launch in launches:
        assert (launch.read.requested, launch.read.unique) == (24 * size, 8 * size)
        assert (launch.written.requested, launch.written.unique) == (24 * size, 24 * size)
    assert unique_bytes([launch.read for launch in launches]) == 8 * size


def test_many_accesses_are_compacted_without_loss(monkeypatch):
    monkeypatch.setattr(traffic, "COMPACT_BEYOND", 20)
    x, y = torch.randn(8), torch.empty(80)
    with traffic.counting() as launches:
        _first_row_kernel[(10,)](x, y, BLOCK=8)
    assert (launches[0].requested, launches[0].unique) == (2 * 80 * 4, (80 + 8) * 4)


def test_temporaries_of_one_address_are_two_tensors():
    """A freed tensor's memory given out again must not look like the same bytes."""
    with counting() as launches:
        for _ in range(4):
            _first_row_kernel[(1,)](torch.randn(8), torch.empty(8), BLOCK=8)
    assert unique_bytes([launch.read for launch in launches]) == 4 * 32


def test_bfloat16_is_rounded_to_the_nearest():
    """As by PyTorch: ties, the largest numbers, the smallest, infinities and NaN."""
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), generator=g, dtype=torch.int32)
    bits[:1024] = bits[:1024] & ~0xFFFF | 0x8000
    x = torch.cat([bits.view(torch.float32), torch.tensor([0.0, -0.0, torch.inf, -torch.inf])])
    y = torch.empty(len(x), dtype=torch.bfloat16)
    with quick():
        _copy_kernel[(1,)](x, y, 1, len(x), BLOCK=8192)
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y.nan_to_num(7.0), x.bfloat16().nan_to_num(7.0))
    assert x.isnan().any()


def test_products_and_what_padding_wastes_of_them():
    x, y = torch.rand(5, 16) / 4 + 0.1, torch.empty(5, 16)
    with counting() as launches:
        _product_kernel[(1,)](x, y, 5, BLOCK=16)
    (launch,) = launches
    assert launch.dot_flops == 2 * 16**3
    assert launch.useful_flops == 2 * 5 * 5 * 16
    assert launch.special == 16 * 16
    assert launch.elementwise >= launch.special


def test_an_exception_restores_the_interpreter():
    def fail():
        raise KeyError

    with pytest.raises(KeyError), counting():
        fail()


@pytest.mark.parametrize("n", [9, 11, 16])
def test_one_element_out_of_bounds_is_caught(n):
    """A read that memory around the tensor would forgive: the zone behind it is ours."""
    whole = torch.zeros(40)
    x, y = whole[16:24], torch.empty(16)
    _copy_kernel[(1,)](x, y, 1, 8, BLOCK=16)
    with sanitizer():
        _copy_kernel[(1,)](x, y, 1, 8, BLOCK=16)
        with pytest.raises(AssertionError, match=r"_copy_kernel loads from 0x.*0 bytes past"):
            _copy_kernel[(1,)](x, y, 1, n, BLOCK=16)


def test_a_store_out_of_bounds_is_caught_before_it_happens():
    whole = torch.zeros(16)
    with sanitizer(), pytest.raises(AssertionError, match="stores to"):
        _copy_kernel[(1,)](torch.ones(16), whole[:8], 1, 9, BLOCK=16)
    assert not whole.any()


def test_gaps_of_a_strided_view_are_out_of_bounds():
    x, y = torch.randn(32)[::2], torch.empty(16)
    with sanitizer():
        _copy_kernel[(1,)](x, y, 2, 16, BLOCK=16)
        with pytest.raises(AssertionError, match="loads from"):
            _copy_kernel[(1,)](x, y, 1, 16, BLOCK=16)
    assert torch.equal(x, y)


def test_views_that_nest_are_all_inside():
    """Interleaved and transposed views of one buffer, and an expanded one."""
    whole = torch.randn(8, 4)
    y = torch.empty(8)
    with sanitizer():
        for x in (whole[:, 1], whole.T[2], whole.T[1:3][0], whole[:, :3][:, 2]):
            _copy_kernel[(1,)](x, y, x.stride(0), 8, BLOCK=8)
            assert torch.equal(x, y)
        _copy_kernel[(1,)](torch.ones(1).expand(8), y, 0, 8, BLOCK=8)


def test_counting_inside_a_sanitizer():
    with sanitizer(), counting() as launches:
        _copy_kernel[(1,)](torch.randn(8), torch.empty(8), 1, 8, BLOCK=8)
        with pytest.raises(AssertionError):
            _copy_kernel[(1,)](torch.randn(7), torch.empty(8), 1, 8, BLOCK=8)
    assert launches[0].requested == 64


def test_launches_are_no_tensor_traffic():
    with counting() as launches, TensorTraffic() as eager:
        _copy_kernel[(1,)](torch.empty(8), torch.empty(8), 1, 8, BLOCK=8)
    assert len(launches) == 1
    assert eager.total == 0


def test_tensor_traffic_of_operators():
    a, b = torch.randn(4, 8), torch.randn(4, 8)

    def moved(f) -> int:
        with TensorTraffic() as eager:
            f()
        return eager.total

    one = a.numel() * 4
    assert moved(lambda: a + b) == 3 * one
    assert moved(lambda: a * a) == 2 * one
    assert moved(lambda: a.mT.reshape(4, 8)) == 2 * one  # a copy
    assert moved(lambda: a.T.unsqueeze(0).view(1, 8, 4).detach()[:, 2:]) == 0
    assert moved(lambda: a + b[:1].expand(4, 8)) == 2 * one + one // 4
    assert moved(lambda: torch.empty(4, 8).zero_()) == one
    assert moved(lambda: a.clone().add_(b)) == 5 * one
    assert moved(lambda: a @ b.T) == 2 * one + 64
    assert moved(lambda: torch.mul(a, b, out=torch.empty(4, 8))) == 3 * one


def test_tensor_traffic_sees_both_backward_passes():
    x = torch.randn(4, 8, requires_grad=True)
    with TensorTraffic() as eager:
        y = x.exp()
        forward = eager.total
        (g,) = torch.autograd.grad(y, x, torch.ones(4, 8), create_graph=True)
        backward = eager.total - forward
        torch.autograd.grad(g, x, torch.ones(4, 8))
    assert forward == 2 * 128
    assert backward >= 3 * 128
    assert eager.total > forward + backward

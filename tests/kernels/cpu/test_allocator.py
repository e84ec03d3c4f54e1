"""Large results of the CPU backend reuse the memory of freed ones, never that of live ones."""

import gc
import mmap
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import diversevit_fast as dvf
from diversevit_kernels.cpu.runtime import allocator

LARGE = allocator.MIN_BYTES // 4 + 3  # float32
LIKE = torch.empty(0)
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="results are PyTorch's own")


@pytest.fixture(autouse=True)
def _empty_cache():
    gc.collect()
    allocator.empty_cache()
    yield
    allocator.empty_cache()


@linux
def test_a_result_takes_the_memory_of_a_dead_one_and_not_of_a_living_one():
    first, second = allocator.new_empty(LIKE, LARGE), allocator.new_empty(LIKE, LARGE)
    assert first.data_ptr() != second.data_ptr()
    where, view = first.data_ptr(), first[1:]
    del first
    assert allocator.new_empty(LIKE, LARGE).data_ptr() != where, "a view of it lives"
    del view
    assert allocator.new_empty(LIKE, LARGE).data_ptr() == where
    assert allocator.new_empty(LIKE, 2 * LARGE).data_ptr() != where


@linux
def test_the_last_freed_is_the_first_taken():
    results = [allocator.new_empty(LIKE, LARGE) for _ in range(3)]
    where = [x.data_ptr() for x in results]
    while results:
        del results[0]
    assert allocator.new_empty(LIKE, LARGE).data_ptr() == where[-1]


@linux
def test_the_cache_is_bounded_and_can_be_emptied(monkeypatch):
    monkeypatch.setattr(allocator, "MAX_CACHED_BYTES", 3 * allocator.MIN_BYTES)
    results = [allocator.new_empty(LIKE, LARGE) for _ in range(5)]
    oldest, *_, newest = (x.data_ptr() for x in results)
    while results:
        del results[0]
    assert 2 * allocator.MIN_BYTES < allocator.cached_bytes() <= 3 * allocator.MIN_BYTES
    taken = [allocator.new_empty(LIKE, LARGE) for _ in range(2)]
    assert taken[0].data_ptr() == newest
    assert oldest not in (x.data_ptr() for x in taken)
    taken.clear()
    allocator.empty_cache()
    assert allocator.cached_bytes() == 0


@linux
def test_the_public_function_frees_what_is_cached_and_nothing_that_lives():
    alive, dead = (allocator.new_empty(LIKE, LARGE).fill_(7) for _ in range(2))
    del dead
    assert allocator.cached_bytes() >= allocator.MIN_BYTES
    dvf.empty_cpu_cache()
    assert allocator.cached_bytes() == 0
    assert bool((alive == 7).all())
    del alive
    assert allocator.cached_bytes() >= allocator.MIN_BYTES


@linux
def test_a_finalizer_that_interrupts_the_allocator_waits_for_nobody():
    x = allocator.new_empty(LIKE, LARGE)
    with allocator._guard.lock:
        del x
    assert allocator.cached_bytes() >= allocator.MIN_BYTES


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, LARGE), (7,), (2, LARGE, 3)], ids=str)
def test_a_result_is_like_an_empty_tensor(dtype, shape):
    x, plain = allocator.new_empty(LIKE.to(dtype), *shape), torch.empty(shape, dtype=dtype)
    assert x.shape == plain.shape
    assert x.stride() == plain.stride()
    assert x.dtype == dtype
    assert not x._is_view()
    x.fill_(1)
    assert x.double().sum() == x.numel()


def test_small_results_are_pytorchs():
    allocator.new_empty(LIKE, LARGE // 2)
    assert allocator.cached_bytes() == 0


def test_a_system_that_refuses_a_mapping(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no more mappings")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert allocator.new_empty(LIKE, LARGE).shape == (LARGE,)


def _second_order(operator, x):
    y = operator(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y, requires_grad=True), create_graph=True)
    dx.square().sum().backward()


@linux
@pytest.mark.parametrize(
    ("operator", "results"),
    [
        (dvf.gelu, 4),
        (lambda x: dvf.layer_norm(x, (384,)), 4),
        (lambda x: dvf.attention(*(x.view(1, 14, 197, 384),) * 3), 8),
    ],
    ids=["gelu", "layer_norm", "attention"],
)
def test_every_result_of_an_operator_is_cached_and_reused_when_freed(
    monkeypatch, operator, results
):
    made: list[int] = []
    monkeypatch.setattr(allocator, "_take_cached", made.append)
    x = torch.randn(14 * 197, 384, requires_grad=True)
    _second_order(operator, x)
    x.grad = None
    gc.collect()
    assert len(made) == results
    assert allocator.cached_bytes() == sum(made)


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
def test_reused_memory_changes_no_bit(again):
    """The second run writes into what the first left behind."""
    x = torch.randn(8, 197, 768)

    def run():
        leaf = x.clone().requires_grad_()

        def block(z):
            z = dvf.layer_norm(dvf.gelu(z), (768,))
            return dvf.attention(*(z.unflatten(-1, (12, 64)).transpose(1, 2),) * 3)

        y = checkpoint(block, leaf, use_reentrant=False) if again else block(leaf)
        (dx,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)  # pyright: ignore[reportOptionalMemberAccess]
        dx.square().sum().backward()
        return leaf.grad

    first = run().clone()
    for _ in range(3):
        assert torch.equal(run(), first)


def test_threads_never_share_a_block():
    wrong: list[str] = []

    def work(mine: int) -> None:
        for _ in range(200):
            x = allocator.new_empty(LIKE, LARGE).fill_(mine)
            y = allocator.new_empty(LIKE, LARGE).fill_(-mine)
            if not (bool((x == mine).all()) and bool((y == -mine).all())):
                wrong.append(f"thread {mine}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 5)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@linux
def test_a_fork_writes_into_pages_of_its_own():
    code = f"""
import os, torch; torch.set_num_threads(1)
from diversevit_kernels.cpu.runtime import allocator
x = allocator.new_empty(torch.empty(0), {LARGE}).fill_(1)
child = os.fork()
if not child:
    x.fill_(2)
    y = allocator.new_empty(torch.empty(0), {LARGE}).fill_(3)
    os._exit(int((x != 2).any() or (y != 3).any()))
assert os.waitpid(child, 0)[1] == 0
assert (x == 1).all()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr

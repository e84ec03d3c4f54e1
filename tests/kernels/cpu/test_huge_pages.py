"""Large results of the CPU backend take up the memory of dead ones, never that of living ones."""

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
from diversevit_kernels.cpu.runtime import huge_pages as pool

LARGE = pool.WORTH // 4 + 3  # float32
LIKE = torch.empty(0)
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="results are PyTorch's own")


@pytest.fixture(autouse=True)
def _empty_pool():
    gc.collect()
    pool.release()
    yield
    pool.release()


@linux
def test_a_result_takes_the_memory_of_a_dead_one_and_not_of_a_living_one():
    first, second = pool.pooled(LIKE, LARGE), pool.pooled(LIKE, LARGE)
    assert first.data_ptr() != second.data_ptr()
    where, view = first.data_ptr(), first[1:]
    del first
    assert pool.pooled(LIKE, LARGE).data_ptr() != where, "a view of it lives"
    del view
    assert pool.pooled(LIKE, LARGE).data_ptr() == where
    assert pool.pooled(LIKE, 2 * LARGE).data_ptr() != where


@linux
def test_the_last_freed_is_the_first_taken():
    results = [pool.pooled(LIKE, LARGE) for _ in range(3)]
    where = [x.data_ptr() for x in results]
    while results:
        del results[0]
    assert pool.pooled(LIKE, LARGE).data_ptr() == where[-1]


@linux
def test_what_waits_is_bounded_and_can_be_released(monkeypatch):
    monkeypatch.setattr(pool, "KEPT", 3 * pool.WORTH)
    results = [pool.pooled(LIKE, LARGE) for _ in range(5)]
    oldest, *_, newest = (x.data_ptr() for x in results)
    while results:
        del results[0]
    assert 2 * pool.WORTH < pool.waiting() <= 3 * pool.WORTH
    taken = [pool.pooled(LIKE, LARGE) for _ in range(2)]
    assert taken[0].data_ptr() == newest
    assert oldest not in (x.data_ptr() for x in taken)
    taken.clear()
    pool.release()
    assert pool.waiting() == 0


@linux
def test_a_finalizer_that_interrupts_the_pool_waits_for_nobody():
    x = pool.pooled(LIKE, LARGE)
    with pool._guard.lock:
        del x
    assert pool.waiting() >= pool.WORTH


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, LARGE), (7,), (2, LARGE, 3)], ids=str)
def test_a_result_is_like_an_empty_tensor(dtype, shape):
    x, plain = pool.pooled(LIKE.to(dtype), *shape), torch.empty(shape, dtype=dtype)
    assert x.shape == plain.shape
    assert x.stride() == plain.stride()
    assert x.dtype == dtype
    assert not x._is_view()
    x.fill_(1)
    assert x.double().sum() == x.numel()


def test_small_results_are_pytorchs():
    pool.pooled(LIKE, LARGE // 2)
    assert pool.waiting() == 0


def test_a_system_that_refuses_a_mapping(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no more mappings")

    monkeypatch.setattr(mmap, "mmap", refuse)
    assert pool.pooled(LIKE, LARGE).shape == (LARGE,)


def _ladder(operator, x):
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
def test_every_result_of_a_ladder_is_pooled_and_freed(monkeypatch, operator, results):
    made: list[int] = []
    monkeypatch.setattr(pool, "_taken", made.append)
    x = torch.randn(14 * 197, 384, requires_grad=True)
    _ladder(operator, x)
    x.grad = None
    gc.collect()
    assert len(made) == results
    assert pool.waiting() == sum(made)


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
            x = pool.pooled(LIKE, LARGE).fill_(mine)
            y = pool.pooled(LIKE, LARGE).fill_(-mine)
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
from diversevit_kernels.cpu.runtime import huge_pages as pool
x = pool.pooled(torch.empty(0), {LARGE}).fill_(1)
child = os.fork()
if not child:
    x.fill_(2)
    y = pool.pooled(torch.empty(0), {LARGE}).fill_(3)
    os._exit(int((x != 2).any() or (y != 3).any()))
assert os.waitpid(child, 0)[1] == 0
assert (x == 1).all()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr

"""A forked child goes on computing, whatever other threads of its parent were doing at that moment."""

import ast
import os
from pathlib import Path

import pytest

from diversevit_kernels.common import forks
from tests.helpers.processes import in_a_process

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

CHILD = """
import os, signal, sys, threading, time, warnings
import torch

def in_a_child(work, seconds=20):
    '''What the child's work returned, a number below 100; it is killed if it hangs.'''
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons': there are threads
        child = os.fork()
    if child == 0:
        code = 101
        try:
            code = int(work())
        finally:
            os._exit(code)
    for _ in range(20 * seconds):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hung"
"""

WHILE_HELD = """
import gc
import diversevit_fast as dvf
from diversevit_kernels.common import forks
from diversevit_kernels.cpu.runtime import allocator, cpp_library, inductor
from diversevit_kernels.cpu.attention import formulas

torch.set_num_threads(1)
large = torch.ones(1 << 19)
before = dvf.gelu(large)  # compiled, before anything is held
guards = [x for x in gc.get_objects() if isinstance(x, forks.ForkSafe)]
ours = (cpp_library._guard, inductor._guard, allocator._guard)
assert {id(x) for x in ours} <= {id(x) for x in guards}
held, done = threading.Event(), threading.Event()

def hold():
    for guard in guards:
        guard.lock.acquire()
    held.set()
    done.wait()

threading.Thread(target=hold, daemon=True).start()
held.wait()

def work():
    cpp_library._loaded.clear()
    same = torch.equal(dvf.gelu(large), before)  # the kernel, and the allocator of its result
    os.environ["CXX"] = "/nowhere/compiler"
    os.environ["DIVERSEVIT_CACHE_DIR"] = "/dev/null/folder"
    warnings.simplefilter("ignore")
    return same and inductor.compiled(formulas.FORWARD, torch.float32) is None

print(in_a_child(work))
done.set()
"""


def run(code: str, **environment: str) -> tuple[str, str]:
    return in_a_process(CHILD + code, **environment).communicate()


def test_locks_that_another_thread_held() -> None:
    out, err = run(WHILE_HELD)
    assert out.split() == ["1"], out + err


INSIDE = """
from diversevit_kernels.common import forks
guard = forks.ForkSafe()

def work():
    return 7

with guard.lock:
    code = in_a_child(lambda: guard.lock.acquire(timeout=5))
print(code, guard.lock.acquire(blocking=False))
"""


def test_a_lock_that_the_forking_thread_held() -> None:
    out, err = run(INSIDE)
    assert out.split() == ["1", "True"], out + err


def test_every_lock_is_fork_safe() -> None:
    """Nothing else makes a lock, nor what holds one; the experiment is a program, and nobody forks it."""
    root = Path(forks.__file__).parents[3]
    makers = {"Lock", "RLock", "Condition", "Semaphore", "Event", "ThreadPoolExecutor", "Queue"}
    found = {
        path.name
        for folder in ("kernels/diversevit_kernels", "diversevit_fast")
        for path in (root / folder).rglob("*.py")
        if path.parent.name != "experiment"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).rpartition(".")[2] in makers
        and ast.unparse(node.func) != "torch.cuda.Event"  # a time on a GPU
    }
    assert found == {"forks.py"}


THREADS = """
import diversevit_fast as dvf
from diversevit_kernels.cpu import gelu

torch.set_num_threads({parent})
draw = torch.Generator().manual_seed(0)
x = torch.randn(2, 3, 40, 16, generator=draw)
r, w = torch.randn(2, 5, 3, 2, 4, generator=draw), torch.randn(3, 2, 4, 8, generator=draw)

def kernels():
    q = x.clone().requires_grad_()
    y = dvf.layer_norm(dvf.gelu(dvf.attention(q, q, q)), (16,))
    (g,) = torch.autograd.grad(y.square().sum(), q, create_graph=True)
    (gg,) = torch.autograd.grad(g.square().sum(), q)
    routed = dvf.routed_head_penalty(r, w)
    return b"".join(t.detach().numpy().tobytes() for t in (y, g, gg, routed))

before = kernels()

def work():
    torch.set_num_threads({child})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        same = all(kernels() == before for _ in range(2))
    said = [w for w in caught if "OpenMP" in str(w.message)]
    return 10 * len(said) + same

print(in_a_child(work), kernels() == before)
"""


@pytest.mark.parametrize(
    ("parent", "child", "said"), [(2, 2, 1), (3, 5, 1), (2, 1, 0), (1, 2, 0)], ids=str
)
def test_kernels_after_openmp_lost_its_threads(parent, child, said) -> None:
    out, err = run(THREADS.format(parent=parent, child=child), OMP_NUM_THREADS="2")
    assert out.split() == [str(10 * said + 1), "True"], out + err

"""The GPU that computes nothing: what it counts, moves, captures and refuses."""

import pytest

from benchmarks.fake_gpu.build import SOURCES, build, unavailable
from benchmarks.fake_gpu.launch import environment
from tests.helpers.fake_gpu import json_from_fake_gpu, run_on_fake_gpu

HEAD = """
import json, sys
import torch
from benchmarks.fake_gpu.counters import counting, counts
def told(found): print(json.dumps({k: v for k, v in found.items() if v}))
x = torch.ones(8, 16, device="cuda", requires_grad=True)
w = torch.ones(16, 16, device="cuda", requires_grad=True)
def step(): return torch.autograd.grad((x @ w).exp().sum(), (x, w))
side = torch.cuda.Stream()
side.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(side):
    for _ in range(3): step()
torch.cuda.current_stream().wait_stream(side)
graph = torch.cuda.CUDAGraph()
def attempt(job):
    before = counts()["refused"]
    try:
        with torch.cuda.graph(graph): job()
    except Exception as error: text = str(error).splitlines()[0]
    else: text = "captured"
    print(json.dumps([text, counts()["refused"] - before]))
"""


def test_it_is_an_h200_that_the_kernels_of_triton_run_on():
    code = """
import torch, diversevit_fast as dvf
from benchmarks.fake_gpu.counters import counting
x = torch.ones(8, 16, device="cuda", requires_grad=True)
def step():
    (g,) = torch.autograd.grad(dvf.gelu(x), x, torch.ones_like(x), create_graph=True)
    torch.autograd.grad(g.sum(), x)
step()
with counting() as found: step()
print(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), found["triton"])
"""
    name, _, triton = run_on_fake_gpu(code).strip().rpartition(" ")
    assert name == "Fake H200 (9, 0)"
    assert int(triton) >= 1


def test_launches_and_products_are_counted():
    found = json_from_fake_gpu(HEAD + "with counting() as found: step()\ntold(found)")
    assert found["gemms"] == 3
    assert found["kernels"] >= 4
    assert "waits" not in found
    assert "captured" not in found


LINES = {
    "x.sum().item()": "waits",
    "torch.cuda.synchronize()": "waits",
    "x.detach().cpu()": "copies",
    "torch.ones(3).cuda()": "copies",
    "torch.empty(1 << 28, device='cuda')": "mallocs",
    "torch.cuda.Event().record()": "events",
}


def test_a_line_is_counted_once():
    code = f"""{HEAD}
found = []
for line in {list(LINES)!r}:
    with counting() as one: exec(line)
    found.append(one)
print(json.dumps(found))
"""
    found = json_from_fake_gpu(code)
    assert [one[name] for one, name in zip(found, LINES.values(), strict=True)] == [1] * len(LINES)


def test_a_graph_holds_what_was_captured_and_replays_it():
    code = (
        HEAD
        + """
with counting() as eager: step()
with counting() as captured:
    with torch.cuda.graph(graph): step()
with counting() as replayed:
    graph.replay(); graph.replay()
print(json.dumps([eager, captured, replayed]))
"""
    )
    eager, captured, replayed = json_from_fake_gpu(code)
    nodes = eager["kernels"] + eager["gemms"]
    assert captured["captured"] == nodes > 0
    assert captured["graphs"] == 1
    assert captured["refused"] == 0
    assert replayed["replays"] == 2
    assert replayed["replayed"] == 2 * nodes
    assert replayed["kernels"] == replayed["gemms"] == 0


FORBIDDEN = {
    ".item()": "lambda: x.sum().item()",
    "copy to the host": "lambda: x.detach().cpu()",
    "copy from the host": "lambda: torch.ones(3).cuda()",
    "wait for the device": "lambda: torch.cuda.synchronize()",
    "wait for another stream": "lambda: side.synchronize()",
    "query of an event": "lambda: early.query()",
    "wait for an event of before": "lambda: torch.cuda.current_stream().wait_event(early)",
    "first launch of a Triton kernel": "lambda: dvf.head_penalty(x[None, :, :, None].detach())",
}


@pytest.mark.parametrize("job", FORBIDDEN.values(), ids=FORBIDDEN)
def test_what_a_capture_forbids_fails_and_ends_it(job):
    head = "import diversevit_fast as dvf\nearly = torch.cuda.Event(); early.record()\n"
    text, refused = json_from_fake_gpu(f"{HEAD}{head}attempt({job})")
    assert "captur" in text
    assert text != "captured"
    assert refused <= 1  # PyTorch refuses some itself, before it asks the driver


ALLOWED = {
    "a step": "step",
    "new memory": "lambda: torch.empty(1 << 28, device='cuda').exp_()",
    "a copy on the device": "lambda: x.detach().clone()",
    "random numbers": "lambda: torch.rand(7, device='cuda')",
    "a copy from pinned memory": "lambda: kept.copy_(pinned, non_blocking=True)",
    "a stream forked and joined": "fork",
}
FORK = """
pinned, kept = torch.ones(3).pin_memory(), torch.empty(3, device="cuda")
def fork(join=True):
    main = torch.cuda.current_stream()
    x.detach().exp()
    side.wait_stream(main)
    with torch.cuda.stream(side): x.detach().exp()
    if join: main.wait_stream(side)
"""


def test_what_a_capture_allows():
    attempts = "\n".join(
        f"graph = torch.cuda.CUDAGraph(); attempt({job})" for job in ALLOWED.values()
    )
    found = run_on_fake_gpu(f"{HEAD}{FORK}{attempts}").splitlines()
    assert dict(zip(ALLOWED, found, strict=True)) == dict.fromkeys(ALLOWED, '["captured", 0]')


def test_a_forked_stream_must_be_joined():
    text, _ = json_from_fake_gpu(f"{HEAD}{FORK}attempt(lambda: fork(join=False))")
    assert "unjoined" in text


def test_only_the_streams_of_a_capture_capture():
    code = f"""{HEAD}{FORK}
other = torch.cuda.Stream()
def job():
    fork()
    with torch.cuda.stream(other): x.detach().exp_()
with counting() as found: attempt(job)
told(found)
"""
    found = json_from_fake_gpu(code)
    assert found["captured"] == 2
    assert found["kernels"] == 3


def test_a_capture_in_thread_local_mode_lets_others_wait():
    code = """
import threading
def job():
    x.detach().exp()
    thread = threading.Thread(target=side.synchronize)
    thread.start(); thread.join()
for mode in ("thread_local", "global"):
    before = counts()["refused"]
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode=mode): job()
    except Exception: pass
    print(mode, counts()["refused"] - before)
"""
    assert run_on_fake_gpu(HEAD + code).splitlines() == ["thread_local 0", "global 1"]


def test_copies_deliver_finite_numbers():
    code = """
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool):
    found = torch.empty(5, dtype=dtype, device="cuda").cpu()
    assert found.isfinite().all() and found.double().abs().max() <= 2**57 and found.bool().all(), found
print(0)
"""
    assert json_from_fake_gpu(HEAD + code) == 0


MOVED = """
kept, out = torch.arange(5.0).cuda(), torch.empty(5, device="cuda")
pinned = torch.arange(5.0).pin_memory()
flag, nan = torch.tensor(False).cuda(), torch.full((3,), float("nan")).cuda()
with torch.cuda.graph(graph):
    kept.copy_(pinned, non_blocking=True)
    out.copy_(kept)
pinned += 10
again = flag.clone()
first = kept.clone().tolist()
graph.replay()
found = [first, kept.tolist(), out.tolist(), flag.item(), again.item(), nan.isfinite().all().item()]
print(json.dumps(found))
"""


def test_with_copies_values_survive_and_replays_copy():
    before, after = [0.0, 1.0, 2.0, 3.0, 4.0], [10.0, 11.0, 12.0, 13.0, 14.0]
    found = json_from_fake_gpu(HEAD + MOVED, copies=True)
    assert found == [before, after, after, False, False, True]


def test_memory_ends_where_an_h200s_does():
    code = """
held = torch.empty(100 << 30, dtype=torch.uint8, device="cuda")
try: torch.empty(50 << 30, dtype=torch.uint8, device="cuda")
except torch.OutOfMemoryError: print("full")
del held
torch.empty(138 << 30, dtype=torch.uint8, device="cuda"); print("fits")
"""
    assert run_on_fake_gpu(HEAD + code).splitlines() == ["full", "fits"]


def test_an_error_in_the_code_is_shown():
    with pytest.raises(AssertionError, match="ZeroDivisionError"):
        run_on_fake_gpu("1 / 0")


def test_it_is_built_into_a_folder_given(tmp_path):
    if reason := unavailable():
        pytest.skip(reason)
    folder = build(tmp_path / "here")
    assert (folder / "libcuda.so.1").exists()
    assert environment(folder=folder)["LD_PRELOAD"] == str(folder / "libcuda.so.1")


def test_no_gcc_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert unavailable() == "the fake GPU needs gcc"
    with pytest.raises(pytest.skip.Exception, match="needs gcc"):
        run_on_fake_gpu("", PATH=str(tmp_path))


def test_sources_are_small():
    assert len(SOURCES) > 4
    assert not [path.name for path in SOURCES if len(path.read_text().splitlines()) > 450]

"""Recorded calls on the do-nothing GPU: what is replayed is what the host code would do."""

from tests.helpers.fake_gpu import json_from_fake_gpu

OPERATORS = """
import gc, json, torch
from benchmarks.fake_gpu.counters import counting
import diversevit_fast as dvf
from diversevit_fast.ops.autograd import Operator
from diversevit_kernels.triton.runtime import recorded

def numbers(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="cuda", requires_grad=True)

def to_second_order(f, *inputs):
    def job():
        y = f(*inputs)
        y = y if isinstance(y, torch.Tensor) else y[0]
        first = torch.autograd.grad(y, inputs, torch.ones_like(y), create_graph=True)
        torch.autograd.grad(first, inputs, list(map(torch.ones_like, first)), allow_unused=True)
    return job

def jobs(B=2, N=5, H=3, d=16, dtype=torch.float32):
    D = H * d
    qkv = numbers(B, N, 3, H, d, dtype=dtype)
    q, k, v = (x.detach().requires_grad_() for x in qkv.detach().permute(2, 0, 3, 1, 4))
    w = numbers(3, H, d, D, dtype=dtype)
    x, g, b = numbers(B, N, D, dtype=dtype), numbers(D, dtype=dtype), numbers(D, dtype=dtype)
    heads = numbers(B, H, N, D, dtype=dtype)
    kinds = [{"granularity": "token"}, {"granularity": "sample", "return_cosines": True}]
    with_use = {
        "attention": to_second_order(dvf.attention, q, k, v),
        "causal": to_second_order(lambda *x: dvf.attention(*x, is_causal=True), q, k, v),
        "dropout": to_second_order(lambda *x: dvf.attention(*x, dropout_p=0.1), q, k, v),
        "packed": to_second_order(dvf.attention_qkvpacked, qkv),
        "packed, one query": to_second_order(lambda x: dvf.attention_qkvpacked(x, queries=1), qkv),
        "layer_norm": to_second_order(lambda *y: dvf.layer_norm(y[0], D, *y[1:]), x, g, b),
        "gelu": to_second_order(dvf.gelu, x),
    }
    for i, kind in enumerate(kinds):
        with_use[f"head_penalty {i}"] = to_second_order(lambda g, kind=kind: dvf.head_penalty(g, **kind), heads)
        with_use[f"routed {i}"] = to_second_order(lambda *y, kind=kind: dvf.routed_head_penalty(*y, **kind), qkv, w)
    return with_use

def recordings():
    return {o._operator._name: o._replayed for o in gc.get_objects() if isinstance(o, Operator) and o._replayed}
"""


def in_a_process(code: str):
    """What ``code`` leaves in ``result``."""
    return json_from_fake_gpu(OPERATORS + code + "\nprint(json.dumps(result))")


def test_every_operator_is_replayed_and_by_the_same_launches():
    """A second call finds the recording, and another recording of it, of other tensors, is equal."""
    result = in_a_process(
        """
first_calls = []
compared = dict(equal=0, different=[])
original_first = recorded.Recorded._first
def counted_first(self, key, args):
    first_calls.append(key)
    return original_first(self, key, args)
recorded.Recorded._first = counted_first
replay_of = recorded._replay_of
made = {}
def kept(recording, args, on):
    replay = replay_of(recording, args, on)
    made[replay] = recording
    return replay
recorded._replay_of = kept

for dtype in (torch.float32, torch.bfloat16):
    for job in jobs(dtype=dtype).values(): job()
recorded_calls = len(first_calls)

call = recorded.Recorded.__call__
def again(self, *args):
    replay = self._replays.get(recorded.signature(args))
    if replay is not None:
        other, _ = recorded.record(self._function, args)
        if other == made[replay]: compared["equal"] += 1
        else: compared["different"].append(str(self._function))
    return call(self, *args)
recorded.Recorded.__call__ = again
for dtype in (torch.float32, torch.bfloat16):
    for job in jobs(dtype=dtype).values(): job()
result = dict(
    recorded=recorded_calls, later=len(first_calls) - recorded_calls, **compared,
    refused=sorted({name for name, one in recordings().items() if None in one._replays.values()}),
)
"""
    )
    assert result["refused"] == []
    assert result["later"] == 0
    assert result["different"] == []
    assert result["equal"] > 40


def test_each_part_of_the_signature_makes_a_recording_of_its_own():
    made = in_a_process(
        """
from diversevit_kernels.triton.runtime import device
from diversevit_kernels.triton.attention import attention_forward
function = recorded.Recorded(attention_forward)
def call(B=2, N=64, dtype=torch.float32, skip=0, heads_first=False, causal=False):
    memory = torch.empty(3, B * N * 3 * 16 + skip, dtype=dtype, device="cuda")
    shape = (B, 3, N, 16) if heads_first else (B, N, 3, 16)
    parts = [x[skip:].view(shape) for x in memory]
    function(*(x if heads_first else x.transpose(1, 2) for x in parts), None, None, causal, 0.25, 0.0)
result = {}
def note(name):
    result[name] = len(function._replays) - sum(result.values())
call(); note("first"); call(); note("again")
call(N=80); note("shape")
call(heads_first=True); note("strides")
call(dtype=torch.bfloat16); note("dtype")
call(skip=1); note("alignment")
call(causal=True); note("option")
torch.set_float32_matmul_precision("high"); call(); note("precision")
recorded.launch.tuned = lambda plan, *rest: plan.configuration
with device.autotune(): call(); note("autotuning")
call(); note("as before")
"""
    )
    same = {"again", "as before"}
    assert made == {name: int(name not in same) for name in made}


def test_a_call_like_the_latest_is_found_without_its_signature():
    """And every difference is noticed: of what the signature tells, and of the kind of tensors."""
    found = in_a_process(
        """
import weakref
from diversevit_kernels.triton.runtime import device
from diversevit_kernels.triton.attention import attention_forward
function = recorded.Recorded(attention_forward)
def tensors(B=2, N=64, dtype=torch.float32, skip=0, grad=False):
    memory = torch.empty(3, B * N * 3 * 16 + skip, dtype=dtype, device="cuda")
    return [x[skip:].view(B, N, 3, 16).transpose(1, 2).requires_grad_(grad) for x in memory]
class Kind(torch.Tensor): pass
rest = None, None, False, 0.25, 0.0
q, k, v = tensors()
result = {"at first": function.ready(q, k, v, *rest)}
for _ in range(2): function(q, k, v, *rest)
replay = function.ready(*tensors(), *rest)
assert replay in function._replays.values()
with torch.inference_mode():
    result["inference"] = function.ready(*tensors(), *rest)
result |= {
    "shape": function.ready(*tensors(N=80), *rest),
    "strides": function.ready(q.contiguous(), k, v, *rest),
    "dtype": function.ready(*tensors(dtype=torch.bfloat16), *rest),
    "alignment": function.ready(*tensors(skip=1), *rest),
    "option": function.ready(q, k, v, None, None, True, 0.25, 0.0),
    "number": function.ready(q, k, v, None, None, False, 0.5, 0.0),
    "a tensor for none": function.ready(q, k, v, q, None, False, 0.25, 0.0),
    "device": function.ready(q.cpu(), k, v, *rest),
    "gradient": function.ready(*tensors(grad=True), *rest),
    "negated": function.ready(torch._neg_view(q), k, v, *rest),
    "zeros": function.ready(torch._efficientzerotensor(q.shape, device="cuda"), k, v, *rest),
    "subclass": function.ready(q.as_subclass(Kind), k, v, *rest),
    "parameter": function.ready(torch.nn.Parameter(q, False), k, v, *rest),
    "one tensor twice": function.ready(q, q, v, *rest),
}
torch.set_float32_matmul_precision("high")
result["precision"] = function.ready(q, k, v, *rest)
torch.set_float32_matmul_precision("highest")
with device.autotune(): result["autotuning"] = function.ready(q, k, v, *rest)
with device.pretend("sm_80"): result["pretended"] = function.ready(q, k, v, *rest)
with recorded.launch.recording(run=True): result["tool"] = function.ready(q, k, v, *rest)
assert function.ready(q, k, v, *rest) is replay
for x in (tensors(grad=True), tensors(), tensors(grad=True)):  # in turn: each is told by a guard of its own
    function(*x, *rest)
    assert function.ready(*x, *rest) is replay
dead = weakref.ref(q)
del q, x
result["memory"] = dead()
result = {name: one for name, one in result.items() if one is not None}
result = list(result)
"""
    )
    assert found == []


def test_nobody_who_looks_on_is_passed_by():
    """Hooks of Triton's, tools and tests see every launch and allocation, those of recorded calls too."""
    seen = in_a_process(
        """
import triton
from diversevit_kernels.triton.runtime import device, launch, tensors
x = numbers(4, 64)
job = to_second_order(dvf.gelu, x)
for _ in range(3): job()
result = {}
with launch.recording(run=True) as launches: job()
result["recording"] = len(launches)
with device.pretend("sm_80"), launch.recording(run=False) as launches: job()
result["pretend"] = len(launches)
allocations = []
tensors.allocator = lambda *shape, **kind: allocations.append(shape) or torch.empty(*shape, **kind)
job()
tensors.allocator = torch.empty
result["allocator"] = len(allocations)
with dvf.use_backend("reference"), counting() as found: job()
result["no launch on another backend"] = int(found["triton"] == 0)
with dvf.use_backend("triton"), counting() as found: job()
result["triton"] = found["triton"] - 2
names = []
triton.knobs.runtime.launch_enter_hook.add(lambda metadata: names.append(metadata))
job()
result["hook"] = len(names)
"""
    )
    assert seen == {
        **{"recording": 1, "pretend": 1, "allocator": 2, "no launch on another backend": 1},
        **{"triton": 1, "hook": 1},
    }


def test_a_dispatch_mode_sees_operators_whose_calls_are_replayed():
    seen = in_a_process(
        """
from torch.utils._python_dispatch import TorchDispatchMode
job = jobs()["attention"]
for _ in range(3): job()
result = []
class Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result.append(func._schema.name)
        return func(*args, **(kwargs or {}))
with Watch(): job()
result = [name for name in result if name.startswith("diversevit")]
"""
    )
    names = ["attention", "attention_backward", "attention_double_backward"]
    assert seen == [f"diversevit::{name}" for name in names]


def test_a_backend_that_cannot_run_there_is_refused_for_recorded_calls_too():
    result = in_a_process(
        """
from diversevit_fast.errors import UnsupportedError
q, k, v = (torch.empty(2, 3, 64, 16, device="cuda") for _ in range(3))
for _ in range(2): dvf.attention(q, k, v)
try:
    with dvf.use_backend("cpu"): dvf.attention(q, k, v)
except UnsupportedError as refusal:
    result = str(refusal)
else:
    result = "ran"
"""
    )
    assert "backend 'cpu' runs on cpu tensors, not on cuda" in result


def test_pointers_of_a_replay_are_those_of_its_call():
    """Inputs that share one memory in the recorded call, and lie apart in the next."""
    result = in_a_process(
        """
from diversevit_kernels.triton.attention import attention_forward
function = recorded.Recorded(attention_forward)
together = torch.empty(3, 2, 3, 64, 16, device="cuda")
for _ in range(2): function(*together, None, None, False, 0.25, 0.0)
apart = [torch.empty(2, 3, 64, 16, device="cuda") for _ in range(3)]
(replay,) = function._replays.values()
seen = []
replay.__globals__["launch0"] = lambda *args: seen.append(args[-1])
o, softmax = replay(*reversed(apart), None, None, False, 0.25, 0.0)
pointers = [x for x in seen[0] if isinstance(x, int) and x > 1 << 32]
result = [pointers, [x.data_ptr() for x in (*reversed(apart), softmax, o)]]
"""
    )
    got, wanted = result
    assert sorted(got) == sorted(wanted)
    assert got[:3] == wanted[:3]


def test_a_replay_reads_the_seed_of_its_call():
    """In all orders, and Triton compiles nothing for another probability: it would for a multiple of 16."""
    result = in_a_process(
        """
from diversevit_kernels.common.contracts import AttentionBackward, AttentionDoubleBackward
from diversevit_kernels.triton import attention
from diversevit_kernels.triton.attention import backward, double_backward, forward
q, k, v, o, do, dq = torch.empty(6, 2, 3, 64, 16, device="cuda")
softmax = torch.empty(2, 3, 2, 64, device="cuda")
def calls(seed, p):
    first = q, k, v, None, seed, o, softmax, do
    yield q, k, v, None, seed, False, 0.25, p
    yield *first, False, 0.25, p, False
    yield *first, dq, q, k, v, None, False, 0.25, p, False
functions = [
    recorded.Recorded(attention.attention_forward),
    recorded.Recorded(lambda *x: attention.attention_backward(AttentionBackward(*x))[:3]),
    recorded.Recorded(lambda *x: attention.attention_double_backward(AttentionDoubleBackward(*x))[:3]),
]
found = [x for module in (forward, backward, double_backward) for x in vars(module).values()]
kernels = {x for x in found if hasattr(x, "device_caches")}
def compiled():
    return sum(len(one[0]) for kernel in kernels for one in kernel.device_caches.values())
result = {"seeds": [], "compiled": []}
for p in (0.1, 0.5, 0.25, 0.75, 1e-11):
    for _ in range(2):
        seed = torch.empty(1, dtype=torch.int64, device="cuda")
        for f, args in zip(functions, calls(seed, p)): f(*args)
    result["compiled"].append(compiled())
other = torch.empty(1, dtype=torch.int64, device="cuda")
for f, args in zip(functions, calls(other, 0.5)):
    replay = f._replays[recorded.signature(args)]
    launches = [name for name in replay.__globals__ if name.startswith("launch")]
    seen = []
    for name in launches: replay.__globals__[name] = lambda *args: seen.append(args[-1])
    replay(*args)
    result["seeds"].append([len(launches), sum(other.data_ptr() in x for x in seen)])
"""
    )
    assert result["seeds"] == [[1, 1], [2, 2], [2, 2]]
    assert len(set(result["compiled"])) == 1
    assert result["compiled"][0] == 5


def test_what_does_more_than_allocate_and_launch_is_not_recorded():
    result = in_a_process(
        """
from diversevit_kernels.triton.gelu import gelu_forward
function = recorded.Recorded(lambda x: gelu_forward(x, "none").add_(1))
x = numbers(4, 64).detach()
result = []
for _ in range(3):
    with counting() as found: function(x)
    result.append([found["triton"], found["kernels"]])
result.append(list(function._replays.values()))
"""
    )
    assert result == [[1, 1], [1, 1], [1, 1], [None]]


def test_kernels_start_on_the_device_of_their_tensors():
    result = in_a_process(
        """
recorded._several_devices = lambda: True
devices, current = [], 1
class device:
    def __init__(self, of): self.of = of
    def __enter__(self):
        global current
        devices.append(self.of.index)
        self.before, current = current, self.of.index
    def __exit__(self, *_):
        global current
        current = self.before
torch.cuda.device, torch.cuda.current_device = device, lambda: current
x = numbers(4, 64).detach()
with dvf.use_backend("triton"):
    for _ in range(3): dvf.gelu(x)
result = [devices, current]
"""
    )
    assert result == [[0, 0, 0], 1]


def test_a_replay_is_captured_into_a_graph():
    result = in_a_process(
        """
x = numbers(4, 64)
job = to_second_order(dvf.gelu, x)
stream = torch.cuda.Stream()
with torch.cuda.stream(stream):
    for _ in range(3): job()
graph = torch.cuda.CUDAGraph()
with counting() as eager: job()
with counting() as captured:
    with torch.cuda.graph(graph, stream=stream): job()
with counting() as replayed: graph.replay()
result = [eager["triton"], captured["triton"], captured["refused"], replayed["triton"]]
"""
    )
    assert result[0] == result[1] == 1
    assert result[2] == 0
    assert result[3] == 0


def test_dropout_costs_one_launch_and_no_wait_and_is_drawn_in_a_graph():
    """The seed's own kernel; a replay runs it too, with the generator's new state, which PyTorch writes before."""
    result = in_a_process(
        """
every, stream, result = jobs(), torch.cuda.Stream(), {}
for name in ("attention", "dropout"):
    job, graph = every[name], torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        for _ in range(3): job()
    with counting() as eager: job()
    with torch.cuda.graph(graph, stream=stream): job()
    with counting() as replay: graph.replay()
    result[name] = [eager["triton"] + eager["kernels"], eager["waits"], replay["replayed"], replay["waits"]]
"""
    )
    launches, _, replayed, _ = result["attention"]
    assert result["dropout"] == [launches + 1, 0, replayed + 1, 0]

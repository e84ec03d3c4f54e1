"""Which steps can be captured as a CUDA graph, on a GPU that computes nothing; what replays launch and wait for."""

from tests.helpers.fake_gpu import json_from_fake_gpu

HEAD = """
import json, warnings
import torch, diversevit_fast as dvf
from torch.nn import functional as F
from benchmarks.fake_gpu.counters import counting
from diversevit_fast.models import DiverseViT
warnings.simplefilter("error")
warnings.simplefilter("ignore", DeprecationWarning)  # Triton compiles with some on Python 3.13
torch.backends.cudnn.enabled = False
torch.backends.cuda.enable_cudnn_sdp(False)
images, labels = torch.rand(8, 3, 16, 8, device="cuda"), torch.arange(8, device="cuda") % 2
told = {}
sizes = {"dim": 32, "depth": 2, "num_heads": 2, "head_dim": 16, "mlp_dim": 32, "image_size": (16, 8)}
def training(optimizer, inside=lambda logits: None, **options):
    own = {k: options.pop(k) for k in ("amp", "clip", "scaler", "accumulate") if k in options}
    model = DiverseViT(**sizes).cuda()
    diversity = dvf.HeadDiversity(model, **options)
    def loss(images, labels):
        with diversity:
            logits = model(images)
        inside(logits)
        return F.cross_entropy(logits, labels) + 100 * diversity.penalty(logits), logits
    return dvf.graph_step(loss, optimizer(model.parameters()), diversity=diversity, **own)
def attempt(name, optimizer, batch=(images, labels), **options):
    try:
        step = training(optimizer, **options)
        for _ in range(4): step(*batch)
        with counting() as found: step(*batch)
        told[name] = [step.graphs, found["replays"], found["waits"]]
    except Exception as error:
        told[name] = f"{type(error).__name__}: {error}".splitlines()[0]
def adam(p): return torch.optim.Adam(p)
def fused(p): return torch.optim.Adam(p, fused=True)
"""

CAPTURED = {
    "adam": "adam",
    "adamw fused": "lambda p: torch.optim.AdamW(p, fused=True), layers='all'",
    "sgd": "lambda p: torch.optim.SGD(p, momentum=0.9)",
    "sgd fused": "lambda p: torch.optim.SGD(p, momentum=0.9, fused=True)",
    "bfloat16": "adam, amp=torch.bfloat16, clip=1.0",
    "every": "adam, every=2",
    "fraction": "adam, fraction=0.5",
    "fraction, cpu": "adam, fraction=0.5, generator=torch.Generator()",
    "fraction, gpu": "adam, fraction=0.5, generator=torch.Generator('cuda')",
    "float16": "adam, amp=torch.float16, grad_scale=1024.0",
    "scaler": "fused, amp=torch.float16, scaler=torch.amp.GradScaler('cuda'), clip=1.0",
    "parts": "adam, accumulate=2",
    "batches of the cpu": "adam, batch=(images.cpu(), labels.cpu())",
    "dropout": "adam, inside=lambda logits: F.dropout(logits)",
}

REFUSED = {
    "adagrad": ("torch.optim.Adagrad", "UnsupportedError: optimizer: Adagrad keeps 'step' on the host"),
    "lbfgs": ("torch.optim.LBFGS", "UnsupportedError: optimizer: LBFGS evaluates the loss"),
    "sparse": ("lambda p: torch.optim.SparseAdam(list(p))", "UnsupportedError: optimizer: SparseAdam"),
    "scaler": ("adam, amp=torch.float16, scaler=torch.amp.GradScaler('cuda')", "UnsupportedError: scaler: Adam"),
    "float16": ("adam, amp=torch.float16", "UnsupportedError: float16: a CUDA graph cannot try"),
    "item": ("adam, inside=lambda x: x.sum().item()", "UnsupportedError: loss: <code>:LINE waits for the GPU"),
    "synchronize": ("adam, inside=lambda x: torch.cuda.synchronize()", "waits for the GPU"),
    "host": ("adam, inside=lambda x: torch.rand(3)", "UnsupportedError: loss: draws random numbers on the CPU"),
    "error": ("adam, inside=lambda x: {}['mine']", "KeyError: 'mine'"),
    "constant": ("adam, batch=(images, {1})", "UsageError: batch: expected tensors and constants, got set"),
}  # fmt: skip


def test_what_can_be_captured():
    """One graph, or with ``every`` two; a replay launches it and waits for nothing."""
    attempts = "\n".join(f"attempt({name!r}, {how})" for name, how in CAPTURED.items())
    told = json_from_fake_gpu(HEAD + attempts + "\nprint(json.dumps(told))")
    assert told == {name: [1 + (name == "every"), 1, 0] for name in CAPTURED}


def test_what_is_refused_and_that_captures_work_after_it():
    attempts = "\n".join(f"attempt({name!r}, {how})" for name, (how, _) in REFUSED.items())
    line = (HEAD + attempts).split("\n").index(f"attempt('item', {REFUSED['item'][0]})") + 1
    code = HEAD + attempts + "\nattempt('after', adam)\nprint(json.dumps(told))"
    told = json_from_fake_gpu(code)
    assert told.pop("after") == [1, 1, 0]
    assert {
        n for n, (_, said) in REFUSED.items() if said.replace("LINE", str(line)) not in str(told[n])
    } == set(), told


HAND = """
warnings.simplefilter("ignore")  # that the captures refused are empty
def by_hand(name, **options):
    model = DiverseViT(dim=32, depth=2, num_heads=2, head_dim=16, mlp_dim=32, image_size=(16, 8)).cuda()
    diversity = dvf.HeadDiversity(model, **options)
    def step():
        with diversity:
            logits = model(images)
        (F.cross_entropy(logits, labels) + diversity.penalty(logits)).backward()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2): step()
    told[name] = "captured"
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=side):
        try: step()
        except dvf.UnsupportedError as error: told[name] = str(error)
by_hand("every", every=2)
by_hand("cpu", fraction=0.5, generator=torch.Generator())
by_hand("gpu", fraction=0.5)
by_hand("all")
print(json.dumps(told))
"""


def test_captures_by_hand_that_would_be_silently_wrong():
    told = json_from_fake_gpu(HEAD + HAND)
    assert told["every"].startswith("every: a captured CUDA graph repeats one step")
    assert told["cpu"].startswith("fraction: samples drawn by a CPU generator")
    assert "dvf.graph_step" in told["every"]
    assert told["gpu"] == told["all"] == "captured"


ALIVE = """
import gc
from functools import partial
torch.cuda.graph = partial(torch.cuda.graph, check_input_liveness=True)  # a replay that reads freed memory raises
model = DiverseViT(**sizes).cuda()
weight = torch.ones((), device="cuda", requires_grad=True)
def loss(images, labels): return weight * F.cross_entropy(model(images), labels)
blocks = torch.optim.SGD(model.blocks.parameters(), lr=0.1, momentum=0.9)
others = torch.optim.AdamW([p for name, p in model.named_parameters() if "blocks" not in name])
steps = [dvf.graph_step(loss, optimizer) for optimizer in (blocks, others)]
for i in range(5):
    for step in steps:
        step(images, labels)
        weight.grad = None
        model.zero_grad()
        gc.collect()
    if i == 2:
        for state in blocks.state.values(): state["momentum_buffer"] = state["momentum_buffer"].clone()
print(json.dumps([step.graphs for step in steps]))
"""


def test_replays_read_nothing_that_was_freed():
    """Two steps on one model; gradients of what no optimizer holds; state of the optimizer that is replaced."""
    assert json_from_fake_gpu(HEAD + ALIVE, copies=True) == [1, 1]


PLACES = """
outside = torch.cuda.current_stream()
def only_in_captures(logits):
    if torch.cuda.is_current_stream_capturing(): torch.cuda.synchronize()
attempt("spoilt", adam, inside=only_in_captures)
told["stream"] = torch.cuda.current_stream() == outside
model = torch.nn.Linear(3, 2)
seen = []
def loss(x):
    seen.append(str(model(x).dtype))
    return model(x).sum()
step = dvf.graph_step(loss, torch.optim.SGD(model.parameters()), amp=torch.bfloat16)
told["moved"] = []
for device in ("cpu", "cuda", "cpu", "cuda"):
    model.to(device)
    step(torch.ones(1, 3, device=device))
    told["moved"].append([step.graphs, seen[-1]])
print(json.dumps(told))
"""


def test_where_steps_run():
    """After a capture that fails at its end the stream is the user's; a model may be moved after the step was made."""
    told = json_from_fake_gpu(HEAD + PLACES, copies=True)
    assert "waits for the GPU" in told["spoilt"]
    assert told["stream"]
    assert told["moved"] == [[n, "torch.bfloat16"] for n in (0, 1, 0, 1)]


COMPILED = """
model = DiverseViT(dim=32, depth=3, num_heads=2, head_dim=16, mlp_dim=32, image_size=(16, 8)).cuda()
model.blocks[0] = torch.compile(model.blocks[0])
diversity = dvf.HeadDiversity(model)
def loss(images, labels):
    with diversity:
        logits = model(images)
    return F.cross_entropy(logits, labels) + diversity.penalty(logits)
step = dvf.graph_step(loss, torch.optim.AdamW(model.parameters()), diversity=diversity)
warnings.simplefilter("ignore")  # of the compiler, about this machine
for _ in range(3): step(images, labels)
model.eval()
step(images, labels)
with counting() as found: step(images, labels)
print(json.dumps([step.graphs, found["replays"], found["waits"]]))
"""


def test_a_compiled_block_below():
    """It is compiled in the warm-up, for neither hooks nor modes of ours run in a capture."""
    assert json_from_fake_gpu(HEAD + COMPILED) == [2, 1, 0]


OVERFLOW = """
diversity = dvf.HeadDiversity(DiverseViT(**sizes).cuda(), grad_scale=4096.0)
def loss(images, labels):
    with diversity:
        logits = diversity.model(images)
    return F.cross_entropy(logits, labels) + diversity.penalty(logits)
optimizer = adam(diversity.model.parameters())
step = dvf.graph_step(loss, optimizer, diversity=diversity, amp=torch.float16)
for _ in range(3): step(images, labels)
flags = list(diversity._finite._seen.values())
with counting() as found: step(images, labels)
flags[-1].host.fill_(float("inf"))  # as a replay's copy would
try: step(images, labels)
except dvf.UnsupportedError as error: told["error"] = str(error)
print(json.dumps(told | {"flags": len(flags), "waits": found["waits"]}))
"""


def test_gradients_that_overflow_in_a_replay():
    """Their flag is copied to pinned memory by each replay, and read there by the next step."""
    told = json_from_fake_gpu(HEAD + OVERFLOW)
    assert (told["flags"], told["waits"]) == (2, 0)
    assert told["error"].startswith(
        "float16: the gradients of the heads overflowed with grad_scale 4096"
    )


COMPILED_LOSS = """
warnings.simplefilter("ignore")  # of the compiler, about this machine
model = DiverseViT(**sizes).cuda()
diversity = dvf.HeadDiversity(model)
def loss(model, images, labels):
    with diversity:
        logits = model(images)
    return F.cross_entropy(logits, labels) + diversity.penalty(logits)
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
by_compiler = dvf.compile_loss(loss, mode="reduce-overhead")
def plainly():
    optimizer.zero_grad()
    by_compiler(model, images, labels).backward()
    optimizer.step()
compiled = dvf.compile_loss(loss)
step = dvf.graph_step(lambda *batch: compiled(model, *batch), optimizer)
for name, job in {"reduce-overhead": plainly, "graph_step": lambda: step(images, labels)}.items():
    for _ in range(4): job()
    with counting() as found: job()
    told[name] = [found["replays"], found["waits"], found["triton"] + found["gemms"]]
print(json.dumps(told))
"""


def test_a_compiled_loss():
    """Its forward and its backward are a graph each with ``mode="reduce-overhead"``; in ``graph_step`` all is one."""
    told = json_from_fake_gpu(HEAD + COMPILED_LOSS)
    assert told == {"reduce-overhead": [2, 0, 0], "graph_step": [1, 0, 0]}


def test_an_earlier_loss_that_is_still_there():
    """Its graph belongs to the user's stream; the gradients' nodes with it."""
    code = """
model = torch.nn.Linear(3, 2).cuda()
kept = model(torch.ones(1, 3, device="cuda")).sum()
kept.backward()
step = dvf.graph_step(lambda x: model(x).sum(), torch.optim.SGD(model.parameters(), lr=0.1))
for _ in range(3): step(torch.ones(1, 3))
with counting() as found: step(torch.ones(1, 3))
print(json.dumps([step.graphs, found["replays"]]))
"""
    assert json_from_fake_gpu(HEAD + code) == [1, 1]


def test_memory_for_one_step_at_a_time():
    """A graph's memory is its own; where the optimizer's state is new, no step runs beside it."""
    code = """
def reserved(graph):
    torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats()
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(20))).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.ones(100_000, 64, device="cuda")
    def step():
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    if graph: captured = dvf.graph_step(lambda x: model(x).sum(), optimizer)
    for _ in range(3): captured(x) if graph else step()
    return torch.cuda.max_memory_reserved()
reserved(False)
print(json.dumps([reserved(False), reserved(True)]))
"""
    plain, captured = json_from_fake_gpu(HEAD + code)
    assert captured < 1.3 * plain

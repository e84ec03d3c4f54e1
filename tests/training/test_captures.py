"""Which steps can be captured as a CUDA graph, on a GPU that computes nothing; what replays launch and wait for."""

from tests.helpers.fake_gpu import json_from_fake_gpu

HEAD = """
import json, warnings
import torch, diversevit_fast as dvf
from torch.nn import functional as F
from benchmarks.fake_gpu.counters import counting
from diversevit_fast.models import DiverseViT
warnings.simplefilter("error")
torch.backends.cudnn.enabled = False
torch.backends.cuda.enable_cudnn_sdp(False)
images, labels = torch.rand(8, 3, 16, 8, device="cuda"), torch.arange(8, device="cuda") % 2
told = {}
def training(optimizer, inside=lambda logits: None, **options):
    own = {k: options.pop(k) for k in ("amp", "clip", "scaler", "accumulate") if k in options}
    sizes = {"dim": 32, "depth": 2, "num_heads": 2, "head_dim": 16, "mlp_dim": 32, "image_size": (16, 8)}
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

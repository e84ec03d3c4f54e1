"""What is counted without memory is what a step does: the same calls, bytes and births of storages as a real one."""

from collections import Counter

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import diversevit_fast as dvf
from diversevit_fast.cost.counting import StepCounter
from diversevit_fast.cost.step import take_step
from diversevit_kernels.cpu.attention import work as attention_work

BATCH = 3


def vit(**options):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}
    sizes["num_classes"] = 5
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **options})


def real_step(model, diversity, dtype=torch.float32, counter=None):
    """A step on numbers, counted after one that makes the optimizer's state."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    kept = penalty_of(model, diversity)
    batch = torch.rand(BATCH, 3, 32, 32), torch.arange(BATCH) % 2
    counter = counter or StepCounter()
    memory = counter.memory
    memory.add([*model.parameters(), *model.buffers()], "parameters")
    state = [x for s in optimizer.state.values() for x in s.values()]
    memory.add(state, "optimizer state")
    memory.add(batch, "batch")
    with counter:
        take_step(model, kept, batch, dtype, optimizer, counter)
    return counter


def penalty_of(model, options):
    return None if options is None else dvf.HeadDiversity(model, **options)


STEPS = {
    "erm": None,
    "last": {"layers": "last"},
    "all": {"layers": "all"},
    "list": {"layers": [0, -1]},
    "output": {"layers": "last", "wrt": "output"},
    "sample": {"layers": "all", "granularity": "sample"},
    "fraction": {"layers": "all", "fraction": 0.5},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_the_same_as_a_real_step(name, dtype):
    found = dvf.cost(vit(), STEPS[name], batch=BATCH, dtype=dtype)
    real = real_step(vit(), STEPS[name], dtype)
    assert found.calls == {call: float(n) for call, n in real.calls.items()}
    assert found.peak == real.memory.peak()


def test_pytorchs_own_counter_knows_the_operators():
    """Attention multiplies twice, five times and twelve times, whoever counts."""
    q, k, v = (torch.randn(2, 3, 17, 8, requires_grad=True) for _ in range(3))
    with FlopCounterMode(display=False) as counted:
        inner = torch.autograd.grad(
            dvf.attention(q, k, v).square().sum(), (q, k, v), create_graph=True
        )
        sum(g.square().sum() for g in inner).backward()
    one = 2 * 2 * 3 * 17 * 17 * 8
    assert counted.get_total_flops() == (2 + 5 + 12 + 5) * one


def test_products_of_a_step_without_penalty():
    """Every linear layer multiplies three times, the first one, of the images, twice."""
    B, N, D, depth, classes = BATCH, 17, 48, 2, 5
    linear = depth * (3 + 1 + 4 + 4) * D * D * N + classes * D
    patches = 16 * D * 3 * 8 * 8
    found = dvf.cost(vit(), batch=B).flops["matrix products"]
    assert found == 2 * B * (3 * linear + 2 * patches)


def test_a_kernel_that_multiplies_more_costs_more(monkeypatch):
    from diversevit_fast.ops import work

    before = dvf.cost(vit(), "all", batch=BATCH).flops
    monkeypatch.setattr(work, "_found", {})
    twice = attention_work.attention_double_backward

    def more(inputs):
        found = twice(inputs)
        return found._replace(products=2 * found.products)

    monkeypatch.setattr(attention_work, "attention_double_backward", more)
    after = dvf.cost(vit(), "all", batch=BATCH).flops
    kind = "attention double backward"
    assert after.pop(kind) == 2 * before.pop(kind)
    assert after == before
    monkeypatch.setattr(work, "_found", {})


def test_every_is_a_mean_and_the_largest_memory():
    one, none = (dvf.cost(vit(), d, batch=BATCH) for d in ("all", None))
    found = dvf.cost(vit(), {"layers": "all", "every": 4}, batch=BATCH)
    for kind, n in found.flops.items():
        assert n == pytest.approx(0.25 * one.flops[kind] + 0.75 * none.flops[kind])
    assert found.peak == max(one.peak, none.peak)


def test_a_hybrid_takes_what_its_stem_takes():
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_r_s16_p8_224", num_classes=5)
    assert dvf.cost(model, batch=2).spec.sample.shape == (3, 224, 224)


def test_checkpoints_compute_again_and_keep_less():
    model = vit(img_size=64, depth=6)
    plain = dvf.cost(model, "last", batch=16)
    again = dvf.cost(model, "last", batch=16, checkpointing=True)
    assert again.peak.parts["activations"] < 0.6 * plain.peak.parts["activations"]
    assert again.flops["matrix products"] > plain.flops["matrix products"]


def test_a_context_that_keeps_what_checkpoints_compute_again():
    model = vit(img_size=64, depth=6)
    options = {"layers": "all", "checkpoint_blocks": False, "check_finite": False}
    wanted = dvf.cost(model, options, batch=16, checkpointing=True)
    found = dvf.cost(model, dvf.HeadDiversity(model, **options), batch=16, checkpointing=True)
    assert found.peak == wanted.peak
    assert found.launches == wanted.launches
    assert found.peak_bytes > dvf.cost(model, "all", batch=16, checkpointing=True).peak_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [None, "last", "all"])
def test_checkpoints_on_a_gpu_that_is_not_there(layers, dtype):
    """What is computed again in a backward pass is seen there too: products are those of a CPU."""
    pytest.importorskip("triton")
    model, options = vit(img_size=64, depth=3), {"batch": 4, "dtype": dtype}
    plain = dvf.cost(model, layers, device="H200", **options)
    again = dvf.cost(model, layers, device="H200", checkpointing=True, **options)
    assert again.peak.parts["activations"] < plain.peak.parts["activations"]
    on_cpu = dvf.cost(model, layers, checkpointing=True, **options)
    assert again.flops["matrix products"] == on_cpu.flops["matrix products"]


def test_memory_is_made_of_its_parts():
    found = dvf.cost(vit(), "all", batch=16)
    assert sum(found.peak.parts.values()) == found.peak_bytes
    parameters = sum(p.numel() for p in vit().parameters())
    assert found.parameters == parameters
    assert found.peak.parts["parameters"] == 4 * parameters
    scalars = 4 * len(list(vit().parameters()))
    assert found.peak.parts["optimizer state"] == 2 * 4 * parameters + scalars


def test_models_stay_as_they_are():
    model = vit()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    dvf.cost(model.eval(), "all", batch=2)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_models_without_memory():
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch16_224", num_classes=10, depth=2)
    found = dvf.cost(model, "last", batch=1000)
    assert found.peak_bytes > 8 * 2**30


@pytest.mark.parametrize("device", ["A100", "H200", "MI300X"])
def test_a_gpu_that_is_not_there(device):
    pytest.importorskip("triton")
    options = {"batch": 8, "dtype": torch.bfloat16, "device": device}
    found = dvf.cost(vit(embed_dim=96), "all", **options)
    plain = dvf.cost(vit(embed_dim=96), **options)
    narrow = Counter(call.dtype for call in plain.calls if call.kind == "matrix products")
    assert narrow["bfloat16"] > 0.9 * narrow.total()
    assert {call.name for call in found.calls} >= {"native_layer_norm", "gelu_backward"}
    assert any("flash_attention" in call.name for call in plain.calls)
    assert found.flops["attention double backward"] > 0 == plain.flops["attention double backward"]
    assert plain.peak_bytes < found.peak_bytes
    assert not torch.empty(0).is_cuda  # nothing stays behind
    assert torch.autocast("cpu", torch.bfloat16).device == "cpu"

"""Calls like those that passed the checks are not checked again, and every other one is."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

import diversevit_fast as dvf
from diversevit_fast.errors import UsageError
from diversevit_fast.ops import reference
from diversevit_fast.ops.checks import Passed
from tests.helpers.fake_gpu import json_from_fake_gpu

x, w, b = torch.randn(2, 5, 8), torch.randn(8), torch.randn(8)


@pytest.fixture(autouse=True)
def nothing_passed(monkeypatch):
    """Each test begins with nothing known; returns what is found where calls ask."""
    found = []
    original = Passed.find

    def find(self, *args):
        found.append(original(self, *args))
        return found[-1]

    monkeypatch.setattr(Passed, "find", find)
    for name in ("layer_norm", "attention"):
        module = __import__(f"diversevit_fast.ops.{name}", fromlist=[name])
        monkeypatch.setattr(module, "_passed", Passed())
    return found


def test_layer_norm(nothing_passed):
    for _ in range(3):
        torch.testing.assert_close(dvf.layer_norm(x, 8, w, b), F.layer_norm(x, (8,), w, b))
    assert nothing_passed == [None, True, True]
    bad = [
        (x.long(), 8, w, b),
        (x, 5, w, b),
        (x, 8, w[:7], b),
        (x, 8, w.half(), b),
        (x, 8, w, b[None]),
    ]
    bad += [
        (x, 8, w.to_sparse(), b),
        (x, 8, w.to("meta"), b),
        (x, 8, w, [1.0] * 8),
        (x.half(), 8, w, b.half()),
    ]
    for args in bad:
        with pytest.raises(UsageError):
            dvf.layer_norm(*args)
    for args in [
        (x.double(), 8, w.double(), b.double()),
        (x.mT.contiguous().mT, 8, b, w),
        (x[:1], 8, w, b),
    ]:
        for _ in range(2):
            wanted = F.layer_norm(args[0], (8,), *args[2:])
            torch.testing.assert_close(dvf.layer_norm(*args), wanted)
    torch.testing.assert_close(dvf.layer_norm(x, 8, w), F.layer_norm(x, (8,), w))
    torch.testing.assert_close(dvf.layer_norm(x, 8, w, w), F.layer_norm(x, (8,), w, w))


def test_attention(nothing_passed):
    q, k, v = torch.randn(3, 2, 3, 5, 8).unbind()
    sdpa = F.scaled_dot_product_attention
    for _ in range(3):
        torch.testing.assert_close(dvf.attention(q, k, v), sdpa(q, k, v))
    assert nothing_passed == [None, (False, 8**-0.5, 0.0), (False, 8**-0.5, 0.0)]
    for options in [{"is_causal": True}, {"scale": 2.0}, {}]:
        for _ in range(2):
            wanted = sdpa(q, k, v, **options)
            torch.testing.assert_close(dvf.attention(q, k, v, **options), wanted)
    mask = torch.randn(5, 5)
    torch.testing.assert_close(dvf.attention(q, k, v, mask), sdpa(q, k, v, mask))
    torch.testing.assert_close(dvf.attention(q, k[:, :1], v), sdpa(q, k[:, :1], v))
    torch.testing.assert_close(dvf.attention(q[0], k[0], v[0]), sdpa(q[0], k[0], v[0]))
    torch.manual_seed(0)
    calls = [dvf.attention(q, k, v, dropout_p=0.5) for _ in range(3)]
    assert nothing_passed[-1] == (False, 8**-0.5, 0.5)
    assert not any(torch.equal(x, calls[0]) for x in calls[1:])
    torch.manual_seed(0)
    seeds = [torch.randint(2**63 - 1, (1,)) for _ in range(3)]
    wanted = [reference.attention(q, k, v, seed=seed, dropout_p=0.5) for seed in seeds]
    torch.testing.assert_close(calls, wanted)
    for bad in [
        {"dropout_p": 1.5},
        {"scale": float("nan")},
        {"is_causal": True, "attn_mask": mask},
    ]:
        with pytest.raises(UsageError):
            dvf.attention(q, k, v, **bad)
    for args in [(q, k.double(), v), (q, k, v[:, :, :4]), (q, k[..., :4], v), (q, k, v.to("meta"))]:
        with pytest.raises(UsageError):
            dvf.attention(*args)


def test_autocast_casts_what_passed_without_it():
    q, k, v = torch.randn(3, 2, 3, 5, 8).unbind()
    for _ in range(2):
        assert dvf.attention(q, k, v).dtype == torch.float32
        with torch.autocast("cpu"):
            assert dvf.attention(q, k, v).dtype == torch.bfloat16


def test_autocast_on_a_gpu_casts_what_passed_without_it():
    found = json_from_fake_gpu(
        """
import json, torch
import diversevit_fast as dvf
x, w, b = (torch.empty(*shape, 8, device="cuda", dtype=torch.bfloat16) for shape in ((2, 5), (), ()))
q, k, v = (torch.empty(2, 3, 64, 16, device="cuda") for _ in range(3))
result = []
for _ in range(2):
    for enabled in (False, True):
        with torch.autocast("cuda", enabled=enabled):
            results = dvf.layer_norm(x, 8, w, b), dvf.attention(q, k, v)
            result.append([str(y.dtype) for y in results])
print(json.dumps(result))
"""
    )
    plain, cast = ["torch.bfloat16", "torch.float32"], ["torch.float32", "torch.float16"]
    assert found == [plain, cast, plain, cast]


def test_what_passed_is_known_neither_to_compilers_nor_in_forward_mode():
    f = torch.compile(lambda x: dvf.layer_norm(x, 8, w, b), backend="eager", fullgraph=True)
    for _ in range(2):
        dvf.layer_norm(x, 8, w, b)
    torch.testing.assert_close(f(x), F.layer_norm(x, (8,), w, b))
    _, along = torch.func.jvp(lambda x: dvf.layer_norm(x, 8, w, b), (x,), (x,))
    _, wanted = torch.func.jvp(lambda x: F.layer_norm(x, (8,), w, b), (x,), (x,))
    torch.testing.assert_close(along, wanted)


def test_few_kinds_are_kept_and_none_of_modes():
    passed = Passed()

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Mode():
        passed.add("a mode", 0, x)
    passed.add("a tensor of another class", 0, TwoTensor(x, x))
    passed.add("one tensor twice", 0, x, x)
    for n in range(2 * Passed.MOST):
        passed.add(n, n, x)
    found = [passed.find(n, torch.zeros(2, 5, 8)) for n in range(2 * Passed.MOST)]
    assert found == [*range(Passed.MOST), *[None] * Passed.MOST]

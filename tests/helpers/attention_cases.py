"""Shapes, masks and layouts of attention, and how results of its three orders are judged."""

import importlib
from typing import NamedTuple

import torch
from hypothesis import strategies as st

import diversevit_fast as dvf
from diversevit_fast.ops import reference
from diversevit_fast.testing import assert_within_budget
from diversevit_kernels.common.contracts import AttentionBackward, AttentionDoubleBackward
from diversevit_kernels.cpu.attention import blocked

ops = importlib.import_module("diversevit_fast.ops.attention")


class Case(NamedTuple):
    """Sizes; ``Hkv`` key heads; ``mask``: none, causal, or a kind of mask; ``layout``: of q, k, v; ``dropout``: p."""

    B: int = 1
    H: int = 2
    Hkv: int = 2
    Nq: int = 4
    Nk: int = 4
    d: int = 2
    dv: int = 2
    mask: str = "none"
    layout: str = "dense"
    scale: float = 0.4
    dropout: float = 0.0


CASES = {
    "plain": Case(B=2),
    "one-query": Case(Nq=1, Nk=7),
    "more-queries": Case(Nq=5, Nk=3, dv=3),
    "one-token": Case(Nq=1, Nk=1, d=1, dv=1),
    "causal": Case(mask="causal", Nq=4, Nk=6),
    "causal-more-queries": Case(mask="causal", Nq=6, Nk=4),
    "bool-mask": Case(mask="bool", Nk=6),
    "empty-row": Case(mask="empty-row"),
    "additive-full": Case(mask="additive"),
    "additive-broadcast": Case(mask="broadcast", B=2),
    "additive-shared": Case(mask="shared", B=2),
    "grouped": Case(H=4, Nq=3),
    "grouped-causal": Case(H=4, Hkv=1, Nq=3, mask="causal"),
    "grouped-mask": Case(H=4, Nq=2, mask="additive"),
    "qkv-projection": Case(layout="projection"),
    "no-dense-axis": Case(layout="slice"),
    "width-first": Case(layout="transposed"),
}

DROPOUT = {
    "plain": Case(B=2, dropout=0.3),
    "one-query": Case(B=2, Nq=1, Nk=7, dropout=0.5),
    "more-queries": Case(Nq=5, Nk=3, dv=3, dropout=0.2),
    "one-token": Case(Nq=1, Nk=1, d=1, dv=1, dropout=0.1),
    "causal": Case(mask="causal", Nq=4, Nk=6, dropout=0.4),
    "bool-mask": Case(mask="bool", Nk=6, dropout=0.4),
    "empty-row": Case(mask="empty-row", dropout=0.4),
    "additive-full": Case(mask="additive", dropout=0.4),
    "additive-broadcast": Case(mask="broadcast", B=2, dropout=0.4),
    "additive-shared": Case(mask="shared", B=2, dropout=0.4),
    "grouped-causal": Case(H=4, Hkv=1, Nq=3, mask="causal", dropout=0.4),
    "grouped-mask": Case(H=4, Nq=2, mask="additive", dropout=0.9),
    "no-dense-axis": Case(layout="slice", dropout=0.4),
    "next to nothing": Case(Nk=6, dropout=1e-11),
}
"""Cases with dropout, which a call draws after ``torch.manual_seed``, or from ``SEED``."""
SEED = 0x1234_5678_9ABC_DEF1

LAYOUTS = {
    "dense": lambda x: x,
    "projection": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "transposed": lambda x: x.mT.contiguous().mT,
    "slice": lambda x: x.repeat_interleave(2, -1).repeat_interleave(2, -2)[..., ::2, ::2],
}


def operands(case: Case, dtype=torch.float64, seed=0, device="cpu"):
    """q, k, v, mask, is_causal of a case; floating masks are to be differentiated."""
    g = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(device, dtype)

    q = make(case.B, case.H, case.Nq, case.d)
    k = make(case.B, case.Hkv, case.Nk, case.d)
    v = make(case.B, case.Hkv, case.Nk, case.dv)
    q, k, v = (LAYOUTS[case.layout](x) for x in (q, k, v))
    mask = None
    if case.mask in ("bool", "empty-row"):
        mask = torch.rand(case.B, 1, case.Nq, case.Nk, generator=g).to(device) > 0.4
        mask[..., 0] = True
        if case.mask == "empty-row":
            mask[0, 0, 1] = False
    if case.mask == "additive":
        mask = make(case.B, case.H, case.Nq, case.Nk)
    if case.mask == "broadcast":
        mask = make(case.H, 1, case.Nk)
    if case.mask == "shared":
        mask = make(case.Nq, case.Nk)
    return q, k, v, mask, case.mask == "causal"


def as_function(case, mask, causal, attend=None):
    """A function of the tensors to differentiate; each call drops the same weights."""
    attend = attend or dvf.attention
    options = {"is_causal": causal, "enable_gqa": case.Hkv != case.H}
    if attend is reference.attention:
        options = {"is_causal": causal}
        mask = mask if mask is None else ops.mask_as_samples(mask, (case.B, case.H), *SHAPED(case))
    if case.dropout:
        options["dropout_p"] = case.dropout
        attend = with_one_seed(attend)
    if mask is None or mask.dtype == torch.bool:
        return lambda q, k, v: attend(q, k, v, mask, **options)
    return lambda q, k, v, m: attend(q, k, v, m, **options)


def with_one_seed(attend):
    """``attend``, which drops the same weights at every call; the reference with the seed that ours draws."""

    def seeded(*args, **options):
        torch.manual_seed(3)
        if attend is reference.attention:
            options["seed"] = ops.drawn_seed(args[0], options["dropout_p"])
        return attend(*args, **options)

    return seeded


def SHAPED(case):
    return torch.empty(case.B, case.H, case.Nq, 1), torch.empty(case.B, case.H, case.Nk, 1)


def differentiable(q, k, v, mask):
    return (q, k, v) if mask is None or mask.dtype == torch.bool else (q, k, v, mask)


def all_orders(kernels, case, tensors):
    """All results of the three orders, mask gradients included, in order."""
    q, k, v, mask, causal = tensors
    if mask is not None:
        mask = ops.mask_as_samples(mask, (case.B, case.H), q, k)
    additive = mask is not None and mask.dtype != torch.bool
    g = torch.Generator().manual_seed(1)

    def like(x):
        return torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.device, x.dtype)

    seed = torch.tensor([SEED], device=q.device) if case.dropout else None
    options = (causal, case.scale, case.dropout)
    o, softmax = kernels.attention_forward(q, k, v, mask, seed, *options)
    do, ddq, ddk, ddv = like(o), like(q), like(k), like(v)
    ddmask = like(mask) if additive else None
    first = kernels.attention_backward(
        AttentionBackward(q, k, v, mask, seed, o, softmax, do, *options, additive)
    )
    second = kernels.attention_double_backward(
        AttentionDoubleBackward(
            *(q, k, v, mask, seed, o, softmax, do, first[0], ddq, ddk, ddv, ddmask),
            *(*options, additive),
        )
    )
    return [x for x in (o, *softmax.unbind(2), *first, *second) if x is not None]


DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def check_orders(kernels, case, dtype, seed=0, device="cpu", place=lambda x: x):
    """All orders of ``kernels`` within the error budget; ``place`` is applied to their inputs."""
    tensors = operands(case, dtype, seed, device)
    exact_inputs = [
        x.double() if x is not None and x.dtype != torch.bool else x for x in tensors[:4]
    ]
    exact = all_orders(reference, case, (*exact_inputs, tensors[4]))
    eager = all_orders(reference, case, tensors)
    placed = (
        *(x if x is None or x.dtype == torch.bool else place(x) for x in tensors[:4]),
        tensors[4],
    )
    # nested sums: over keys (or a group's queries), of scores that are sums over the head widths
    terms = max(case.Nq * case.H // case.Hkv, case.Nk) * (case.d + case.dv)
    terms = round(
        terms / (1 - case.dropout) ** 2
    )  # sums of larger numbers, of which less may remain
    if dtype == torch.float64:  # the judge has rounding of its own
        terms *= 64
    for ours, plain, truth in zip(all_orders(kernels, case, placed), eager, exact, strict=True):
        finite = torch.isfinite(truth)  # the largest score is +inf where a row attends to nothing
        assert torch.equal(torch.isfinite(ours), finite)
        assert_within_budget(*(x.where(finite, 0) for x in (ours, plain, truth)), terms=terms)


def use_tiles(patch, size):
    """Have attention on a CPU run in PyTorch's tiles of ``size`` bytes."""
    patch.setenv("DIVERSEVIT_COMPILE", "0")
    patch.setattr(blocked, "TILE_BYTES", size)


def check_contracts(kind, device="cpu", dropout=0.0):
    """Schemas, fakes and autograd registrations of the three operators, mask of a kind."""
    seed = torch.tensor([SEED], device=device) if dropout else None
    q, k, v, mask, causal = operands(Case(B=1, Nq=3, Nk=4, mask=kind), device=device)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    additive = kind == "additive"
    given = (q, k, v, mask, seed, causal, 0.5, dropout)
    o, softmax = (x.detach() for x in ops.attention_operator(*given))
    do = torch.randn_like(o).requires_grad_()
    torch.library.opcheck(ops.attention_operator, given)
    shared, options = (q, k, v, mask, seed, o, softmax, do), (causal, 0.5, dropout, additive)
    torch.library.opcheck(ops.attention_backward_operator, (*shared, *options))
    plain = [x if x is None else x.detach() for x in shared]
    dd = [q.detach(), q.detach(), None, v.detach(), mask if additive else None]
    given = (*plain, *dd, *options)
    torch.library.opcheck(ops.attention_double_backward_operator, given)


@st.composite
def any_case(draw, dropouts=(0.0,)):
    group, hkv = draw(st.sampled_from([(1, 1), (1, 3), (1, 17), (3, 2), (4, 1)]))
    return Case(
        B=draw(st.integers(1, 2)),
        H=group * hkv,
        Hkv=hkv,
        Nq=draw(st.sampled_from([1, 2, 5, 33])),
        Nk=draw(st.sampled_from([1, 3, 17, 40])),
        d=draw(st.sampled_from([1, 3, 8, 80])),
        dv=draw(st.sampled_from([1, 4, 65])),
        mask=draw(
            st.sampled_from(
                ["none", "causal", "bool", "empty-row", "additive", "broadcast", "shared"]
            )
        ),
        layout=draw(st.sampled_from(sorted(LAYOUTS))),
        scale=draw(st.sampled_from([0.3, 0.4, 0.5])),
        dropout=draw(st.sampled_from(dropouts)),
    )


MISTAKES = (
    "last key dropped",
    "unwritten token",
    "dk scaled twice",
    "dropped cotangent of dv",
    "dropped cotangent of dk",
    "a row taken for empty",
)


class Sabotaged:
    """Kernels with one named mistake."""

    def __init__(self, kernels, mistake):
        self.kernels, self.mistake = kernels, mistake

    def attention_forward(self, q, k, v, mask, *rest):
        if self.mistake == "last key dropped":
            k, v = k[:, :, :-1], v[:, :, :-1]
        o, softmax = self.kernels.attention_forward(q, k, v, mask, *rest)
        if self.mistake == "unwritten token":
            o[:, :, -1] = torch.nan
        return o, softmax

    def attention_backward(self, inputs):
        dq, dk, dv, dmask = self.kernels.attention_backward(inputs)
        return dq, dk * 0.4 if self.mistake == "dk scaled twice" else dk, dv, dmask

    def attention_double_backward(self, inputs):
        if self.mistake == "dropped cotangent of dv":
            inputs = inputs._replace(ddv=None)
        if self.mistake == "dropped cotangent of dk":
            inputs = inputs._replace(ddk=None)
        if self.mistake == "a row taken for empty":
            inputs = inputs._replace(softmax=inputs.softmax.clone())
            inputs.softmax[:, :, 0, -1] = torch.inf
        return self.kernels.attention_double_backward(inputs)

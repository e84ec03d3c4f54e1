"""Operators to measure: one operator at a shape, dtype and order of differentiation, with inputs and right results.

``fwd`` is the forward alone; ``fwd+bwd`` computes the gradients of the inputs from a given cotangent of the output;
``fwd+bwd+double bwd`` in addition differentiates these gradients, given their cotangents, with respect to the inputs
and the cotangent of the output.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.orders import BWD, FWD
from benchmarks.registry import Implementation, Job, named
from diversevit_fast.testing import assert_within_budget


class OperatorSpec(NamedTuple):
    """One group of rows: an operator at a shape, dtype and order."""

    operator: str
    shapes: tuple[tuple[int, ...], ...]  # of the inputs
    dtype: torch.dtype
    order: str
    device: str
    causal: bool = False  # of attention

    @property
    def workload(self) -> str:
        return self.operator

    @property
    def group(self) -> str:
        shape = "x".join(map(str, self.shapes[0]))
        dtype = str(self.dtype).removeprefix("torch.") + (" causal" if self.causal else "")
        return f"{self.operator} {shape} {dtype} {self.order}"

    @property
    def checked_samples(self) -> int | None:
        """How many samples the check looks at: what eager attention has memory for in float64; None for all."""
        if self.operator != "attention":
            return None
        _, H, N, _ = self.shapes[0]
        return max(1, CHECKED_BYTES // (8 * H * N * N))


CHECKED_BYTES = 2 << 30
"""The most that a matrix of probabilities may take in a check."""


@dataclass
class Tensors:
    """Inputs and cotangents of one run."""

    inputs: list[Tensor]
    do: Tensor
    dd: list[Tensor]

    def to(self, dtype: torch.dtype, samples: int | None = None) -> "Tensors":
        """Return copies as leaves in another dtype, of the first ``samples`` only where that is given."""

        def copy(x: Tensor) -> Tensor:
            return x.detach()[slice(samples) if x.ndim else ...].to(dtype)

        inputs = [copy(x).requires_grad_() for x in self.inputs]
        return Tensors(inputs, copy(self.do).requires_grad_(), [copy(x) for x in self.dd])


def run(f: Callable[..., Tensor], t: Tensors, order: str) -> tuple[Tensor, ...]:
    """Return the results of ``order``, by autograd through ``f``."""
    if order == FWD:
        with torch.no_grad():
            return (f(*t.inputs),)
    y = f(*t.inputs)
    if order == BWD:
        return torch.autograd.grad(y, t.inputs, t.do)
    inner = torch.autograd.grad(y, t.inputs, t.do, create_graph=True)
    found = torch.autograd.grad(inner, [*t.inputs, t.do], t.dd, materialize_grads=True)
    return tuple(found)


def run_compiled(f: Callable[..., Tensor], t: Tensors) -> Job:
    """Return all three orders as one compiled graph: torch.func.grad of a function that holds torch.func.grad."""
    which = tuple(range(len(t.inputs)))

    def inner(inputs: Sequence[Tensor], do: Tensor, dd: Sequence[Tensor]) -> Tensor:
        grads = torch.func.grad(lambda *x: (f(*x) * do).sum(), argnums=which)(*inputs)
        return torch.stack([(g * d).sum() for g, d in zip(grads, dd, strict=True)]).sum()

    def everything(inputs: list[Tensor], do: Tensor, dd: list[Tensor]) -> tuple[Tensor, ...]:
        by_input, by_do = torch.func.grad(inner, argnums=(0, 1))(inputs, do, dd)
        return (*by_input, by_do)

    torch._dynamo.reset()
    compiled = torch.compile(everything, dynamic=False)
    inputs, do = [x.detach() for x in t.inputs], t.do.detach()
    return lambda: compiled(inputs, do, t.dd)


def function_of(spec: OperatorSpec, implementation: Implementation) -> Callable[..., Tensor]:
    """Return the function of a spec's inputs that an implementation computes."""
    return (
        partial(implementation.function, is_causal=True) if spec.causal else implementation.function
    )


def eager_function(spec: OperatorSpec) -> Callable[..., Tensor]:
    return function_of(spec, named(spec.operator, "eager"))


def meta_tensors(spec: OperatorSpec) -> Tensors:
    """Return tensors of a spec that have no memory."""
    inputs = [torch.empty(shape, dtype=spec.dtype, device="meta") for shape in spec.shapes]
    do = torch.empty_like(eager_function(spec)(*inputs)).requires_grad_()
    return Tensors([x.requires_grad_() for x in inputs], do, [torch.empty_like(x) for x in inputs])


class OperatorWorkload:
    """Tensors of an ``OperatorSpec``, jobs of implementations on them, and the check of their results."""

    def __init__(self, spec: OperatorSpec):
        self.spec = spec
        generator = torch.Generator(spec.device).manual_seed(0)

        def draw(shape: Sequence[int]) -> Tensor:
            x = torch.randn(tuple(shape), generator=generator, device=spec.device)
            return x.to(spec.dtype)

        inputs = [draw(shape) for shape in spec.shapes]
        like = meta_tensors(spec).do
        do = draw(like.shape).to(like.dtype).requires_grad_()
        dd = [draw(shape) for shape in spec.shapes]
        self.tensors = Tensors([x.requires_grad_() for x in inputs], do, dd)
        if not do.ndim:
            self._correlate()

    def _correlate(self) -> None:
        """Make the cotangents of a scalar's gradients resemble these.

        Otherwise the gradient of the scalar's cotangent, their inner product, cancels to rounding errors, which say
        nothing about an implementation.
        """
        t = self.tensors.to(torch.float64)
        gradients = run(eager_function(self.spec), t, BWD)
        for cotangent, g in zip(self.tensors.dd, gradients, strict=True):
            cotangent += (g * (g.numel() ** 0.5 / g.norm())).to(cotangent.dtype)

    @property
    def like(self) -> Tensor:
        return self.tensors.inputs[0]

    def job(self, implementation: Implementation) -> Job:
        function = function_of(self.spec, implementation)
        if implementation.compiled:
            return run_compiled(function, self.tensors)
        return lambda: run(function, self.tensors, self.spec.order)

    @cached_property
    def _references(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Eager's results in the row's dtype, and in float64 from the same, already rounded inputs."""
        eager, samples = eager_function(self.spec), self.spec.checked_samples
        exact = run(eager, self.tensors.to(torch.float64, samples), self.spec.order)
        return run(eager, self.tensors.to(self.spec.dtype, samples), self.spec.order), exact

    def check(self, implementation: Implementation, results: tuple[Tensor, ...]) -> None:
        """Compare results with eager's in float64, by the error budget of ``diversevit_fast.testing``.

        Raises:
            AssertionError: a result is missing, not finite, or wrong.
        """
        eager, exact = self._references
        terms = max(map(max, self.spec.shapes))
        for i, (got, theirs, right) in enumerate(zip(results, eager, exact, strict=True)):
            name = f"{implementation.name}, result {i}"
            seen = got[slice(self.spec.checked_samples) if got.ndim else ...]
            assert_within_budget(seen, theirs, right, terms=terms, name=name)

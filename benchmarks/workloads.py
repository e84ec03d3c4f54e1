"""One group of benchmark rows: a stage at a shape, dtype and order, its inputs and the right answer.

d0 is the value; d0+d1 besides its gradients for a cotangent; d0+d1+d2 besides the gradients of these, for
cotangents of their own, with respect to the inputs and the first cotangent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.registry import Job, Provider, eager_of
from diversevit_fast.testing import assert_within_budget


class Spec(NamedTuple):
    """What a group compares."""

    stage: str
    shapes: tuple[tuple[int, ...], ...]  # of the inputs
    dtype: torch.dtype
    order: str
    device: str

    @property
    def group(self) -> str:
        shape = "x".join(map(str, self.shapes[0]))
        return f"{self.stage} {shape} {str(self.dtype).removeprefix('torch.')} {self.order}"


@dataclass
class Tensors:
    """Inputs and cotangents of one run."""

    inputs: list[Tensor]
    do: Tensor
    dd: list[Tensor]

    def to(self, dtype: torch.dtype) -> "Tensors":
        def leaf(x: Tensor) -> Tensor:
            return x.detach().to(dtype).requires_grad_()

        dd = [x.to(dtype) for x in self.dd]
        return Tensors([leaf(x) for x in self.inputs], leaf(self.do), dd)


def run(f: Callable[..., Tensor], t: Tensors, order: str) -> tuple[Tensor, ...]:
    """The results of ``order``, by autograd through ``f``."""
    if order == "d0":
        with torch.no_grad():
            return (f(*t.inputs),)
    y = f(*t.inputs)
    if order == "d0+d1":
        return torch.autograd.grad(y, t.inputs, t.do)
    inner = torch.autograd.grad(y, t.inputs, t.do, create_graph=True)
    found = torch.autograd.grad(inner, [*t.inputs, t.do], t.dd, materialize_grads=True)
    return tuple(found)


def run_compiled(f: Callable[..., Tensor], t: Tensors) -> Job:
    """d0+d1+d2 as one compiled graph: torch.func.grad of a function that holds torch.func.grad."""
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


class Workload:
    """The tensors of a ``Spec``; jobs of providers on them; what they must return."""

    def __init__(self, spec: Spec):
        self.spec = spec
        generator = torch.Generator(spec.device).manual_seed(0)

        def draw(shape: Sequence[int]) -> Tensor:
            x = torch.randn(tuple(shape), generator=generator, device=spec.device)
            return x.to(spec.dtype)

        inputs = [draw(shape) for shape in spec.shapes]
        with torch.no_grad():
            y = eager_of(spec.stage)(*inputs)
        do = draw(y.shape).to(y.dtype).requires_grad_()
        dd = [draw(shape) for shape in spec.shapes]
        self.tensors = Tensors([x.requires_grad_() for x in inputs], do, dd)
        if not do.ndim:
            self._correlate()

    def _correlate(self) -> None:
        """Make the cotangents of a scalar's gradients resemble these.

        Else the gradient of the scalar's cotangent, their inner product, cancels to rounding errors
        that say nothing about a provider.
        """
        t = self.tensors.to(torch.float64)
        gradients = run(eager_of(self.spec.stage), t, "d0+d1")
        for cotangent, g in zip(self.tensors.dd, gradients, strict=True):
            cotangent += (g * (g.numel() ** 0.5 / g.norm())).to(cotangent.dtype)

    @property
    def like(self) -> Tensor:
        return self.tensors.inputs[0]

    def job(self, provider: Provider) -> Job:
        if provider.compiled:
            return run_compiled(provider.function, self.tensors)
        return lambda: run(provider.function, self.tensors, self.spec.order)

    @cached_property
    def _judges(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Eager's results in the row's dtype, and in float64 on the same, already rounded inputs."""
        eager = eager_of(self.spec.stage)
        exact = run(eager, self.tensors.to(torch.float64), self.spec.order)
        return run(eager, self.tensors, self.spec.order), exact

    def check(self, results: tuple[Tensor, ...]) -> None:
        """The gate: at most twice eager's error against float64, or there is no number.

        Raises:
            AssertionError: a result is missing, not finite, or wrong.
        """
        eager, exact = self._judges
        terms = max(map(max, self.spec.shapes))
        for got, theirs, right in zip(results, eager, exact, strict=True):
            assert_within_budget(got, theirs, right, terms=terms)

"""``diversevit doctor``: report what is installed, which backends run, and check second derivatives."""

import platform
import shutil
import time
from collections.abc import Callable, Iterator
from importlib import metadata

import torch
from torch import Tensor

from ..ops import attention, backends, reference

_CORE = ("torch", "numpy", "triton")
_EXTRAS = {
    "train": (
        "timm",
        "torchvision",
        "scikit-learn",
        "pillow",
        "typer",
        "rich",
        "matplotlib",
        "jinja2",
        "safetensors",
        "tensorboard",
    ),
    "hf": ("transformers",),
    "xformers": ("xformers",),
}
_COMPILERS = ("c++", "g++", "clang++", "cl", "icpx")
_SHAPE = (2, 3, 197, 64)  # [B, H, N, d]: ViT-S at 224 pixels, whose 197 tokens fill no block evenly


def report_health() -> bool:
    """Print the findings, one line each; return True if every self-check passed."""
    for name, finding in _findings():
        print(f"{name:<22}{finding}", flush=True)
    healthy = True
    for name, missing in backends.unavailable().items():
        device = "cuda" if name == "triton" else "cpu"
        if missing or name == "reference":
            continue
        begun = time.perf_counter()
        error, budget = self_check(name, device)
        passed = error <= budget  # False for NaN
        healthy = healthy and passed
        verdict = "passed" if passed else "FAILED"
        seconds = time.perf_counter() - begun
        detail = f"error {error:.1e} of {budget:.1e} allowed, {seconds:.1f} s"
        print(f"{'self-check ' + name:<22}{verdict}: second-order attention, {detail}", flush=True)
    return healthy


def self_check(backend: str, device: str = "cpu") -> tuple[float, float]:
    """Return the error of ``backend``'s second-order attention in float32, and the error allowed.

    Both are judged by the reference in float64, relative to the largest element. Allowed is twice
    the error of the reference in float32, plus sqrt(N) times its epsilon for the order of sums.

    Raises:
        UnsupportedError: the backend cannot run here.
    """
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(_SHAPE, generator=draw).to(device) for _ in range(7)]
    with backends.use_backend(backend):
        ours = _second_order(attention, inputs)
    eager = _second_order(_reference, inputs)
    exact = _second_order(_reference, [x.double() for x in inputs])
    floor = _SHAPE[2] ** 0.5 * torch.finfo(torch.float32).eps
    return _error(ours, exact), 2 * _error(eager, exact) + floor


def _findings() -> Iterator[tuple[str, str]]:
    yield "python", platform.python_version()
    for package in _CORE:
        yield package, _version(package) or "not installed"
    for extra, packages in _EXTRAS.items():
        found = {package: _version(package) for package in packages}
        for package, version in found.items():
            yield f"[{extra}] {package}", version or "not installed"
        if not all(found.values()):
            yield f"[{extra}]", f'to complete it: pip install "diversevit-fast[{extra}]"'
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield f"device cuda:{index}", torch.cuda.get_device_name(index)
    else:
        yield "device cuda", "none"
    yield "device cpu", f"{torch.get_num_threads()} threads"
    for name, missing in backends.unavailable().items():
        yield f"backend {name}", f"unavailable: {missing}" if missing else "available"
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    yield "C++ compiler", compiler or "none: torch.compile cannot generate CPU code"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference.attention(q, k, v, None, False, q.shape[-1] ** -0.5)


def _second_order(attend: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return ``gq, gk, gv``, the gradients of <(dq, dk, dv), (ddq, ddk, ddv)>."""
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    first = torch.autograd.grad(attend(q, k, v), (q, k, v), inputs[3], create_graph=True)
    return list(torch.autograd.grad(first, (q, k, v), inputs[4:]))


def _error(actual: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest error of any gradient, relative to that gradient's largest element."""
    errors = [
        (a.double() - e).abs().max() / e.abs().max() for a, e in zip(actual, exact, strict=True)
    ]
    return torch.stack(errors).max().item()

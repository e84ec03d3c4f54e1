"""``diversevit doctor``: what is installed, which backends run, a check of second derivatives, and what to do."""

import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from ..installation import extras, install_command, requirements, version_of
from ..ops import attention, backends, reference
from ..version import __version__
from .tables import print_json

_NOT_FOR_USE = ("all", "bench", "dev", "docs")  # extras that hold others, or tools of developers
_COMPILERS = ("c++", "g++", "clang++", "cl", "icpx")
_SHAPE = (2, 3, 197, 64)  # [B, H, N, d]: ViT-S at 224 pixels, whose 197 tokens fill no block evenly


@dataclass
class Check:
    """A backend's second-order attention: its error, and the error allowed (see ``self_check``)."""

    error: float
    allowed: float
    seconds: float
    passed: bool


@dataclass
class Health:
    """What ``diversevit doctor`` found, and what to do about it.

    Attributes:
        packages: versions of what the package needs by itself; None where it is missing.
        extras: the same for each extra.
        devices: what each device is.
        backends: why a backend cannot run here; None where it can.
        compiler: the C++ compiler's path; None without one.
        checks: by backend that can run.
        advice: lines that say what to do.
    """

    version: str
    python: str
    packages: dict[str, str | None]
    extras: dict[str, dict[str, str | None]]
    devices: dict[str, str]
    backends: dict[str, str | None]
    compiler: str | None
    checks: dict[str, Check] = field(default_factory=dict)
    advice: list[str] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """Whether every self-check passed."""
        return all(check.passed for check in self.checks.values())


def report_health(*, as_json: bool = False) -> bool:
    """Print the findings, a line each or as JSON; return True if every self-check passed."""
    health = examine()
    if not as_json:
        for name, finding in _lines(health):
            _show(name, finding)
    for name, missing in health.backends.items():
        if missing is None and name != "reference":
            check = health.checks[name] = _check(name)
            if not as_json:
                detail = f"error {check.error:.1e} of {check.allowed:.1e} allowed"
                verdict = "passed" if check.passed else "FAILED"
                said = f"{verdict}: second-order attention, {detail}, {check.seconds:.1f} s"
                _show(f"self-check {name}", said)
    health.advice = advise(health)
    if as_json:
        print_json(asdict(health) | {"healthy": health.healthy})
    for line in [] if as_json else health.advice or ["nothing: all is well"]:
        _show("what to do", line)
    return health.healthy


def examine() -> Health:
    """Return what is installed and can run, without the self-checks."""
    threads = torch.get_num_threads()
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    devices = {name: torch.cuda.get_device_name(name) for name in cuda}
    return Health(
        version=__version__,
        python=platform.python_version(),
        packages={name: version_of(name) for name in requirements() or ["torch", "numpy"]},
        extras={
            extra: {name: version_of(name) for name in requirements(extra)}
            for extra in extras()
            if extra not in _NOT_FOR_USE
        },
        devices=devices | {"cpu": f"{threads} thread{'' if threads == 1 else 's'}"},
        backends=dict(backends.unavailable()),
        compiler=next(filter(None, map(shutil.which, _COMPILERS)), None),
    )


def advise(health: Health) -> list[str]:
    """Return what to do about the findings, the most pressing first."""
    lines = []
    for name, check in health.checks.items():
        if not check.passed:
            lines.append(
                f"the backend {name} computes wrong derivatives here: do not train with it; "
                'use dvf.use_backend("reference"), and report what this command prints'
            )
    missing = [name for name, version in health.packages.items() if version is None]
    if missing:
        lines.append(f"install what the package itself needs: pip install {' '.join(missing)}")
    if health.compiler is None:
        lines.append("install a C++ compiler (c++): without one the CPU kernels are slower")
    if any(name.startswith("cuda") for name in health.devices) and health.backends.get("triton"):
        lines.append(f"for the GPU's kernels: {health.backends['triton']}")
    for extra, packages in health.extras.items():
        lacking = [name for name, version in packages.items() if version is None]
        if lacking:
            lines.append(
                f"if you want [{extra}] ({', '.join(lacking)} missing): {install_command(extra)}"
            )
    if not health.extras:
        lines.append(
            f"install the package, which only lies on Python's path: {install_command('train')}"
        )
    return lines


def _show(name: str, finding: str) -> None:
    print(f"{name:<38}{finding}", flush=True)


def _check(name: str) -> Check:
    begun = time.perf_counter()
    on_gpu = name == "triton" and torch.cuda.is_available()  # else interpreted
    error, allowed = self_check(name, "cuda" if on_gpu else "cpu")
    passed = error <= allowed  # False for NaN
    return Check(error, allowed, round(time.perf_counter() - begun, 3), passed)


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


def _lines(health: Health) -> Iterator[tuple[str, str]]:
    yield "diversevit-fast", health.version
    yield "python", health.python
    for package, version in health.packages.items():
        yield package, version or "not installed"
    for extra, packages in health.extras.items():
        for package, version in packages.items():
            yield f"[{extra}] {package}", version or "not installed"
    for device, what in health.devices.items():
        yield f"device {device}", what
    if len(health.devices) == 1:
        yield "device cuda", "none"
    for name, missing in health.backends.items():
        yield f"backend {name}", f"unavailable: {missing}" if missing else "available"
    yield "C++ compiler", health.compiler or "none: torch.compile cannot generate CPU code"


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

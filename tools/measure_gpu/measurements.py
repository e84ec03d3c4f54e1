"""What is measured on a GPU, one measurement a process: ``python -m tools.measure_gpu.measurements NAME``.

A measurement is told on its standard input which rows of it are known already, as JSON, and prints the others, each as
soon as it is there: first ``MACHINE`` with what it runs on, then lines of ``ROW``, at last ``DONE``.
"""

import json
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TOKENS = {
    "attention": (197, 577),
    "layer_norm": (197,),
    "gelu": (197,),
    "head_penalty": (197,),
    "routed_head_penalty": (197,),
}
ANCHORED = ("attention", "layer_norm")
MODELS, LAYERS = ("DiverseViT", "ViT-S", "ViT-B", "ViT-L"), ("last", "all")
CRITICS = ("ViT-S", "encoder-1024x256", "encoder-1024x256-8-heads", "encoder-1024x512")
PUBLIC_ISSUE = "public issue"
AUTOTUNED = ("attention", "routed_head_penalty")
SEEDS = 10

Row = dict[str, Any]
Rows = Sequence[Row]


def names() -> list[str]:
    """Return all measurements: what may be wrong comes first, then what is new, then what is autotuned."""
    tests = sorted(p.name for p in (ROOT / "tests/kernels/triton").glob("test_*.py"))
    operators = [
        f"{op} {n} {dtype}"
        for op, ns in TOKENS.items()
        for n in ns
        for dtype in ("bfloat16", "float32")
    ]
    steps = [f"{model} {layers}" for model in MODELS for layers in LAYERS]
    return [
        *(f"tests: {name}" for name in tests),
        "float16 misses: all",
        *(f"operator: {row}" for row in operators),
        *(f"published: {op}" for op in ANCHORED),
        *(f"gradient penalty: {name}" for name in (PUBLIC_ISSUE, *CRITICS)),
        *(f"step: {name}" for name in steps),
        *(f"largest batch: {name}" for name in steps),
        *(f"autotuned: {row}" for row in operators if row.startswith(AUTOTUNED)),
    ]


def commit() -> str:
    """Return the commit that is measured, as ``benchmarks.runner`` tells it."""
    from benchmarks.runner import machine

    return str(machine("cpu")["commit"])


def measurement(name: str, known: Rows) -> Iterator[Row]:
    """Yield the rows of a measurement that are not known yet."""
    kind, _, rest = name.partition(": ")
    return KINDS[kind](rest, known)


def kernel_tests(name: str, known: Rows) -> Iterator[Row]:
    """Run one file of kernel tests; count outcomes and keep the first line of each failure."""
    if known:
        return
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}"]
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        path = str(ROOT / "tests/kernels/triton" / name)
        subprocess.run([*command, path], cwd=ROOT, env=environment, capture_output=True)
        suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    failures = {
        f"{case.get('name')}": (problem.get("message") or "").splitlines()[:1]
        for case in suite.iter("testcase")
        for problem in (*case.findall("failure"), *case.findall("error"))
    }
    counts = {key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")}
    yield {**counts, "first_lines": failures}


def float16_misses(_: str, known: Rows) -> Iterator[Row]:
    """Repeat with many seeds the two checks that once missed their budget on a GPU, in float16."""
    for name, check in misses().items():
        if any(row["case"] == name for row in known):
            continue
        said = []
        for seed in range(SEEDS):
            try:
                check(seed)
            except AssertionError as miss:
                said.append(f"seed {seed}: {str(miss).splitlines()[0]}")
        yield {"case": name, "seeds": SEEDS, "misses": said}


def misses() -> dict[str, Callable[[int], None]]:
    """Return name -> check by seed: the routed penalty of a class token, grouped attention to a single key."""
    import torch

    from diversevit_kernels.triton import attention as attention_kernels
    from tests.helpers import attention_cases
    from tests.kernels.triton import test_head_penalty, test_routed_head_penalty

    found: dict[str, Callable[[int], None]] = {}
    routed = test_routed_head_penalty
    on_gpu = test_head_penalty.On(routed.kernels, "cuda", test_head_penalty._NoGuards)
    for kind in routed.KINDS:
        found[f"routed penalty, class token, {'-'.join(kind)}"] = lambda seed, kind=kind: (
            routed.check_results(on_gpu, routed.CASES["class-token"], torch.float16, kind, seed)
        )
    sizes = ((4, 1, 1, 3), (4, 1, 33, 8), (6, 2, 5, 80))
    for H, Hkv, Nq, d in sizes:
        case = attention_cases.Case(H=H, Hkv=Hkv, Nq=Nq, Nk=1, d=d, dv=d)
        found[f"attention to one key, {H} heads on {Hkv}, {Nq} queries, width {d}"] = (
            lambda seed, case=case: attention_cases.check_orders(
                attention_kernels, case, torch.float16, seed, "cuda"
            )
        )
    return found


def operator(row: str, known: Rows) -> Iterator[Row]:
    """Measure one operator in all orders, ours and everybody else's."""
    import torch

    from benchmarks.cases import operator_cases

    which, tokens, dtype = row.split()
    yield from groups(operator_cases(which, (int(tokens),), [getattr(torch, dtype)]), known)


def published(which: str, known: Rows) -> Iterator[Row]:
    """Measure an operator at shapes that others published figures for."""
    from benchmarks.cases import anchor_cases

    yield from groups(anchor_cases(which), known)


def gradient_penalty(name: str, known: Rows) -> Iterator[Row]:
    """Measure R1 of a critic, or the shape of PyTorch's public issue, ours and PyTorch's."""
    from benchmarks.cases import critic_cases, issue_cases

    yield from groups(issue_cases() if name == PUBLIC_ISSUE else critic_cases([name]), known)


def autotuned(row: str, known: Rows) -> Iterator[Row]:
    """Measure our kernels with the launch configurations that are the fastest here, not those of the tables."""
    import torch

    from benchmarks.cases import operator_cases
    from diversevit_kernels.triton.runtime.device import autotune

    which, tokens, dtype = row.split()
    cases = operator_cases(which, (int(tokens),), [getattr(torch, dtype)])
    with autotune(True):
        for found in groups([case for case in cases if case.implementation.name == "ours"], known):
            yield {**found, "implementation": "ours, autotuned"}


def groups(cases: Sequence[Any], known: Rows) -> Iterator[Row]:
    """Measure rows group by group; a wrong result has its reason in place of times."""
    from benchmarks.records import rounded
    from benchmarks.runner import Outcome, Runner, extra_info

    by_group: dict[str, list[Any]] = {}
    for case in cases:
        if not case.implementation.compiled:
            by_group.setdefault(case.spec.group, []).append(case)
    for group, members in by_group.items():
        if any(row["group"] == group for row in known):
            continue
        runner = Runner({group: members})
        for case in members:
            try:
                found = runner.outcome(case)
            except AssertionError as wrong:
                reason = str(wrong).splitlines()[0]
                found = Outcome(refused=f"{case.implementation.name}: wrong, {reason}")
            row = {"group": group, **extra_info(case, found), "seconds": rounded(found.seconds)}
            yield {**row, "refused": found.refused} if found.refused else row


def step(row: str, known: Rows) -> Iterator[Row]:
    """Check and time one model's training step, by everybody; what fails has its reason in place of times."""
    import torch

    from benchmarks import headline
    from benchmarks.fake_gpu import launch

    for case in headline.rows_of(*row.split()):
        if any(one["implementation"] == case.variant for one in known):
            continue
        try:
            if not launch.here():
                headline.check(case)
            found = headline.measured(case)
        except torch.AcceleratorError:  # nothing that follows in this process would be right
            raise
        except Exception as failure:
            found = {"seconds": [], "refused": f"{case.variant}: {reason_of(failure)}"}
        yield {**case.row(), **found}


def largest_batch(row: str, known: Rows) -> Iterator[Row]:
    """Search the largest batch of one model's training step, by everybody; each row is one trial.

    Not of a compiled loss: Inductor keeps the memory of graphs of smaller batches, so its trials would not be alike.
    """
    import torch

    from benchmarks import headline

    for case in headline.rows_of(*row.split()):
        if headline.VARIANTS[case.variant].how == "compiled":
            continue
        mine = [one for one in known if one["implementation"] == case.variant]
        if any("failed" in one for one in mine):
            continue
        trials = {one["batch"]: one["fits"] for one in mine}
        headline.free()
        model = headline.make_model(case.model)
        while batch := headline.next_batch(trials, case.spec.batch):
            told = {"group": case.group, "implementation": case.variant, "batch": batch}
            try:
                trials[batch] = headline.fits(case, model, batch)
            except torch.AcceleratorError as failure:  # the search goes on in another process
                yield {**told, "fits": False, "why": reason_of(failure)}
                raise
            except Exception as failure:
                yield {**told, "failed": reason_of(failure)}
                break
            yield {**told, "fits": trials[batch]}
        del model


def reason_of(failure: Exception) -> str:
    """Return in one line why a step has no numbers."""
    if "OutOfMemoryError" in type(failure).__name__:
        return "out of memory"
    said = (str(failure).splitlines() or [""])[0]
    return f"{type(failure).__name__}: {said}"


KINDS: dict[str, Callable[[str, Rows], Iterator[Row]]] = {
    "tests": kernel_tests,
    "float16 misses": float16_misses,
    "operator": operator,
    "published": published,
    "gradient penalty": gradient_penalty,
    "step": step,
    "largest batch": largest_batch,
    "autotuned": autotuned,
}


def main(name: str) -> None:
    """Print the rows of a measurement that standard input does not hold."""
    from benchmarks.runner import machine

    known = json.load(sys.stdin)
    print("MACHINE", json.dumps(machine("cuda")), flush=True)
    for row in measurement(name, known):
        print("ROW", json.dumps(row), flush=True)
    print("DONE", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])

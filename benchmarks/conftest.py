"""Fixtures of ``pytest benchmarks/``, which measures operators and training steps on the device that is there.

    pytest benchmarks/ --benchmark-json=benchmarks/results/<device>.json
    python -m benchmarks.report benchmarks/results/<device>.json

``--long`` adds 1025 tokens, ``--rounds N`` changes how often each row runs, ``--benchmark-disable`` only checks.
``--processor-time`` is for a CPU that others use as well, on one thread.
"""

import pytest
import torch

from benchmarks.runner import Case, ReplayClock, Runner, extra_info, machine
from benchmarks.timing import processor_seconds_of, seconds_of

CLOCK = ReplayClock()


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="benchmarks: also 1025 tokens")
    parser.addoption("--rounds", type=int, help="benchmarks: timed runs per row (5; GPU: 20)")
    parser.addoption(
        "--processor-time", action="store_true", help="benchmarks: processor time on a CPU"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "long: runs with --long only")
    # a row that fails its check has no number
    config.addinivalue_line("filterwarnings", "ignore:Benchmark fixture was not used")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--long", default=False):
        skip = pytest.mark.skip(reason="--long runs it")
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(skip)
    for item in items:
        if isinstance(getattr(item, "callspec", None) and item.callspec.params.get("case"), Case):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.fixture(scope="session")
def runner(request):
    """The runner of the rows that were selected."""
    groups: dict[str, list[Case]] = {}
    for item in request.session.items:
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        if isinstance(case, Case) and not item.get_closest_marker("skip"):
            groups.setdefault(case.spec.group, []).append(case)
    clock = processor_seconds_of if request.config.getoption("--processor-time") else seconds_of
    return Runner(groups, request.config.getoption("--rounds"), clock)


@pytest.fixture(scope="session")
def machine_info(request):
    told = machine("cpu" if not torch.cuda.is_available() else "cuda")
    if request.config.getoption("--processor-time"):
        told["clock"] = "processor time"
    return told


@pytest.fixture
def measure(runner, benchmark, machine_info):
    """A function that checks and measures one row, and hands its times to pytest-benchmark."""

    def measured(case: Case) -> None:
        found = runner.outcome(case, timed=benchmark.enabled)
        if found.refused:
            pytest.skip(found.refused)
        benchmark.group = case.spec.group
        benchmark.extra_info.update(machine_info, **extra_info(case, found))
        CLOCK.load(found.seconds)
        benchmark.pedantic(lambda: None, rounds=max(1, len(found.seconds)))

    return measured

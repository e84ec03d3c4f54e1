"""What the fuzz tests share: odd values, every option of every command, and the law that all must keep."""

import contextlib
import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from diversevit_fast.experiment.cli import app, main

QUICK = settings(
    max_examples=80,
    deadline=None,
    derandomize=True,  # the same examples everywhere: no failure that comes and goes
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
NUMBERS = (
    *(
        "0",
        "1",
        "2",
        "3",
        "64",
        "-1",
        "1.5",
        "0.5",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "1e-320",
        "1024",
    ),
    *("1025", str(10**9), str(10**14), str(2**32 - 1), str(2**32), str(2**63), str(2**64)),
    *("1e18", "1e30", "1e39", str(10**30), "9" * 5000, "0x10", "1_0", "½"),
)
WORDS = (
    *NUMBERS,
    *(
        "",
        " ",
        "x",
        ".",
        "..",
        "/",
        "//",
        "-",
        "--",
        "~",
        "%s",
        "last",
        "all",
        "0,-1",
        "0,0",
        "true",
    ),
    *("auto", "cpu", "meta", "hpu", "mps", "cuda", "cuda:99", "xla", "cpu:-1", "erm", "diversevit"),
    *("quick", "paper", "digits-photos", "mnist-cifar", "input", "output", "token", "sample"),
    *("accuracy", "worst_group", "greedy", "exhaustive", "a\nb", "\x1b[31m", "\udcff", "y" * 300),
    *("{tmp}/new", "{tmp}/none/x", "{tmp}/pipe", "{tmp}/loop", "{tmp}/text", "{tmp}/text/x"),
    *("{tmp}/deep.json", "{tmp}/twice.json", "{tmp}/tiny.json", "{tmp}/run", "{tmp}/kept"),
    *("{tmp}/run/erm-seed0.safetensors", "{tmp}/run/config.json", "{tmp}/kept.partial"),
    *("/dev/zero", "/dev/null", "/dev/full", "/proc/self/mem", "z/" * 3000),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, 2, 3, -1, 7, 1024, 1025, 2**20, 2**31, 2**32, 2**63, 2**64, 10**12),
    *(10**30, 10**400, 0.0, -0.0, 0.5, 1e-320, 1e30, 1e308, math.nan, math.inf, -math.inf),
    *(
        "",
        "x",
        "\0",
        "\ud800",
        "a\nb",
        "last",
        "all",
        "cpu",
        "meta",
        "hpu",
        "erm",
        "NaN",
        "y" * 300,
    ),
    *(
        [],
        {},
        [0],
        [0, 0],
        [None],
        [[0]],
        [-1, 0],
        [10**30],
        list(range(1001)),
        {"x": 1},
        {"0": []},
    ),
)
odd_numbers = (
    st.sampled_from(NUMBERS)
    | st.integers().map(str)
    | st.floats().map(str)
    | st.integers(0, 9).map(str)
)
odd_words = st.sampled_from(WORDS) | st.text(
    st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), max_size=8
)
odd_values = st.sampled_from(VALUES) | st.integers() | st.floats() | st.text(max_size=4)


def commands() -> Iterator[tuple[tuple[str, ...], Any]]:
    """The words that call each command, and click's object for it."""
    waiting: list[tuple[tuple[str, ...], Any]] = [((), typer.main.get_command(app))]
    while waiting:
        words, command = waiting.pop()
        below = getattr(command, "commands", {})
        waiting += [((*words, name), sub) for name, sub in below.items()]
        if not below:
            yield words, command


@st.composite
def command_lines(draw: Any, words: tuple[str, ...], command: Any, usual: dict[str, str]) -> list:
    """A command with ``usual`` values and one or two odd ones."""
    names = [parameter.name for parameter in command.params]
    odd = draw(st.sets(st.sampled_from(names), min_size=1, max_size=2)) if names else set()
    line = list(words)
    for parameter in command.params:
        option = parameter.opts[0].startswith("-")
        if getattr(parameter, "is_flag", False):
            line += [parameter.opts[0]] if parameter.name in odd else []
        elif parameter.name in odd or parameter.name in usual:
            line += [parameter.opts[0]] if option else []
            line.append(
                draw(odd_numbers | odd_words) if parameter.name in odd else usual[parameter.name]
            )
    return line


@st.composite
def changed(draw: Any, tree: Any) -> Any:
    """A tree of JSON with one place of it odd, absent, or there in addition."""
    if not isinstance(tree, (dict, list)) or not tree or draw(st.integers(0, 5)) == 0:
        return draw(odd_values)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key, copy = draw(st.sampled_from(keys)), tree.copy()
    kind = draw(st.integers(0, 7))
    if kind == 0:
        del copy[key]
    elif kind == 1 and isinstance(copy, dict):
        copy[draw(st.text(max_size=4))] = draw(odd_values)
    else:
        copy[key] = draw(changed(tree[key]))
    return copy


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """``content`` cut, with bytes changed, put in or doubled."""
    at = draw(st.integers(0, len(content)))
    end = min(len(content), at + draw(st.sampled_from([0, 1, 8, 10**6])))
    inside = draw(st.sampled_from([b"", b"\0", b"\xff" * 8, b"NaN", b"[" * 50, b"1e999", content]))
    return content[:at] + inside + content[end:]


def state_of(folder: Path) -> dict[str, Any]:
    """Every name below ``folder``, and the content of its files; of locks not who held them."""
    found: dict[str, Any] = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            plain = path.is_file() and not path.is_symlink() and name != ".lock"
            found[str(path.relative_to(folder))] = path.read_bytes() if plain else None
    return found


def outcome(line: list[str]) -> int:
    """The exit code of a command that keeps to the law of exit codes and single lines."""
    said, wrong = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
        try:
            main(line)
        except SystemExit as end:
            code = end.code
        else:
            code = None
    error = wrong.getvalue()
    assert code in (0, 2, 130), (line, code, error)
    if code:
        assert len(error.splitlines()) == 1, (line, error)
        assert code == 130 or error.startswith("error: "), (line, error)
        assert len(error) < 5000
    assert "Traceback" not in said.getvalue() + error
    return code

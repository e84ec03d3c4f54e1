"""Claims on a sweep's cells: one holder at a time, and a takeover of what a dead process left, once."""

import json
import os
import threading
import time
from pathlib import Path

import pytest

from diversevit_fast.errors import UsageError
from diversevit_fast.experiment import sweep_claims
from diversevit_fast.experiment.sweep_claims import Claims
from tests.helpers.processes import in_a_process

TAKE = """
from pathlib import Path
from diversevit_fast.experiment.sweep_claims import Claims
print(Claims(Path({folder!r})).take("cell", None) is not None, flush=True)
input()
"""


@pytest.fixture
def claims(tmp_path) -> Claims:
    return Claims(tmp_path)


def names(claims: Claims) -> list[str]:
    return sorted(path.name for path in claims.folder.iterdir())


def change(path: Path, **said: object) -> None:
    """Let a claim say something else, as if another process had made it."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **said}))


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_cell_has_one_holder_until_it_is_released(claims):
    first = claims.take("cell", None)
    assert first is not None
    with first:
        assert claims.take("cell", None) is None
        assert claims.take("cell", claims.holders()["cell"]) is None
        assert claims.take("other", None) is not None
        held = claims.holders()["cell"]
        assert (held.pid, held.generation, held.stale()) == (os.getpid(), 0, False)
        assert held.age < 60
    assert "cell" not in claims.holders()
    assert claims.take("cell", None) is not None


def test_a_process_that_is_killed_leaves_a_stale_claim(claims):
    with in_a_process(TAKE.format(folder=str(claims.folder))) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "True"
        held = claims.holders()["cell"]
        assert held.pid == process.pid
        assert not held.stale()
        assert claims.take("cell", held) is None
        process.kill()
    dead = claims.holders()["cell"]
    assert dead.stale()
    taken = claims.take("cell", dead)
    assert taken is not None
    assert taken.generation == 1
    with taken:
        assert claims.holders()["cell"].pid == os.getpid()
    assert names(claims) == []


def test_silence_makes_a_claim_stale_wherever_its_process_is(claims):
    claims.take("cell", None)
    change(claims.folder / "cell.0", machine="elsewhere", pid=2**22)
    assert not claims.holders()["cell"].stale()
    age(claims.folder / "cell.0", 9 * 60)
    assert not claims.holders()["cell"].stale(10)
    age(claims.folder / "cell.0", 11 * 60)
    assert claims.holders()["cell"].stale(10)
    assert not claims.holders()["cell"].stale(12)


def test_the_same_process_id_in_another_process_is_not_the_holder(claims):
    claims.take("cell", None)
    assert not claims.holders()["cell"].stale()
    change(claims.folder / "cell.0", born="1")
    assert claims.holders()["cell"].stale()


def test_of_many_that_see_a_stale_claim_one_takes_it(claims):
    claims.take("cell", None)
    change(claims.folder / "cell.0", born="1")
    seen, start, taken = claims.holders()["cell"], threading.Barrier(16), []

    def take() -> None:
        start.wait()
        taken.append(claims.take("cell", seen))

    threads = [threading.Thread(target=take) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(claim is not None for claim in taken) == 1
    assert len(taken) == 16


def test_a_claim_that_was_released_and_taken_anew_is_not_taken_over(claims):
    claims.take("cell", None)
    change(claims.folder / "cell.0", born="1")
    seen = claims.holders()["cell"]
    (claims.folder / "cell.0").unlink()
    assert claims.take("cell", None) is not None
    assert claims.take("cell", seen) is None
    assert names(claims) == ["cell.0"]


def test_a_claim_is_touched_while_it_is_held(claims, monkeypatch):
    monkeypatch.setattr(sweep_claims, "HEARTBEAT", 0.01)
    claim = claims.take("cell", None)
    age(claims.folder / "cell.0", 3600)
    with claim:
        for _ in range(500):
            if claims.holders()["cell"].age < 60:
                return
            time.sleep(0.01)
    pytest.fail("nobody touched it")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}'])
def test_a_claim_that_is_cut_off_counts_as_held_until_it_is_silent(claims, content):
    (claims.folder / "cell.0").write_text(content)
    assert not claims.holders()["cell"].stale()
    age(claims.folder / "cell.0", 3600)
    assert claims.holders()["cell"].stale()


def test_a_full_disk_leaves_no_claim(claims, monkeypatch):
    def write(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(sweep_claims.os, "write", write)
    with pytest.raises(UsageError, match="No space left"):
        claims.take("cell", None)
    assert names(claims) == []

"""Compiled code on disk: whoever else can write to it is not run, what is damaged is compiled again."""

import os
import re
import shutil
import subprocess
import time
import warnings
from pathlib import Path

import pytest
import torch

from diversevit_kernels.common import environment
from diversevit_kernels.cpu.runtime import cache_folder, compiler, cpp_library, library_cache
from tests.helpers.processes import in_a_process

posix = pytest.mark.skipif(os.name != "posix", reason="no owners here")
SOMEBODY = 54321


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where nothing has been compiled yet; nothing has been loaded, warned about or given up."""
    path = tmp_path / "home" / "kept"
    monkeypatch.setenv("DIVERSEVIT_CACHE_DIR", str(path))
    monkeypatch.setattr(cpp_library, "_loaded", {})
    monkeypatch.setattr(cpp_library, "_FLAGS", ("-O0", *cpp_library._FLAGS[1:]))  # quick to compile
    monkeypatch.setattr(library_cache, "_warned", False)
    monkeypatch.setattr(compiler, "_timed_out", [])
    return path


@pytest.fixture
def built(folder, monkeypatch) -> list[str]:
    """Kernels that were compiled, in order; gelu lies in the folder."""
    if shutil.which(compiler.command()[0]) is None:
        pytest.skip("no C++ compiler")
    names, build = [], cpp_library._build
    monkeypatch.setattr(
        cpp_library, "_build", lambda name, *rest: names.append(name) or build(name, *rest)
    )
    assert works()
    return names


def works() -> bool:
    """Whether gelu's kernel is there, in a process that has not loaded it yet."""
    cpp_library._loaded.clear()
    functions = cpp_library.library("gelu")
    return functions is not None and hasattr(functions, "gelu_forward_float32")


def only_file(folder: Path) -> Path:
    (file,) = folder.iterdir()
    return file


def foreign(file: Path, marker: Path) -> None:
    """A library that tells when it is loaded."""
    source = file.parent / "foreign.c"
    opens = f'open("{marker}", O_CREAT, 0600);'
    begins = "#include <fcntl.h>\n__attribute__((constructor)) static void f(void)"
    source.write_text(f"{begins} {{ {opens} }}")
    made = file.parent / "foreign.so"
    command = [*compiler.command(), "-x", "c", "-shared", "-fPIC", source, "-o", made]
    subprocess.run(command, check=True)
    source.unlink()
    file.unlink(missing_ok=True)
    made.rename(file)


def test_it_is_kept_for_the_user_alone(built, folder) -> None:
    assert built == ["gelu"]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert only_file(folder).stat().st_mode & 0o777 == 0o600
    assert works()
    assert built == ["gelu"]


def test_it_lies_in_the_users_cache(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("DIVERSEVIT_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder.folder() == tmp_path / "xdg" / "diversevit"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert cache_folder.folder() == tmp_path / ".cache" / "diversevit"
    monkeypatch.setenv("DIVERSEVIT_CACHE_DIR", "not/absolute")
    with pytest.raises(OSError, match="expected an absolute path"):
        cache_folder.folder()


def cut_short(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def give_to_all(file: Path) -> None:
    file.chmod(0o666)


def give_away(file: Path) -> None:
    os.chown(file, SOMEBODY, -1)


def make_a_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def link_to_nothing(file: Path) -> None:
    file.unlink()
    file.symlink_to("/nowhere/at/all")


SPOILT = (cut_short, flip_a_bit, empty, give_to_all, give_away, make_a_pipe, link_to_nothing)


@posix
@pytest.mark.parametrize("spoil", SPOILT, ids=lambda f: f.__name__)
def test_what_is_spoilt_is_compiled_again_once(built, folder, spoil) -> None:
    if spoil is give_away and os.getuid():
        pytest.skip("needs root")
    whole = only_file(folder).read_bytes()
    spoil(only_file(folder))
    assert works()
    assert works()
    assert built == ["gelu", "gelu"]
    file = only_file(folder)
    found = file.lstat()
    assert (found.st_mode & 0o177777, found.st_uid) == (0o100600, os.getuid())
    assert len(file.read_bytes()) == len(whole)


@posix
@pytest.mark.parametrize("way", ["in its place", "through a link", "with a digest"])
def test_another_library_is_never_loaded(built, folder, tmp_path, way) -> None:
    file, marker = only_file(folder), tmp_path / "marker"
    if way == "through a link":
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        foreign(elsewhere / "library.so", marker)
        file.unlink()
        file.symlink_to(elsewhere / "library.so")
    else:
        foreign(file, marker)
    if way == "with a digest":  # of the same library under another name
        library = file.read_bytes()
        file.write_bytes(library + library_cache._digest(f"x{file.name}", library))
        file.chmod(0o600)
    assert works()
    assert not marker.exists()
    assert built == ["gelu", "gelu"]


def test_another_kernels_file_is_compiled_again(built, folder) -> None:
    gelu = only_file(folder)
    assert cpp_library.library("layer_norm") is not None
    (other,) = set(folder.iterdir()) - {gelu}
    shutil.copy(other, gelu)
    assert works()
    assert built == ["gelu", "layer_norm", "gelu"]


def test_a_library_of_another_machine_is_compiled_again(built, folder) -> None:
    file = only_file(folder)
    alien = b"\x7fELF, but of another machine"
    file.write_bytes(alien + library_cache._digest(file.name, alien))
    assert works()
    assert built == ["gelu", "gelu"]


def test_two_libraries_are_two_although_they_lie_in_memory(built, folder) -> None:
    gelu, norm = (cpp_library.library(name) for name in ("gelu", "layer_norm"))
    assert hasattr(gelu, "gelu_forward_float32")
    assert hasattr(norm, "layer_norm_forward_float32")


def test_where_memory_cannot_be_run_a_copy_is(built, folder, monkeypatch) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    assert works()
    assert built == ["gelu"]
    assert only_file(folder)


def test_a_loaded_library_does_not_need_its_file(built, folder) -> None:
    functions = cpp_library.library("gelu")
    os.truncate(only_file(folder), 0)
    assert functions is not None
    assert functions.gelu_forward_bfloat16  # a page that nobody has read yet


def open_to_all(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)


def open_to_a_group(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o770)


def somebody_elses(folder: Path) -> None:
    folder.mkdir(parents=True)
    os.chown(folder, SOMEBODY, -1)


def a_link(folder: Path) -> None:
    folder.parent.mkdir()
    (folder.parent / "other").mkdir(mode=0o700)
    folder.symlink_to(folder.parent / "other")


def a_file(folder: Path) -> None:
    folder.parent.mkdir()
    folder.touch()


def below_one_open_to_all(folder: Path) -> None:
    folder.mkdir(parents=True, mode=0o700)
    folder.parent.chmod(0o777)


def below_one_open_to_a_group(folder: Path) -> None:
    folder.mkdir(parents=True, mode=0o700)
    os.chown(folder.parent, -1, SOMEBODY)
    folder.parent.chmod(0o775)


def to_be_made_where_all_may_write(folder: Path) -> None:
    folder.parent.mkdir()
    folder.parent.chmod(0o777)


def below_somebody_elses(folder: Path) -> None:
    folder.mkdir(parents=True, mode=0o700)
    os.chown(folder.parent, SOMEBODY, -1)


def through_a_link_of_somebody(folder: Path) -> None:
    other = folder.parent.parent / "other"
    other.mkdir(mode=0o700)
    folder.parent.symlink_to(other)
    os.chown(folder.parent, SOMEBODY, -1, follow_symlinks=False)


REFUSED = {
    open_to_all: "others can write to",
    open_to_a_group: "others can write to",
    somebody_elses: "not yours",
    a_link: "a link or no folder",
    a_file: "a link or no folder",
    below_one_open_to_all: "others can write to",
    below_one_open_to_a_group: "others can write to",
    to_be_made_where_all_may_write: "others can write to",
    below_somebody_elses: "not yours",
    through_a_link_of_somebody: "not yours",
}
AS_ROOT = {
    below_one_open_to_a_group,
    somebody_elses,
    below_somebody_elses,
    through_a_link_of_somebody,
}


@posix
@pytest.mark.parametrize("arrange", REFUSED, ids=lambda f: f.__name__)
def test_a_folder_that_others_have_a_hand_in_is_refused(folder, arrange) -> None:
    if arrange in AS_ROOT and os.getuid():
        pytest.skip("needs root")
    arrange(folder)
    with pytest.warns(UserWarning, match=REFUSED[arrange]) as said:
        found = [cpp_library.library(name) for name in ("gelu", "layer_norm")]
    assert found == [None, None]
    assert len(said) == 1
    assert "DIVERSEVIT_CACHE_DIR" in str(said[0].message)
    assert not folder.exists() or not folder.is_dir() or not list(folder.iterdir())


@posix
def test_a_folder_where_nobody_moves_what_is_not_theirs_will_do(folder) -> None:
    folder.parent.mkdir()
    folder.parent.chmod(0o1777)
    assert cache_folder.folder() == folder


@posix
def test_a_users_private_group_is_the_user(folder, monkeypatch) -> None:
    import grp
    import pwd

    folder.parent.mkdir()
    folder.parent.chmod(0o775)
    gid, uid = folder.parent.stat().st_gid, os.getuid()
    user = pwd.struct_passwd(("me", "", uid, gid, "", "", ""))
    monkeypatch.setattr(pwd, "getpwuid", lambda _: user)
    monkeypatch.setattr(grp, "getgrgid", lambda _: grp.struct_group(("me", "", gid, ["me"])))
    assert cache_folder.folder() == folder
    monkeypatch.setattr(grp, "getgrgid", lambda _: grp.struct_group(("me", "", gid, ["you"])))
    with pytest.raises(OSError, match="others can write"):
        cache_folder.folder()


@posix
def test_a_cache_that_is_a_link_to_ones_own_disk_will_do(folder) -> None:
    other = folder.parent.parent / "scratch"
    other.mkdir(mode=0o700)
    folder.parent.symlink_to(other)
    assert cache_folder.folder().resolve() == other / folder.name


@posix
@pytest.mark.parametrize("home", ["/dev/null", "", "not/absolute"])
def test_without_a_home_the_slow_path_runs_with_one_warning(home) -> None:
    code = """
import os, warnings, torch, diversevit_fast as dvf
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    y = dvf.gelu(torch.ones(3)), dvf.layer_norm(torch.ones(2, 3), (3,))
said = [str(w.message) for w in caught if "diversevit" in str(w.message)]
print(len(said), *said)
"""
    environment = {"HOME": home, "XDG_CACHE_HOME": "", "DIVERSEVIT_CACHE_DIR": ""}
    out, err = in_a_process(code, **environment).communicate()
    assert out.startswith("1 diversevit: gelu could not be compiled ("), out + err


def test_a_full_disk_leaves_nothing_half_written(built, folder, monkeypatch) -> None:
    only_file(folder).unlink()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert not works()
    assert not list(folder.iterdir())


def test_what_a_killed_process_had_begun_is_cleared_away(built, folder) -> None:
    old, new = (folder / f"building-{age}" for age in ("old", "new"))
    for left in (old, new):
        left.mkdir()
        (left / "half.so").touch()
    long_ago = time.time() - 2 * library_cache._MAX_BUILD_SECONDS
    os.utime(old, (long_ago, long_ago))
    assert cpp_library.library("layer_norm") is not None
    assert new.exists()
    assert not old.exists()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return str(path)


@posix
def test_a_compiler_that_hangs_is_ended_with_all_it_started(folder, tmp_path, monkeypatch) -> None:
    started = tmp_path / "started"
    hangs = script(tmp_path / "cxx", f"sleep 1000 & echo $! >> {started}; wait")
    monkeypatch.setenv("CXX", hangs)
    monkeypatch.setattr(compiler, "TIMEOUT", 1.0)
    begun = time.monotonic()
    with pytest.warns(UserWarning, match="did not end within 1 seconds") as said:
        found = [cpp_library.library(name) for name in ("gelu", "layer_norm")]  # waited for once
    assert found == [None, None]
    assert len(said) == 1
    assert time.monotonic() - begun < 20
    (pid,) = started.read_text().split()
    for _ in range(100):
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("it still runs")


@pytest.mark.parametrize("words", ["env {}", "{} -O2", "'{}'"])
def test_the_compiler_is_a_command(built, folder, monkeypatch, words) -> None:
    monkeypatch.setenv("CXX", words.format(shutil.which(compiler.command()[0])))
    assert works()
    assert built == ["gelu", "gelu"]  # another command, another library


@pytest.mark.parametrize("words", ["'unbalanced", "/nowhere/compiler", "false", "sh -c 'exit 3' -"])
def test_a_command_that_compiles_nothing(folder, monkeypatch, words) -> None:
    monkeypatch.setenv("CXX", words)
    with pytest.warns(UserWarning, match="gelu could not be compiled") as said:
        assert cpp_library.library("gelu") is None
    assert "\n" not in str(said[0].message)


def test_finding_a_kept_library_is_quick(built) -> None:
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        assert works()
        seconds.append(time.perf_counter() - begun)
    assert min(seconds) < 0.05


@pytest.mark.parametrize("word", ["0", "false", "False", "NO", "off", "n", "", " 0 "])
def test_off(folder, monkeypatch, word) -> None:
    monkeypatch.setenv("DIVERSEVIT_COMPILE", word)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpp_library.library("gelu") is None
    assert not folder.exists()


@pytest.mark.parametrize("word", ["1", "true", "True", "YES", "on", "y"])
def test_on(monkeypatch, word) -> None:
    monkeypatch.setenv("DIVERSEVIT_COMPILE", word)
    assert library_cache.enabled()
    assert environment.switch("DIVERSEVIT_COMPILE", default=False)


def test_a_word_that_says_neither_is_named_once(monkeypatch) -> None:
    monkeypatch.setenv("DIVERSEVIT_COMPILE", "maybe")
    with pytest.warns(UserWarning, match="DIVERSEVIT_COMPILE: expected .* got 'maybe'") as said:
        found = [library_cache.enabled() for _ in range(2)]
    assert found == [True, True]
    assert len(said) == 1
    assert "\n" not in str(said[0].message)


def test_autotuning_is_read_by_the_same_rule() -> None:
    code = """
from diversevit_kernels.triton.runtime import device
print(device._autotune)
"""
    running = [in_a_process(code, DIVERSEVIT_AUTOTUNE=word) for word in ("true", "maybe")]
    (yes, _), (unknown, said) = (one.communicate() for one in running)
    assert (yes.split(), unknown.split()) == (["True"], ["False"])
    assert "DIVERSEVIT_AUTOTUNE: expected" in said


def test_the_environment_is_read_here_alone() -> None:
    """Whatever begins with DIVERSEVIT_ is a switch, or the folder."""
    root = Path(environment.__file__).parents[3]
    readers = {
        path.name
        for folder in ("kernels/diversevit_kernels", "diversevit_fast")
        for path in (root / folder).rglob("*.py")
        if any(
            re.search(r"environ(\.get)?[\[(]\W*DIVERSEVIT_", line)
            for line in path.read_text(encoding="utf-8").splitlines()
        )
    }
    assert readers == {"cache_folder.py"}


def test_cpu_capabilities_are_part_of_a_files_name(monkeypatch) -> None:
    before = library_cache.file_name("gelu", "source")
    assert before == library_cache.file_name("gelu", "source")
    assert before != library_cache.file_name("gelu", "another source")
    asked = {"raising": False}  # PyTorch 2.10 has no such list
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512": False}, **asked)
    listed = library_cache.file_name("gelu", "source")
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    one_word = library_cache.file_name("gelu", "source")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "of another processor")
    another_word = library_cache.file_name("gelu", "source")
    assert len({before, listed, another_word}) == len({listed, one_word, another_word}) == 3

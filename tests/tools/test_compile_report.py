"""The compile report: toy kernels with known faults, through the same recording, compiling and reading."""

import dataclasses
import inspect
import os
from collections import Counter
from importlib import import_module

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under TRITON_INTERPRET", allow_module_level=True)
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from diversevit_kernels.triton.runtime import launch, plan  # noqa: E402
from tools.kernel_analysis import cases, compile_report, compiling, machine_code  # noqa: E402
from tools.kernel_analysis.chips import CHIPS, resident  # noqa: E402
from tools.kernel_analysis.compiling import HostCall  # noqa: E402
from tools.kernel_analysis.operators import folder, with_flat_arguments  # noqa: E402, with_flat_arguments


@triton.jit
def _product(a_ptr, b_ptr, c_ptr, K, PRECISION: tl.constexpr, M: tl.constexpr, BK: tl.constexpr):
    """c = a bᵀ of [M, K] operands, in one loop over K."""
    m, k = tl.arange(0, M), tl.arange(0, BK)
    acc = tl.zeros([M, M], tl.float32)
    for start in range(0, K, BK):
        at = m[:, None] * K + start + k[None, :]
        a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    tl.store(c_ptr + m[:, None] * M + m[None, :], acc)


@triton.jit
def _columns(x_ptr, y_ptr, N, M: tl.constexpr, BN: tl.constexpr):
    """y = the sums of rows of exp(x), with a tile of M x BN alive across the only loop."""
    m, n = tl.arange(0, M), tl.arange(0, BN)
    total = tl.zeros([M, BN], tl.float32)
    for start in range(0, N, BN):
        x = tl.load(x_ptr + m[:, None] * N + start + n[None, :])
        total = total * 1.5 + tl.exp(x)
    tl.store(y_ptr + m[:, None] * BN + n[None, :], total)


@triton.jit
def _nested(x_ptr, y_ptr, rows, N, BN: tl.constexpr):
    """y = the sums of every row, row by row."""
    n = tl.arange(0, BN)
    for row in range(rows):
        total = tl.zeros([BN], tl.float32)
        for start in range(0, N, BN):
            total += tl.load(x_ptr + row * N + start + n)
        tl.store(y_ptr + row, tl.sum(total, 0))


@triton.jit
def _refused(x_ptr, BN: tl.constexpr):
    tl.static_assert(BN == 0, "on purpose")


def table(name, **configuration) -> plan.LaunchTable:
    served = plan.EVERY_CHIP, plan.ANY_SIZE, plan.ANY_WIDTH
    return plan.LaunchTable(name, plan.row(*served, **configuration))


# ``large`` and ``fat`` are the faulty ones
TABLES = {
    "product": table("product", warps=4, stages=3, M=64, BK=64),
    "large": table("large", warps=8, stages=3, M=256, BK=64),
    "columns": table("columns", warps=4, stages=1, M=16, BN=64),
    "fat": table("fat", warps=1, stages=1, M=64, BN=128),
    "nested": table("nested", warps=1, stages=1, BN=32),
    "refused": table("refused", warps=1, stages=1, BN=32),
}


def run(name, kernel, like, *args, **constants):
    """Launch one program of a toy."""
    launch.run_kernel(
        TABLES[name].plan(plan.target_of(like)), kernel, lambda _: 1, *args, **constants
    )


def product(name="product", dtype=torch.bfloat16, precision="tf32", K=512):
    a, c = (torch.empty(n, K, dtype=dtype, device="meta") for n in (256, 256))
    run(name, _product, a, a, a, c, K, PRECISION=precision)


def columns(name="columns", N=512):
    x = torch.empty(64, N, device="meta")
    run(name, _columns, x, x, x, N)


def nested():
    x = torch.empty(8, 512, device="meta")
    run("nested", _nested, x, x, x, 8, 512)


def refused():
    x = torch.empty(8, device="meta")
    run("refused", _refused, x, x)


def toy(host, *args, operator="attention", binding=True, **kwargs) -> HostCall:
    """A call that launches a toy in the name of an operator that exists."""
    case = f"{host.__name__}{args or ''}"
    call = lambda _: host(*args, **kwargs)  # noqa: E731
    return HostCall(operator, "forward", case, "bfloat16", 64, call, binding)


def rows_of(architecture, *some):
    rows, wrong = compile_report.report({architecture: list(some)}, 1)
    return rows, compile_report.failures_of(rows) + wrong


@pytest.mark.parametrize(
    ("architecture", "mnemonic"),
    [
        ("sm_80", "HMMA"),
        ("sm_90", "HGMMA"),
        ("sm_100", "UTCHMMA"),
        ("sm_120", "HMMA"),
        ("gfx942", "v_mfma"),
    ],
)
def test_a_product_uses_tensor_cores_inside_its_loop(architecture, mnemonic):
    (row,), failures = rows_of(architecture, toy(product))
    assert not failures
    assert row["tensor"]
    assert all(name.startswith(mnemonic) for name in row["tensor"])
    (loop,) = row["loops"]
    assert 0 < loop["tensor"] <= sum(row["tensor"].values())
    assert loop["ldg"] > 0
    assert loop["all"] < row["instructions"]
    assert row["shared"] >= 2 * 64 * 64 * 2  # two operands, at least one buffer each
    assert any(name.endswith(".128") for name in row["loads"])
    assert row["resident"] > 0


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "gfx942"])
def test_no_product_no_tensor_cores(architecture):
    (row,), failures = rows_of(architecture, toy(columns))
    assert not failures
    assert row["tensor"] == {}
    assert (row["stack"], row["local_in_loops"], row["ldl"], row["stl"]) == (0, 0, 0, 0)
    (loop,) = row["loops"]
    assert loop["mufu"] == 16 * 64 // (4 * CHIPS[architecture].warp_size)
    assert loop["fma"] >= loop["mufu"]


def test_spills_inside_a_loop_fail():
    (row,), failures = rows_of("sm_90", toy(columns, "fat"))
    assert row["spill_stores"] > 0
    assert row["spill_loads"] > 0
    assert row["ldl"] >= row["local_in_loops"] // 2 > 0
    assert row["stack"] > compile_report.STACK_LIMIT
    assert any("local-memory instructions inside loops" in line for line in failures)
    assert any("bytes of stack" in line for line in failures)


@pytest.mark.parametrize(
    ("architecture", "binding"), [("sm_90", False), ("sm_86", True), ("gfx942", True)]
)
def test_spills_are_a_note_where_nothing_is_promised(architecture, binding):
    (row,), failures = rows_of(architecture, toy(columns, "fat", binding=binding))
    assert not failures
    assert row["stack"] == 0 or row["notes"]
    assert architecture == "gfx942" or any("inside loops" in note for note in row["notes"])


def test_a_product_without_tensor_cores_fails():
    some = toy(product, dtype=torch.float32, precision="ieee")
    (row,), failures = rows_of("sm_80", some)
    assert row["tensor"] == {}
    assert any("without tensor cores" in line for line in failures)


def test_shared_memory_beyond_the_chip_fails_everywhere():
    (row,), failures = rows_of("sm_86", toy(product, "large", binding=False))
    assert row["shared"] > row["shared_limit"] == 99 * 1024
    assert any("shared memory" in line for line in failures)
    (row,), failures = rows_of("sm_90", toy(product, "large", binding=False))
    assert not any("shared memory" in line for line in failures)


def test_nested_loops():
    (found,), _ = compiling.record("sm_90", [toy(nested)])
    with compiling.fresh_compilers():
        code = compiling.compile_one(found).code
    outer, inner = sorted((x for x in code.loops if not x.waits), key=lambda x: x.depth)
    assert (outer.depth, outer.innermost) == (0, False)
    assert (inner.depth, inner.innermost) == (1, True)
    assert machine_code.counts(outer.opcodes)["stg"] == 1
    assert machine_code.counts(inner.opcodes)["stg"] == 0
    assert code.innermost == [inner]


SASS = """
//--------------------- .text.k                  --------------------------
k:
.text.k:
        /*0000*/                   MOV R1, R2 ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P3 BRA `(.L_x_3) ;
.L_x_2:
        /*0030*/                   CALL.REL.NOINC `($helper) ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
        /*0050*/                   STG.E desc[UR4][R2.64], R4 ;
        /*0060*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;
        /*0070*/                   EXIT ;
.L_x_3:
        /*0080*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR13], R99 ;
        /*0090*/              @!P3 BRA `(.L_x_3) ;
        /*00a0*/                   BRA `(.L_x_2) ;
$helper:
        /*00b0*/                   STL [R1], R4 ;
        /*00c0*/                   RET.REL.NODEC R2 `(k) ;
.L_x_4:
        /*00d0*/                   BRA `(.L_x_4);
"""


def test_loops_follow_jumps_not_addresses():
    """A wait behind the epilogue is in the loop, the epilogue is not; a called helper is."""
    program = machine_code.sass_program(SASS, "k")
    main, wait = sorted(program.loops(), key=lambda x: x.depth)
    assert (main.depth, main.innermost, main.waits) == (0, True, False)
    assert (wait.depth, wait.waits, wait.opcodes.total()) == (1, True, 2)
    counted = machine_code.counts(main.opcodes)
    assert (counted["ldg"], counted["stg"], counted["stl"]) == (1, 0, 1)
    code = machine_code.Code(8, 0, 0, 0, program.opcodes(range(14)), program.loops())
    assert (code.local_in_loops, code.local_in_innermost) == (1, 1)
    assert code.loads() == Counter({"LDG.128": 1, "LDG.16": 1})


NESTED = """
//--------------------- .text.k                  --------------------------
k:
        /*0000*/                   MOV R1, R2 ;
.L_x_1:
        /*0010*/                   STL [R1], R4 ;
.L_x_2:
        /*0020*/                   LDL R4, [R1] ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
        /*0040*/                   BRA.U !UP0, `(.L_x_1) ;
        /*0050*/                   BRA `(.L_x_3) ;
        /*0060*/                   STL [R1], R4 ;
        /*0070*/                   BRA `(.L_x_1) ;
.L_x_3:
        /*0080*/                   EXIT ;
"""


def test_spills_of_nested_loops_count_once_and_dead_code_not():
    program = machine_code.sass_program(NESTED, "k")
    code = machine_code.Code(8, 0, 0, 0, program.opcodes(range(9)), program.loops())
    assert sorted((x.depth, x.innermost, x.opcodes.total()) for x in code.loops) == [
        (0, False, 4),
        (1, True, 2),
    ]
    assert (code.local_in_loops, code.local_in_innermost) == (2, 1)


def test_the_limit_on_shared_memory_is_the_programs():
    (found,), _ = compiling.record("sm_86", [toy(product)])
    with compiling.fresh_compilers():
        binary = compiling.compile_one(found)
    fits = dataclasses.replace(binary, shared=99 * 1024)
    assert compile_report.check(found, fits) == ([], [])
    beyond = dataclasses.replace(binary, shared=99 * 1024 + 1)
    failures, _ = compile_report.check(found, beyond)
    assert failures == [f"shared memory {99 * 1024 + 1} of {99 * 1024} bytes"]


def test_a_jump_through_a_register_is_refused():
    text = SASS.replace("EXIT", "BRX R2 -0x10")
    with pytest.raises(ValueError, match="jump through a register"):
        machine_code.sass_program(text, "k")


@pytest.mark.parametrize(
    ("architecture", "registers", "warps", "shared", "expected"),
    [
        ("sm_90", 128, 4, 40960, 4),  # 4096 a warp: 4 per scheduler, 16 warps
        ("sm_90", 33, 4, 0, 12),  # 1056, given as 1280: 12 per scheduler
        ("sm_90", 16, 4, 0, 16),  # the limit on warps
        ("sm_90", 32, 4, 57 * 1024, 3),  # 228 KiB hold four of 57 but three of 58
        ("sm_90", 32, 8, 65536, 3),  # 228 KiB / 65 KiB
        ("sm_90", 255, 8, 0, 1),  # 8192 a warp: 8 warps
        ("sm_90", 255, 16, 0, 0),
        ("sm_90", 32, 4, 232448, 1),  # 227 KiB and the reserved one: all of it
        ("sm_80", 168, 8, 0, 1),  # 5376 a warp: 3 per scheduler, 12 warps
        ("sm_80", 16, 1, 0, 32),  # the limit on programs
        ("sm_86", 16, 1, 0, 16),
        ("sm_86", 64, 8, 0, 4),  # 2048 a warp: 32 warps
        ("sm_86", 40, 4, 0, 12),  # 1280 a warp: 12 per scheduler, 48 warps
        ("gfx942", 171, 4, 0, 2),  # 176 of 512: 2 waves per SIMD
        ("gfx942", 101, 4, 0, 4),  # given as 104
        ("gfx942", 64, 4, 32768, 2),  # 64 KiB of LDS
        ("gfx942", 64, 4, 512, 8),  # 8 waves per SIMD
    ],
)
def test_resident_programs(architecture, registers, warps, shared, expected):
    assert resident(CHIPS[architecture], registers, warps, shared) == expected


def test_resident_programs_share_tensor_memory():
    assert resident(CHIPS["sm_100"], 64, 4, 0, tensor_columns=256) == 2


def test_identical_compilations_are_compiled_once():
    same = [toy(product), toy(product, K=1024), toy(product, K=1000)]
    found, wrong = compiling.record("sm_90", same)
    assert not wrong
    assert sorted(len(one.calls) for one in found) == [1, 2]  # 1000 is not divisible by 16


def test_a_warm_cache_is_not_read(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for _ in range(2):
        (row,), _ = rows_of("sm_90", toy(columns, "fat"))
        assert row["spill_stores"] > 0  # known from the assembler's log only
    assert any(tmp_path.iterdir())


def test_nothing_is_left_in_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.setattr(triton.knobs.cache, "home_dir", str(tmp_path))
    rows_of("sm_90", toy(columns))
    assert not any(tmp_path.rglob("*"))


def test_what_is_missing_or_refused_fails():
    def unsupported():
        raise NotImplementedError("no row for this")

    some = [toy(product, operator="absent"), toy(unsupported), toy(refused), toy(lambda: None)]
    rows, failures = rows_of("sm_90", *some)
    assert rows == []
    for expected in (
        "absent_forward product bfloat16 width 64: missing: No module named",
        "NotImplementedError: no row for this",
        "launches nothing",
        "refused: CompileTimeAssertionFailure: at 2:4: ... on purpose",
    ):
        assert sum(expected in line for line in failures) == 1, (expected, failures)
    assert len(failures) == 4


def test_a_crash_costs_one_compilation(monkeypatch):
    compile_one = compiling.compile_one

    def crash(compilation):
        if compilation.launch.name == "nested":
            os._exit(3)
        return compile_one(compilation)

    monkeypatch.setattr(compiling, "compile_one", crash)
    rows, failures = rows_of("sm_90", toy(product), toy(nested), toy(columns))
    assert [r["kernel"] for r in rows] == ["columns", "product"]
    (line,) = failures
    assert "nested: the compiler crashed" in line


@pytest.mark.parametrize(
    ("some", "status"), [([toy(product)], 0), ([toy(columns, "fat"), toy(product)], 1)]
)
def test_the_command(monkeypatch, tmp_path, capsys, some, status):
    monkeypatch.setattr(compile_report, "chosen_calls", lambda *_: some)
    monkeypatch.setattr(compile_report, "RESULTS", tmp_path)
    command = ["--architectures", "sm_90", "--jobs", "1"]
    assert compile_report.main(command) == status
    printed = capsys.readouterr().out
    assert "sm_90a" in printed
    assert "HGMMA" in printed
    assert f"{0 if status == 0 else 2} failures" in printed
    assert (tmp_path / "compile_report.txt").read_text() == printed
    stored = compile_report.json.loads((tmp_path / "compile_report.json").read_text())
    assert len(stored["rows"]) == len(some)
    assert len(stored["failures"]) == (0 if status == 0 else 2)


def test_a_partial_run_replaces_its_own_rows_only(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(compile_report, "RESULTS", tmp_path)
    monkeypatch.setattr(compile_report, "chosen_calls", lambda *_: [toy(product)])
    for architectures in (["sm_80", "sm_90"], ["sm_90"]):
        command = ["--operators", "attention", "--jobs", "1", "--architectures", *architectures]
        assert compile_report.main(command) == 0
    stored = compile_report.stored()
    assert sorted(r["architecture"] for r in stored["rows"]) == ["sm_80", "sm_90"]
    assert len(stored["runs"]) == 2


@pytest.mark.parametrize("operator", cases.OPERATORS)
@pytest.mark.parametrize("quick", [False, True])
def test_calls_fit_the_host_functions(operator, quick):
    """Every call binds to the function's parameters, in all three orders."""
    try:
        module = import_module(f"diversevit_kernels.triton.{folder(operator)}")
    except ModuleNotFoundError:
        module = import_module(f"diversevit_kernels.cpu.{folder(operator)}")
    some = [call for d in cases.DTYPES for call in cases.host_calls(operator, d, 64, quick)]
    assert {call.order for call in some} == {"forward", "backward", "double_backward"}
    for call in some:
        signature = inspect.signature(
            with_flat_arguments(getattr(module, f"{operator}_{call.order}"))
        )
        call.call(signature.bind)
    names = [str(call) for call in some]
    assert len(names) == len(set(names))


def test_head_widths_up_to_128_are_binding():
    for width, binding in ((128, True), (256, False)):
        assert {call.binding for call in cases.host_calls("attention", "bfloat16", width)} == {
            binding
        }

"""What the compiler must not do to attention's arithmetic, read in machine code: the interpreter rounds as written."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled under TRITON_INTERPRET", allow_module_level=True)
pytest.importorskip("triton")

from tools.kernel_analysis import cases, compiling


def loop_of_backward_columns(width):
    """The instructions of the loop over query rows, in bfloat16 on Hopper."""
    calls = [
        call
        for call in cases.host_calls("attention", "bfloat16", width, quick=True)
        if call.order == "backward" and call.case.startswith("plain")
    ]
    found, wrong = compiling.record("sm_90", calls[:1])
    assert not wrong
    (columns,) = (one for one in found if one.launch.name == "attention_backward_columns")
    with compiling.fresh_compilers():
        code = compiling.compile_one(columns).code
    return code.innermost[0].opcodes


def test_scores_are_rounded_before_the_largest_is_subtracted():
    """80 ** -0.5 is no power of two. Were scale x yᵀ − top one instruction, P would not be exactly 1 where it must."""
    assert torch.tensor(80**-0.5).frexp().mantissa != 0.5
    opcodes = loop_of_backward_columns(80)
    assert opcodes["MUFU.EX2"] == 16
    assert not any(opcode.startswith("FFMA") for opcode in opcodes)


def test_an_exponential_is_one_instruction():
    """Beside it, an element is multiplied by log2(e) scale, by its share and by dP − Δ, which are two subtractions."""
    opcodes = loop_of_backward_columns(64)
    assert opcodes["MUFU.EX2"] == 16
    arithmetic = sum(n for op, n in opcodes.items() if op.startswith(("FADD", "FMUL", "FFMA")))
    assert arithmetic == 5 * 16
    assert not any(opcode.startswith("FSETP") for opcode in opcodes)
    assert opcodes["FSEL"] <= 8  # for statistics beyond the last row, none for elements

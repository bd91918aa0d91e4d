from __future__ import annotations

from pathlib import Path

import pytest

from nybble.kernels.compiled.sass import (
    InstructionMix,
    Resources,
    SassError,
    disassemble,
    loaded_bytes,
    parse_resources,
)

USAGE = """
Resource usage:
 Common:
  GLOBAL:0
 Function _kernel:
  REG:151 STACK:24 SHARED:1024 LOCAL:0 CONSTANT[0]:576 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def parsed(*lines: str) -> Resources:
    """Of instructions and labels, one each."""
    code = (line if line.endswith(":") else f"   /*0000*/  {line} ;" for line in (*lines, "EXIT"))
    return parse_resources(USAGE + "\n".join(code), num_warps=8, shared_bytes=4096, tensor_memory=32)


def loop(head: str, *body: str) -> list[str]:
    return [f".{head}:", *body, f"@P0 BRA `(.{head})"]


def hot_loop(*lines: str) -> InstructionMix:
    found = parsed(*lines).hot_loop
    assert found is not None
    return found


def test_resources_of_a_kernel() -> None:
    resources = parsed("LDG.E R0, [R2.64]", *loop("head", "FADD R1, R1, R2"))
    assert (resources.registers, resources.stack_bytes, resources.static_shared_bytes) == (151, 24, 1024)
    assert (resources.shared_bytes, resources.tensor_memory) == (4096, 32)
    assert (resources.num_warps, resources.threads) == (8, 256)
    assert resources.kernel.opcodes == {"LDG.E": 1, "FADD": 1, "BRA": 1, "EXIT": 1}
    assert resources.instructions == 4
    assert resources.loops == (InstructionMix(2, {"FADD": 1, "BRA": 1}),)


def test_a_listing_without_usage_is_an_error() -> None:
    with pytest.raises(SassError, match="no resource usage"):
        parse_resources("/*0000*/ EXIT ;", num_warps=4, shared_bytes=0, tensor_memory=0)


def test_an_instruction_that_never_runs_is_issued_all_the_same() -> None:
    mix = hot_loop(*loop("head", "@!PT LDS RZ, [RZ]", "@!P1 LDS R4, [R5]"))
    assert mix.instructions == 3
    assert mix.shared_loads == {"LDS": 1}


def test_counts_by_class() -> None:
    copies = ["LDGSTS.E.BYPASS.LTC128B.128 [R53+0x7000], [R12.64], P5"] * 2 + ["LDGSTS.E [R6], [R4.64]"]
    loads = ["LDG.E.128.CONSTANT R4, desc[UR4][R2.64]", "LDG.E.U8 R4, desc[UR4][R2.64+0x1]"]
    shared = ["LDS.U8 R3, [R2]", "LDS.U16 R3, [R2]", "LDS.128 R4, [R2]", "LDSM.16.M88.4 R36, [R9+UR11]"]
    others = [
        "UTMALDG.2D [UR8], [UR4]",
        "SHFL.BFLY PT, R2, R3, 0x1, 0x1f",
        "LDL.LU.64 R4, [R1]",
        "STL [R1], R4",
    ]
    mix = hot_loop(*loop("head", *copies, *loads, *shared, *others))
    assert mix.async_copies == {"LDGSTS.E.BYPASS.LTC128B.128": 2, "LDGSTS.E": 1}
    assert mix.global_loads == {"LDG.E.128.CONSTANT": 1, "LDG.E.U8": 1}
    assert mix.global_bytes_per_thread == 2 * 16 + 4 + 16 + 1
    assert mix.shared_loads == {"LDS.U8": 1, "LDS.U16": 1, "LDS.128": 1, "LDSM.16.M88.4": 1}
    assert mix.narrow_shared_loads == {"LDS.U8": 1, "LDS.U16": 1}
    assert mix.bulk_copies == {"UTMALDG.2D": 1}
    assert mix.shuffles == 1
    assert mix.spills == {"LDL.LU.64": 1, "STL": 1}
    assert list(mix.families().items())[:2] == [("LDGSTS", 3), ("LDS", 3)]


@pytest.mark.parametrize(
    "opcode",
    [
        "HMMA.16816.F32.BF16",
        "HGMMA.64x16x16.F32.BF16",
        "QGMMA.64x16x32.F32.E4M3.E4M3",
        "QMMA.16832.F32.E4M3.E4M3",
        "OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X",
        "IMMA.16832.S8.S8",
        "UTCHMMA",
        "UTCQMMA.2CTA",
        "UTCOMMA.4X",
    ],
)
def test_matrix_instructions(opcode: str) -> None:
    assert InstructionMix(3, {opcode: 2, "FFMA": 1}).matrix == {opcode: 2}


@pytest.mark.parametrize("opcode", ["UTCBAR", "UTCATOMSWS.AND", "FFMA", "HFMA2.BF16_V2", "LDTM.x16", "IMAD"])
def test_other_instructions_are_not_matrix_instructions(opcode: str) -> None:
    assert InstructionMix(1, {opcode: 1}).num_matrix == 0


@pytest.mark.parametrize(
    ("opcode", "size"),
    [
        ("LDG.E", 4),
        ("LDG.E.S8", 1),
        ("LDG.E.U16.CONSTANT", 2),
        ("LDG.E.64", 8),
        ("LDG.E.ENL2.256", 32),
        ("LDGSTS.E.BYPASS.128", 16),
        ("LDS", 4),
        ("LDSM.16.M88.4", 16),
        ("LDSM.16.MT88.2", 8),
        ("LDSM.16.M88", 4),
    ],
)
def test_loaded_bytes(opcode: str, size: int) -> None:
    assert loaded_bytes(opcode) == size


def test_a_kernel_without_a_loop_has_no_hot_loop() -> None:
    assert parsed("FADD R1, R1, R2").hot_loop is None


def test_the_hot_loop_is_that_with_the_most_matrix_instructions() -> None:
    few = loop("few", "HMMA.16816.F32.BF16 R4, R8, R12, R4", *["FADD R1, R1, R2"] * 9)
    many = loop("many", *["HMMA.16816.F32.BF16 R4, R8, R12, R4"] * 2)
    long = loop("long", "LDG.E R0, [R2.64]", *["FADD R1, R1, R2"] * 20)
    assert hot_loop(*few, *many, *long).num_matrix == 2


def test_the_hot_loop_is_an_inner_one_though_its_outer_holds_more() -> None:
    inner = loop("inner", "HMMA.16816.F32.BF16 R4, R8, R12, R4")
    outer = loop("outer", *["HMMA.16816.F32.BF16 R4, R8, R12, R4"] * 5, *inner)
    assert hot_loop(*outer).opcodes == {"HMMA.16816.F32.BF16": 1, "BRA": 1}


def test_a_spin_within_the_hot_loop_does_not_take_its_place() -> None:
    spin = loop("spin", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3")
    for work in ("HGMMA.64x16x16.F32.BF16 R24, gdesc[UR32], R24", "LDG.E R0, [R2.64]"):
        assert hot_loop(*loop("head", work, *spin)).instructions == 4


def test_without_matrix_instructions_the_hot_loop_is_the_longest_that_loads() -> None:
    short = loop("short", "LDG.E R0, [R2.64]")
    longer = loop("longer", "LDS R0, [R2]", "FADD R1, R1, R2")
    longest = loop("longest", *["FADD R1, R1, R2"] * 9)
    assert hot_loop(*short, *longer, *longest).opcodes == {"LDS": 1, "FADD": 1, "BRA": 1}
    assert hot_loop(*loop("one", "FADD R1, R1, R2"), *longest).instructions == 10


def tool(directory: Path, name: str, script: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_both_tools_are_given_the_cubin(tmp_path: Path) -> None:
    tool(tmp_path, "cuobjdump", 'echo "$1"; cat "$2"')
    tool(tmp_path, "nvdisasm", 'echo "$1"; wc -c < "$2"')
    assert disassemble(b"cubin\n", tmp_path) == "-res-usage\ncubin\n-c\n6\n"


def test_a_tool_that_refuses_is_an_error(tmp_path: Path) -> None:
    tool(tmp_path, "cuobjdump", "echo not a cubin >&2; exit 3")
    with pytest.raises(SassError, match="cuobjdump: not a cubin"):
        disassemble(b"", tmp_path)

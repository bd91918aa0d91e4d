from __future__ import annotations

from nybble.kernels.compiled.control_flow import Code, Instruction, parse_code


def code(text: str) -> Code:
    """Of one instruction or one label with a colon a line, written as nvdisasm writes them."""
    lines = (line.strip() for line in text.strip().splitlines())
    return parse_code(
        "\n".join(line if line.endswith(":") else f"        /*0000*/    {line} ;" for line in lines)
    )


def loops(text: str) -> list[list[int]]:
    return [sorted(body) for body in code(text).loops()]


def test_instructions_are_read_from_a_listing() -> None:
    parsed = parse_code("""
\t.target\tsm_90a
//--------------------- .text._kernel         --------------------------
        .size           _kernel,(.L_x_1 - _kernel)
_kernel:
.text._kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_1) ;
        /*00a0*/              @UP1 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0b30*/                   HGMMA.64x16x16.F32.BF16 R32, R40, gdesc[UR16], R32, gsb0 ;
.L_x_1:
        /*1fd40*/                  NOP;
        /*1fd50*/                  EXIT ;
""")
    assert parsed.instructions == (
        Instruction("LDC", "R1, c[0x0][0x28]"),
        Instruction("BRA", "`(.L_x_1)", "!P0"),
        Instruction("UIADD3", "UR4, UR4, 0x1, URZ", "UP1"),
        Instruction("HGMMA.64x16x16.F32.BF16", "R32, R40, gdesc[UR16], R32, gsb0"),
        Instruction("NOP"),
        Instruction("EXIT"),
    )
    assert parsed.labels == {"_kernel": 0, ".text._kernel": 0, ".L_x_1": 4}
    assert parsed.instructions[3].family == "HGMMA"


def test_a_branch_back_makes_a_loop_of_what_lies_between() -> None:
    assert loops("""
        MOV R0, RZ
        .head:
        FADD R1, R1, R2
        @P0 BRA `(.head)
        EXIT
    """) == [[1, 2]]


def test_no_instructions_no_loops() -> None:
    assert code("").loops() == [] and code("").reachable() == set()


def test_a_condition_may_stand_among_the_operands() -> None:
    assert loops("""
        .head:
        UIADD3 UR4, UR4, 0x1, URZ
        BRA.U UP0, `(.head)
        EXIT
    """) == [[0, 1]]


def test_branches_back_to_one_head_are_one_loop() -> None:
    assert loops("""
        .head:
        FADD R1, R1, R2
        @P0 BRA `(.head)
        FMUL R1, R1, R2
        @P1 BRA `(.head)
        EXIT
    """) == [[0, 1, 2, 3]]


def test_loops_nest() -> None:
    assert loops("""
        .outer:
        MOV R1, RZ
        .inner:
        FADD R1, R1, R2
        @P0 BRA `(.inner)
        @P1 BRA `(.outer)
        EXIT
    """) == [[0, 1, 2, 3], [1, 2]]


def test_a_wait_moved_out_of_line_belongs_to_its_loop_and_what_follows_the_loop_does_not() -> None:
    assert loops("""
        .head:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3
        @!P0 BRA `(.wait)
        .ready:
        FADD R1, R1, R2
        @P1 BRA `(.head)
        STG.E [R2.64], R1
        EXIT
        .wait:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3
        @!P0 BRA `(.wait)
        BRA `(.ready)
    """) == [[0, 1, 2, 3, 6, 7, 8], [6, 7]]


def test_padding_is_not_reached() -> None:
    padded = code("""
        MOV R0, RZ
        EXIT
        .trap:
        BRA `(.trap)
        NOP
    """)
    assert padded.loops() == []
    assert padded.reachable() == {0, 1}


def test_what_follows_a_jump_is_not_reached_by_it() -> None:
    jumps = ["EXIT", "RET.REL.NODEC R2", "BRA `(.end)", 'BRX R4 -0x10 (*"BRANCH_TARGETS .end"*)']
    for jump in jumps:
        assert 1 not in code(f"{jump}\nNOP\n.end:\nEXIT").reachable(), jump


def test_a_predicated_exit_may_be_passed() -> None:
    assert code("@P0 EXIT\nNOP\nEXIT").reachable() == {0, 1, 2}


def test_threads_meet_again_where_the_barrier_says() -> None:
    assert loops("""
        .head:
        BSSY B0, `(.met)
        @P0 BRA `(.apart)
        BSYNC B0
        .met:
        @P1 BRA `(.head)
        EXIT
        .apart:
        LDG.E R1, [R2.64]
        BSYNC B0
    """) == [[0, 1, 2, 3, 5, 6]]


def test_barriers_are_told_apart() -> None:
    reached = code("""
        BSSY B1, `(.one)
        BSSY B10, `(.ten)
        BSYNC B1
        FADD R1, R1, R2
        .one:
        EXIT
        .ten:
        EXIT
    """).reachable()
    assert reached == {0, 1, 2, 4}


def test_an_indexed_branch_reaches_its_table() -> None:
    table = '(*"BRANCH_TARGETS .one,.two"*)'
    assert loops(f"""
        BRX R4 -0x1bd0                          {table}
        NOP
        .one:
        FADD R1, R1, R2
        @P0 BRA `(.one)
        EXIT
        .two:
        FMUL R1, R1, R2
        @P0 BRA `(.two)
        EXIT
    """) == [[2, 3], [5, 6]]


def test_a_called_function_is_reached_and_returns() -> None:
    called = code("""
        CALL.REL.NOINC `($square)
        EXIT
        $square:
        FMUL R1, R1, R1
        @P0 BRA `($square)
        RET.REL.NODEC R2 `(_kernel)
        NOP
    """)
    assert called.reachable() == {0, 1, 2, 3, 4}
    assert [sorted(body) for body in called.loops()] == [[2, 3]]


def test_a_function_of_the_driver_is_called_and_not_followed() -> None:
    assert code("CALL.ABS.NOINC `(vprintf)\nEXIT").reachable() == {0, 1}

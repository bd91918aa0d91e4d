"""What a compiled kernel takes and what its loops are made of, read from the tools' listings of a cubin.

A count is of instructions as they stand in the code: one in a branch or under a predicate counts like any
other, and a spin on a barrier counts once. A compiler may also unroll a loop or peel it, so one pass need not
be one pass of the source: the bytes that a pass loads and its matrix instructions tell how many items of work
it does. In a warp-specialised kernel each group of warps has its own loops, and only they run them.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nybble.kernels.compiled.control_flow import Code, Instruction, parse_code

_USAGE = re.compile(r"REG:(?P<registers>\d+) STACK:(?P<stack>\d+) SHARED:(?P<shared>\d+)")
_MATRIX = re.compile(r"(?:UTC[A-Z]*|[DHIOQ]G?)MMA")
_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_LOADS = ("LDG", "LDGSTS", "UTMALDG", "UBLKCP", "LDS", "LDSM")


class SassError(Exception):
    """A tool refused a cubin, or its listing has another form than known."""


@dataclass(frozen=True)
class InstructionMix:
    """How often each opcode, modifiers included, stands in a loop or a kernel.

    instructions: all that are issued. opcodes: without those that are off for good (`@!PT LDS RZ, [RZ]`),
    which ptxas writes to keep others apart.
    """

    instructions: int
    opcodes: dict[str, int]

    @property
    def matrix(self) -> dict[str, int]:
        return {opcode: n for opcode, n in self.opcodes.items() if _MATRIX.fullmatch(_family(opcode))}

    @property
    def num_matrix(self) -> int:
        return sum(self.matrix.values())

    @property
    def global_loads(self) -> dict[str, int]:
        """To registers."""
        return self.of("LDG")

    @property
    def async_copies(self) -> dict[str, int]:
        """From global to shared memory, by each thread."""
        return self.of("LDGSTS")

    @property
    def bulk_copies(self) -> dict[str, int]:
        """From global to shared memory, by the copy engine; the code does not say how many bytes."""
        return self.of("UTMALDG", "UBLKCP")

    @property
    def shared_loads(self) -> dict[str, int]:
        return self.of("LDS", "LDSM")

    @property
    def narrow_shared_loads(self) -> dict[str, int]:
        """Of one or two bytes, where one instruction could bring sixteen."""
        return {opcode: n for opcode, n in self.of("LDS").items() if loaded_bytes(opcode) < 4}

    @property
    def shuffles(self) -> int:
        return sum(self.of("SHFL").values())

    @property
    def spills(self) -> dict[str, int]:
        """Loads and stores of a thread's stack."""
        return self.of("LDL", "STL")

    @property
    def global_bytes_per_thread(self) -> int:
        """Loaded by LDG and LDGSTS if no predicate is off. Where a tile has fewer bytes than the threads of
        a block can load at once, several load the same."""
        return sum(n * loaded_bytes(opcode) for opcode, n in self.of("LDG", "LDGSTS").items())

    def of(self, *families: str) -> dict[str, int]:
        """Those of `opcodes` that are one of `families`, whatever their modifiers."""
        return {opcode: n for opcode, n in self.opcodes.items() if _family(opcode) in families}

    def families(self) -> dict[str, int]:
        """Counts without modifiers, the most frequent first."""
        counts: Counter[str] = Counter()
        for opcode, n in self.opcodes.items():
            counts[_family(opcode)] += n
        return dict(counts.most_common())


@dataclass(frozen=True)
class Resources:
    """Of one kernel.

    registers, stack_bytes: of a thread; there is a stack where something is spilled
    shared_bytes: of a block, dynamic; static_shared_bytes: the rest, from 9.0 on 1024 that the system takes
    num_warps: of a block, with those that the compiler adds
    tensor_memory: columns
    kernel: all instructions that can be reached
    loops: in the order of the code
    hot_loop: of the innermost loops the one with the most matrix instructions; if none has any, the longest
        that loads (a spin on a barrier does not); if none does, the longest
    scattered_operands: of inline assembly, see `packed_operands`
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    static_shared_bytes: int
    num_warps: int
    tensor_memory: int
    kernel: InstructionMix
    loops: tuple[InstructionMix, ...]
    hot_loop: InstructionMix | None
    scattered_operands: tuple[str, ...] = ()

    @property
    def threads(self) -> int:
        return 32 * self.num_warps

    @property
    def instructions(self) -> int:
        return self.kernel.instructions


def disassemble(cubin: bytes, tools: Path) -> str:
    """What cuobjdump and nvdisasm, both in `tools`, write of a cubin: usage, then code. Raises SassError."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        return usage + _output(tools / "nvdisasm", "-c", file.name)


def parse_resources(listing: str, *, num_warps: int, shared_bytes: int, tensor_memory: int) -> Resources:
    """Of the one kernel in what `disassemble` returned; the numbers are what the compiler says of the launch.
    Raises SassError."""
    usage = _USAGE.search(listing)
    if usage is None:
        raise SassError(f"no resource usage in {listing[:200]!r}")
    code = parse_code(listing)
    loops = [(body, _mix(code, body)) for body in code.loops()]
    return Resources(
        registers=int(usage["registers"]),
        stack_bytes=int(usage["stack"]),
        shared_bytes=shared_bytes,
        static_shared_bytes=int(usage["shared"]),
        num_warps=num_warps,
        tensor_memory=tensor_memory,
        kernel=_mix(code, code.reachable()),
        loops=tuple(mix for _, mix in loops),
        hot_loop=_hottest(loops),
    )


def loaded_bytes(opcode: str) -> int:
    """That one thread loads: LDG.E.128 16, LDS.U8 1; of LDSM.16.M88.4, four matrices, 16."""
    modifiers = opcode.split(".")[1:]
    if _family(opcode) == "LDSM":
        return 4 * (int(modifiers[-1]) if modifiers[-1].isdigit() else 1)
    return next((_BYTES[modifier] for modifier in modifiers if modifier in _BYTES), 4)


def _hottest(loops: list[tuple[frozenset[int], InstructionMix]]) -> InstructionMix | None:
    with_matrix = [loop for loop in loops if loop[1].num_matrix]
    with_loads = [loop for loop in loops if loop[1].of(*_LOADS)]
    chosen = _innermost(with_matrix or with_loads or loops)
    return max(chosen, key=lambda mix: (mix.num_matrix, mix.instructions), default=None)


def _innermost(loops: list[tuple[frozenset[int], InstructionMix]]) -> list[InstructionMix]:
    return [mix for body, mix in loops if not any(other < body for other, _ in loops)]


def _mix(code: Code, indices: Iterable[int]) -> InstructionMix:
    instructions = [code.instructions[index] for index in sorted(indices)]
    running = (instruction.opcode for instruction in instructions if _can_run(instruction))
    return InstructionMix(len(instructions), dict(Counter(running)))


def _can_run(instruction: Instruction) -> bool:
    return instruction.predicate != "!PT"


def _family(opcode: str) -> str:
    return opcode.partition(".")[0]


def _output(tool: Path, *arguments: str) -> str:
    done = subprocess.run([tool, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SassError(f"{tool.name}: {done.stderr.strip()}")
    return done.stdout

"""The instructions of a kernel and its loops, from the text that `nvdisasm -c` writes.

Loops are found in the flow of control, not by their place in the text: ptxas moves waits out of the line of a
loop, and the jump back from there is no loop of its own. Blocks that nothing reaches (the padding at the end,
which jumps to itself) belong to nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LABEL = re.compile(r"^([.$\w]+):$")
_INSTRUCTION = re.compile(r"^/\*[0-9a-f]+\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\(([.$\w]+)\)")
_TABLE = re.compile(r'"BRANCH_TARGETS ([^"]+)"')


@dataclass(frozen=True)
class Instruction:
    """predicate: what must hold for it to run ("!P0"), or empty."""

    opcode: str
    operands: str = ""
    predicate: str = ""

    @property
    def family(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def targets(self) -> list[str]:
        """The labels that it names: one, or of an indexed branch the table."""
        table = _TABLE.search(self.operands)
        return table.group(1).split(",") if table else _TARGET.findall(self.operands)

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction can follow. A branch may name its condition as an operand, too."""
        if self.predicate:
            return True
        if self.family in ("BRA", "JMP"):
            return not self.operands.startswith("`")
        return self.family not in ("EXIT", "RET", "BRX", "BSYNC")


@dataclass(frozen=True)
class Code:
    """labels: the index of the instruction that each stands before."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]

    def reachable(self) -> set[int]:
        return set(self._walk()[0])

    def loops(self) -> list[frozenset[int]]:
        """The instructions of each loop, by index, in the order of their heads; jumps back to the same head
        are one loop."""
        successors, back_edges = self._walk()
        predecessors: dict[int, list[int]] = {index: [] for index in successors}
        for index, following in successors.items():
            for other in following:
                predecessors[other].append(index)
        bodies: dict[int, set[int]] = {}
        for tail, head in back_edges:
            _add_paths(bodies.setdefault(head, {head}), tail, predecessors)
        return [frozenset(bodies[head]) for head in sorted(bodies)]

    def _walk(self) -> tuple[dict[int, list[int]], list[tuple[int, int]]]:
        """Depth first from the start: what can follow each instruction, and the edges back into the path."""
        if not self.instructions:
            return {}, []
        successors = {0: self._successors(0)}
        back_edges = []
        path = {0: iter(successors[0])}
        while path:
            index = next(reversed(path))
            following = next(path[index], None)
            if following is None:
                del path[index]
            elif following in path:
                back_edges.append((index, following))
            elif following not in successors:
                successors[following] = self._successors(following)
                path[following] = iter(successors[following])
        return successors, back_edges

    def _successors(self, index: int) -> list[int]:
        instruction = self.instructions[index]
        following = [index + 1] if instruction.falls_through else []
        if instruction.family in ("BRA", "BRX", "JMP", "CALL"):
            known = filter(self.labels.__contains__, instruction.targets)  # not functions of the driver
            following += [self.labels[label] for label in known]
        elif instruction.family == "BSYNC":
            following.append(self._meeting_point(index))
        return [other for other in following if other < len(self.instructions)]

    def _meeting_point(self, index: int) -> int:
        """Where BSYNC goes on: at the label of the nearest BSSY above that has the same barrier."""
        barrier = self.instructions[index].operands
        for earlier in reversed(self.instructions[:index]):
            if earlier.family == "BSSY" and earlier.operands.startswith(f"{barrier},"):
                return self.labels[earlier.targets[0]]
        return index + 1


def parse_code(listing: str) -> Code:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in map(str.strip, listing.splitlines()):
        if label := _LABEL.match(line):
            labels[label.group(1)] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            predicate, opcode, operands = found.groups(default="")
            instructions.append(Instruction(opcode, operands, predicate))
    return Code(tuple(instructions), labels)


def _add_paths(body: set[int], tail: int, predecessors: dict[int, list[int]]) -> None:
    """Add what leads to `tail` without passing what is in `body`."""
    waiting = [tail]
    while waiting:
        index = waiting.pop()
        if index not in body:
            body.add(index)
            waiting.extend(predecessors[index])

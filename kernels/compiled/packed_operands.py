"""Whether inline assembly that takes several elements at a time takes neighbours.

`tl.inline_asm_elementwise(..., pack=p)` gives an assembly p elements that lie in successive registers of a
thread. Our assemblies read the bits of two 16-bit codes as one word, so these must be neighbours of the last
axis. Which layout an operand has is Triton's choice, and differs between its versions: a wrong one computes
wrong numbers, and the interpreter cannot show it. The intermediate code (TTGIR) tells:

    #ttg.linear<{register = [[0, 1], [8, 0], ...      the second register holds the next column
    #ttg.blocked<{sizePerThread = [1, 4], ..., order = [1, 0]}>
    #ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 2}>
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

_ALIAS = re.compile(r"^(#\w+) = (.*)$", re.MULTILINE)
_ASSEMBLY = re.compile(r'elementwise_inline_asm ".*?packed_element = (\d+).*?\} .*? : (.*?) -> ')
_TENSOR = re.compile(r"tensor<((?:\d+x)+)(\w+), ((?:[^<>]|<[^<>]*>)*)>")
_BASES = re.compile(r"register = \[((?:\[[\d, ]*\](?:, )?)*)\]")
_FIELD = r"{} = \[([\d, ]*)\]"


def scattered_operands(ttgir: str) -> list[str]:
    """The operands, as type and layout, of which an assembly is given elements that are no neighbours."""
    aliases = dict(_ALIAS.findall(ttgir))
    return sorted(
        {
            f"{shape}{element} in {layout}"
            for pack, shape, element, layout in _packed_operands(ttgir, aliases)
            if _contiguous(layout, rank=shape.count("x")) < pack
        }
    )


def _packed_operands(ttgir: str, aliases: Mapping[str, str]) -> Iterator[tuple[int, str, str, str]]:
    for pack, operands in _ASSEMBLY.findall(ttgir):
        if int(pack) > 1:
            for shape, element, layout in _TENSOR.findall(operands):
                yield int(pack), shape, element, aliases.get(layout, layout)


def _contiguous(layout: str, rank: int) -> int:
    """How many neighbours of the last axis a thread's first registers hold; 1 if the layout is not known."""
    if layout.startswith("#ttg.linear"):
        return _contiguous_bases(layout, rank)
    if layout.startswith("#ttg.blocked"):
        sizes, order = _numbers(layout, "sizePerThread"), _numbers(layout, "order")
        return sizes[-1] if order[0] == rank - 1 else 1
    width = re.search(r"opIdx = 0, .*kWidth = (\d+)", layout)
    return int(width[1]) if width else 1


def _contiguous_bases(layout: str, rank: int) -> int:
    found = _BASES.search(layout)
    bases = re.findall(r"\[([\d, ]*)\]", found[1]) if found else []
    count = 1
    for basis in bases:
        if [int(number) for number in basis.split(", ")] != [0] * (rank - 1) + [count]:
            break
        count *= 2
    return count


def _numbers(layout: str, name: str) -> list[int]:
    found = re.search(_FIELD.format(name), layout)
    return [int(number) for number in found[1].split(", ")] if found else []

"""Looking up the rows of token ids."""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from nybble.kernels.ops import Embedding
from nybble.kernels.triton.launch import launch as launch_kernel

_COLUMNS = 1024
_PER_WARP = 256  # 16 bytes of bfloat16 for each thread


@dataclass(frozen=True)
class EmbeddingLaunch:
    """A program copies `columns`, a power of two, of one row."""

    columns: int
    num_warps: int


def embedding_launch(width: int, arch: int) -> EmbeddingLaunch:
    """The same on every architecture."""
    columns = min(triton.next_power_of_2(width), _COLUMNS)
    return EmbeddingLaunch(columns, num_warps=max(columns // _PER_WARP, 1))


def embed(token_ids: Tensor, embedding: Embedding, *, launch: EmbeddingLaunch) -> Tensor:
    """[T, H]: the rows of token_ids int64 [T], zeros for those that the table does not hold."""
    table = embedding.table
    num_ids, width = table.shape
    output = table.new_empty(len(token_ids), width)
    launch_kernel(
        _embedding_kernel,
        (len(token_ids), triton.cdiv(width, launch.columns)),
        token_ids,
        table,
        output,
        embedding.first_id,
        num_ids,
        width,
        table.stride(0),
        COLUMNS=launch.columns,
        num_warps=launch.num_warps,
    )
    return output


@triton.jit
def _embedding_kernel(
    token_ids_ptr, table_ptr, output_ptr, first_id, num_ids, width, table_stride, COLUMNS: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.load(token_ids_ptr + token) - first_id
    num_held = tl.where((row >= 0) & (row < num_ids), width, 0)
    values = tl.load(table_ptr + row * table_stride + columns, mask=columns < num_held, other=0.0)
    tl.store(output_ptr + token * width + columns, values, mask=columns < width)

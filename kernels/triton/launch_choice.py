"""Which launch configuration a matrix gets: what the code would choose, or what was measured to be faster.

Table keys are those of `nybble bench ops --tune`: the format of the weights, rows and width of the matrix,
and the number of tokens rounded up to a power of two, or that of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from nybble.kernels.triton.expert_decode import (
    ExpertDecodeLaunch,
    expert_down_launch,
    expert_gate_up_launch,
)
from nybble.kernels.triton.expert_grouped import ExpertGroupedLaunch, expert_grouped_launch
from nybble.kernels.triton.fp4_linear import Fp4LinearLaunch, fp4_linear_launch
from nybble.kernels.triton.fp4_matrix import Fp4Matrix
from nybble.kernels.triton.fp8_linear import Fp8LinearLaunch, fp8_linear_launch
from nybble.kernels.triton.fp8_matrix import Fp8Matrix
from nybble.kernels.triton.launch_policy import ADAPTIVE, LaunchPolicy
from nybble.kernels.triton.launch_table import L, LaunchTable, bucket

# What a launch table may hold.
TUNABLE_OPS: dict[str, type] = {
    "fp4_linear": Fp4LinearLaunch,
    "fp8_linear": Fp8LinearLaunch,
    "expert_gate_up": ExpertDecodeLaunch,
    "expert_down": ExpertDecodeLaunch,
    "grouped_gate_up": ExpertGroupedLaunch,
    "grouped_down": ExpertGroupedLaunch,
}


@dataclass(frozen=True)
class LaunchChoice:
    """arch: compute capability times ten, one of those that kernels are tuned for. Counts of tokens are what
    `tokens` gives for a step's."""

    arch: int
    policy: LaunchPolicy = ADAPTIVE
    table: LaunchTable = field(default_factory=LaunchTable)

    def tokens(self, num_tokens: int) -> int:
        """For how many tokens to launch where there are num_tokens."""
        return self.policy.tokens(num_tokens)

    def fp4_linear(self, num_tokens: int, matrix: Fp4Matrix) -> Fp4LinearLaunch:
        default = fp4_linear_launch(num_tokens, matrix.num_rows, matrix.width, self.arch)
        return self._tuned("fp4_linear", matrix, {"tokens": bucket(num_tokens)}, default)

    def fp8_linear(self, num_tokens: int, matrix: Fp8Matrix) -> Fp8LinearLaunch:
        default = fp8_linear_launch(num_tokens, matrix.num_rows, matrix.width, self.arch)
        return self._tuned("fp8_linear", matrix, {"tokens": bucket(num_tokens)}, default)

    def expert_gate_up(self, num_tokens: int, num_pairs: int, gate_up: Fp4Matrix) -> ExpertDecodeLaunch:
        """For num_pairs pairs of a token with an expert, of num_tokens tokens."""
        default = expert_gate_up_launch(num_pairs, gate_up.width, gate_up.num_rows // 2, self.arch)
        return self._tuned("expert_gate_up", gate_up, {"tokens": bucket(num_tokens)}, default)

    def expert_down(self, num_tokens: int, top_k: int, down: Fp4Matrix) -> ExpertDecodeLaunch:
        default = expert_down_launch(num_tokens, top_k, down.num_rows, self.arch)
        return self._tuned("expert_down", down, {"tokens": bucket(num_tokens)}, default)

    def grouped_gate_up(self, block_m: int, gate_up: Fp4Matrix) -> ExpertGroupedLaunch:
        return self._grouped("grouped_gate_up", block_m, gate_up)

    def grouped_down(self, block_m: int, down: Fp4Matrix) -> ExpertGroupedLaunch:
        return self._grouped("grouped_down", block_m, down)

    def _grouped(self, op: str, block_m: int, matrix: Fp4Matrix) -> ExpertGroupedLaunch:
        default = expert_grouped_launch(block_m, matrix.num_rows, matrix.width, self.arch)
        return self._tuned(op, matrix, {"block_m": block_m}, default)

    def _tuned(self, op: str, matrix: Fp4Matrix | Fp8Matrix, shape: dict[str, int], default: L) -> L:
        if not self.table.launches:
            return default
        shape |= {"rows": matrix.num_rows, "width": matrix.width}
        return self.table.tuned(op, self.arch, _format_name(matrix), shape, default)


def _format_name(matrix: Fp4Matrix | Fp8Matrix) -> str:
    if isinstance(matrix, Fp8Matrix):
        return "fp8"
    return "nvfp4" if matrix.block_size == 16 else "mxfp4"

"""The feed-forward part of a layer on the native library: norm, router and experts in one call."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from nybble.kernels.cpu.cpu_matrix import CpuMatrix
from nybble.kernels.cpu.cpu_router import router_matrix
from nybble.kernels.cpu.native_forms import NativeForms
from nybble.kernels.cpu.pool import Pool
from nybble.kernels.cpu.tensor_pointer import pointer
from nybble.kernels.ops import DenseWeights, MlpWeights, MoeWeights, RmsNorm, RouterWeights


class _Router(ctypes.Structure):
    """struct nybble_router."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("top_k", ctypes.c_int64),
        ("num_groups", ctypes.c_int64),
        ("top_k_groups", ctypes.c_int64),
        ("normalizes", ctypes.c_int64),
        ("scale", ctypes.c_float),
    )


class _Mlp(ctypes.Structure):
    """struct nybble_mlp."""

    _fields_ = (("gate_up", ctypes.c_void_p), ("down", ctypes.c_void_p))


class _Layer(ctypes.Structure):
    """struct nybble_layer."""

    _fields_ = (
        ("norm_weight", ctypes.c_void_p),
        ("router", _Router),
        ("experts", _Mlp),
        ("mlp", _Mlp),
        ("first_expert", ctypes.c_int64),
        ("eps", ctypes.c_float),
    )


class _Arguments(ctypes.Structure):
    """struct nybble_feed_forward."""

    _fields_ = (
        ("layer", ctypes.c_void_p),
        ("hidden", ctypes.c_void_p),
        ("update", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
    )


@dataclass(frozen=True)
class _Prepared:
    """A layer's structure. The weights that it points to outlive it; `router` is a view of theirs."""

    layer: _Layer
    width: int
    router: CpuMatrix | None

    @property
    def address(self) -> int:
        return ctypes.addressof(self.layer)


class FeedForward:
    """Dense and sparse layers of a pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._operation = pool.operation("nybble_feed_forward", _Arguments)
        self._dense = NativeForms(_prepare_dense)
        self._sparse = NativeForms(_prepare_sparse)

    def dense_mlp(
        self, hidden: Tensor, update: Tensor | None, weights: DenseWeights[CpuMatrix]
    ) -> tuple[Tensor, Tensor]:
        """hidden + update, in the place of hidden, and the MLP of its norm; all float32 [T, H].

        Raises:
            ValueError: a shape, dtype, device or layout is not as said.
        """
        return self._run(self._dense(weights), hidden, update)

    def moe(
        self, hidden: Tensor, update: Tensor | None, weights: MoeWeights[CpuMatrix]
    ) -> tuple[Tensor, Tensor]:
        """hidden + update, in the place of hidden, and all experts of its norm; float32 [T, H].

        A row of the result depends on nothing but its row of hidden + update and the weights.

        Raises:
            ValueError: a shape, dtype, device or layout is not as said.
        """
        return self._run(self._sparse(weights), hidden, update)

    def _run(self, prepared: _Prepared, hidden: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor]:
        shape = (hidden.shape[0], prepared.width)
        out = self._pool.empty(*shape)
        arguments = _Arguments(
            prepared.address,
            pointer("hidden", hidden, torch.float32, shape),
            None if update is None else pointer("update", update, torch.float32, shape),
            out.data_ptr(),
            shape[0],
        )
        self._pool.run(self._operation, arguments)
        return hidden, out


def _prepare_dense(weights: DenseWeights[CpuMatrix]) -> _Prepared:
    width = _check_mlp("mlp", weights.mlp, stacked=False)
    layer = _Layer(
        norm_weight=_norm_pointer(weights.norm, width), mlp=_mlp(weights.mlp), eps=weights.norm.eps
    )
    return _Prepared(layer, width, None)


def _prepare_sparse(weights: MoeWeights[CpuMatrix]) -> _Prepared:
    width = _check_mlp("shared_expert", weights.shared_expert, stacked=False)
    if _check_mlp("experts", weights.experts, stacked=True) != width:
        raise ValueError(f"experts and shared expert have other widths: {width} is the shared expert's")
    matrix = router_matrix(weights.router, width)
    _check_held(weights)
    layer = _Layer(
        norm_weight=_norm_pointer(weights.norm, width),
        router=_router(weights.router, matrix),
        experts=_mlp(weights.experts),
        mlp=_mlp(weights.shared_expert),
        first_expert=weights.first_expert,
        eps=weights.norm.eps,
    )
    return _Prepared(layer, width, matrix)


def _check_mlp(name: str, mlp: MlpWeights[CpuMatrix], *, stacked: bool) -> int:
    """The width H of gate_up [2I, H] and down [H, I], or of stacks of them."""
    *stack, rows, width = mlp.gate_up.shape
    if mlp.down.shape != (*stack, width, rows // 2) or rows % 2 or bool(stack) != stacked:
        kind = "stacks [E, 2I, H] and [E, H, I]" if stacked else "matrices [2I, H] and [H, I]"
        raise ValueError(f"{name} has {list(mlp.gate_up.shape)} and {list(mlp.down.shape)}, not {kind}")
    return width


def _check_held(weights: MoeWeights[CpuMatrix]) -> None:
    num_experts, end = len(weights.router.bias), weights.first_expert + weights.experts.gate_up.num_matrices
    if weights.first_expert < 0 or end > num_experts:
        raise ValueError(
            f"experts {weights.first_expert} to {end - 1} are held, and the router has {num_experts}"
        )


def _norm_pointer(norm: RmsNorm, width: int) -> int:
    return pointer("norm.weight", norm.weight, torch.float32, (width,))


def _mlp(mlp: MlpWeights[CpuMatrix]) -> _Mlp:
    return _Mlp(mlp.gate_up.address, mlp.down.address)


def _router(router: RouterWeights, matrix: CpuMatrix) -> _Router:
    bias = pointer("router.bias", router.bias, torch.float32, (matrix.num_rows,))
    return _Router(
        matrix.address,
        bias,
        router.top_k,
        router.num_groups,
        router.top_k_groups,
        router.normalize,
        router.scale,
    )

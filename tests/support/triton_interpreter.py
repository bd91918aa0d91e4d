"""The repair of Triton's interpreter (TRITON_INTERPRET=1), which tests kernels where there is no GPU.

The interpreter keeps a block as a numpy array. numpy has no bfloat16 and no float8, so such blocks hold bit
patterns, as uint16 and uint8; and most of the interpreter forgets it. In Triton 3.6 to 3.9:

* arithmetic, comparisons, min and max, dots, sums and scans of bfloat16 compute with patterns as integers;
* float32 to bfloat16 cuts bits off, float32 to float8 loses the carry of its rounding; subnormals, infinities
  and NaN come out wrong, nothing saturates as on a GPU, integers become patterns;
* `tl.dot_scaled` fails (3.6, 3.7) or takes e4m3 scales for e8m0 (3.8, 3.9);
* an fma rounds twice (3.6 to 3.8), NaN wins over numbers in min and max (3.6, 3.7);
* inline assembly, libdevice and the instructions of dependent launches do not exist;
* numpy warns where a GPU is silent: overflow, 0 / 0, inf - inf, rows of nothing but NaN, and (3.6) a loop
  whose end is a block.

The repair decodes patterns to float32, computes, and rounds the result to nearest even. One operation on two
bfloat16 rounds right that way, since float32 has more than twice their digits and two. What becomes of a cast
was read from the PTX that 3.9 compiles: `cvt.rn.satfinite` to float8 (e5m2 too), a single rounding from
float64 and from integers, `cvt.rzi` to integers.

What it does not show: TF32 (float32 is multiplied exactly), multiplications and additions that the compiler
fuses, bfloat16 atomics, types that an architecture refuses (float8 before 8.9, float64 to float8), layouts,
races. A process that was repaired can't compile kernels.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.language.extra import cuda, libdevice
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle
from triton_assembly import AssemblyResult, emulate, register_assembly
from triton_dot_scaled import scaled, unpacked
from triton_numbers import (
    FLOATS,
    PATTERNS,
    Array,
    bfloat16_numbers,
    fused_multiply_add,
    integers_of,
    is_pattern,
    numbers_of,
    rounded_to,
    silent,
    toward_zero,
)

__all__ = ["register_assembly", "repair"]

_LIBDEVICE = {"rint": np.rint, "tanh": np.tanh}

_patch_lang_tensor = interpreter._patch_lang_tensor
_patch_language = interpreter._patch_lang


def repair() -> None:
    """Mend the interpreter of this process, before a kernel is imported. A second call changes nothing."""
    interpreter.interpreter_builder.__class__ = _Builder
    interpreter.interpreter_semantic.__class__ = interpreter.TritonSemantic = _Semantic
    interpreter.ReduceOps, interpreter.ScanOps = _ReduceOps, _ScanOps
    interpreter._patch_lang_tensor = _patch_tensor
    interpreter._patch_lang = _patch_language_once
    for module in (cuda, import_module(cuda.__name__)):  # Triton imports it twice, and keeps both
        module.gdc_wait = module.gdc_launch_dependents = _do_nothing
    for name, function in _LIBDEVICE.items():
        setattr(libdevice, name, partial(_apply, function))


def _patch_language_once(function: Any) -> Any:
    """Triton does it again in every call of a device function, which takes longer than most of them."""
    modules = [value for value in function.__globals__.values() if value is tl or value is tl.core]
    is_patched = all(module.arange.__name__ == "<lambda>" for module in modules)
    return None if is_patched else _patch_language(function)


def _do_nothing() -> None:
    """In the interpreter the kernel before has always ended."""


def _apply(function: Any, x: tl.tensor) -> tl.tensor:
    return tl.tensor(interpreter.interpreter_builder.unary_op(x.handle, function), x.type)


def _patch_tensor(tensor: Any, scope: Any) -> None:
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


class _Builder(InterpreterBuilder):
    """The interpreter has one builder. Its class is replaced by this one, so all of it gets here."""

    def get_bf16(self, value: float) -> TensorHandle:
        return rounded_to(tl.bfloat16, np.array([value], np.float32))

    def cast_impl(self, src: TensorHandle, dst_type: Any) -> TensorHandle:
        source, target = src.dtype.scalar, dst_type.scalar
        if source in FLOATS and target in FLOATS:
            return rounded_to(target, numbers_of(src))
        if source in FLOATS and target.is_int() and not target.is_bool():
            return TensorHandle(integers_of(numbers_of(src), interpreter._get_np_dtype(target)), target)
        if target in PATTERNS:
            return rounded_to(target, src.data.astype(np.float64))
        with silent():
            return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src: TensorHandle, dst_type: Any, rounding_mode: Any) -> TensorHandle:
        if src.dtype.scalar not in FLOATS or dst_type.scalar not in FLOATS:
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        nearest = self.cast_impl(src, dst_type)
        return toward_zero(nearest, numbers_of(src)) if rounding_mode == ir.ROUNDING_MODE.RTZ else nearest

    def binary_op(self, lhs: TensorHandle, rhs: TensorHandle, op: Any) -> TensorHandle:
        if not is_pattern(lhs):
            with silent() if lhs.dtype.scalar.is_floating() else nullcontext():
                return super().binary_op(lhs, rhs, op)
        _refuse_float8(lhs)
        with silent():
            result = op(numbers_of(lhs), numbers_of(rhs))
        is_comparison = result.dtype == np.bool_
        return TensorHandle(result, tl.int1) if is_comparison else rounded_to(tl.bfloat16, result)

    def unary_op(self, arg: TensorHandle, op: Any) -> TensorHandle:
        with silent():
            if not is_pattern(arg):
                return super().unary_op(arg, op)
            _refuse_float8(arg)
            return rounded_to(tl.bfloat16, op(numbers_of(arg)))

    def create_rsqrt(self, arg: TensorHandle) -> TensorHandle:
        return self.unary_op(arg, lambda x: 1 / np.sqrt(x))

    def create_minnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_maxnumf(self, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_clampf(self, arg: TensorHandle, lo: TensorHandle, hi: TensorHandle, nan: Any) -> TensorHandle:
        ignores_nan = nan == ir.PROPAGATE_NAN.NONE
        raised = self.binary_op(arg, lo, np.fmax if ignores_nan else np.maximum)
        return self.binary_op(raised, hi, np.fmin if ignores_nan else np.minimum)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        if z.dtype.scalar == tl.float64:
            return super().create_fma(x, y, z)
        return rounded_to(z.dtype.scalar, fused_multiply_add(numbers_of(x), numbers_of(y), numbers_of(z)))

    def create_dot(self, a: TensorHandle, b: TensorHandle, d: TensorHandle, *options: Any) -> TensorHandle:
        a, b = (TensorHandle(numbers_of(x), tl.float32) if is_pattern(x) else x for x in (a, b))
        with silent():
            return super().create_dot(a, b, d, *options)

    def create_dot_scaled(
        self,
        lhs: TensorHandle,
        lhs_scale: TensorHandle | None,
        lhs_format: Any,
        rhs: TensorHandle,
        rhs_scale: TensorHandle | None,
        rhs_format: Any,
        fast_math: bool,
        lhs_k_pack: bool,
        rhs_k_pack: bool,
        acc: TensorHandle,
    ) -> TensorHandle:
        """lhs is [M, K] and its scales [M, K / group]; rhs is [K, N], but its scales are [N, K / group]."""
        left = scaled(unpacked(lhs, lhs_format, -1 if lhs_k_pack else -2), lhs_scale)
        right = unpacked(rhs, rhs_format, -2 if rhs_k_pack else -1).swapaxes(-1, -2)
        right = scaled(right, rhs_scale).swapaxes(-1, -2)
        with silent():
            return TensorHandle(np.matmul(left, right) + acc.data, acc.dtype.scalar)

    def create_inline_asm(
        self, asm: str, constraints: str, values: list[TensorHandle], types: list[Any], pure: bool, pack: int
    ) -> AssemblyResult:
        return emulate(asm, values, [ty.scalar for ty in types], pack)


def _refuse_float8(handle: TensorHandle) -> None:
    if handle.dtype.scalar.is_fp8():
        raise TypeError("no GPU computes in float8: cast it first")


class _Semantic(TritonSemantic):
    def dot_scaled(self, *arguments: Any) -> tl.tensor:
        return super().dot_scaled(*(_Format(x) if isinstance(x, str) else x for x in arguments))


class _Format(str):
    """3.6 and 3.7 ask a format for its value, as of a constexpr; the others take it for a string."""

    @property
    def value(self) -> str:
        return str(self)


class _ReduceOps(ReduceOps):
    def apply_impl(self, input: Any) -> Any:
        with silent():
            return super().apply_impl(input)

    def sum(self, input: tl.tensor) -> tl.tensor:
        if not is_pattern(input.handle):
            return super().sum(input)
        numbers = numbers_of(input.handle)
        axes = tuple(range(numbers.ndim)) if self.axis is None else (self.axis,)
        for axis in axes:
            numbers = _tree_sum(numbers, axis)
        total = numbers if self.keep_dims else numbers.squeeze(axes)
        return self.to_tensor(rounded_to(tl.bfloat16, total).data, input.dtype)

    def min_max(self, input: tl.tensor, val_reduce_op: Any, idx_reduce_op: Any = None) -> Any:
        """NaN loses against numbers; numpy's nanmax and nanargmax warn or fail where there is only NaN."""
        numbers, is_max = numbers_of(input.handle), val_reduce_op in (np.max, np.nanmax)
        options = {"axis": self.axis, "keepdims": self.keep_dims}
        extreme = (np.fmax if is_max else np.fmin).reduce(numbers, **options)
        if is_pattern(input.handle):
            extreme = rounded_to(input.dtype, extreme).data
        value = self.to_tensor(extreme, input.dtype)
        if idx_reduce_op is None:
            return value
        if numbers.dtype.kind == "f":
            numbers = np.where(np.isnan(numbers), -np.inf if is_max else np.inf, numbers)
        return value, self.to_tensor((np.argmax if is_max else np.argmin)(numbers, **options), tl.int32)


class _ScanOps(ScanOps):
    def apply_impl(self, input: Any) -> Any:
        with silent():
            return super().apply_impl(input)

    def cumsum(self, input: tl.tensor) -> list[tl.tensor]:
        return self._scan(input, np.add) if is_pattern(input.handle) else super().cumsum(input)

    def cumprod(self, input: tl.tensor) -> list[tl.tensor]:
        return self._scan(input, np.multiply) if is_pattern(input.handle) else super().cumprod(input)

    def _scan(self, input: tl.tensor, op: Any) -> list[tl.tensor]:
        """Over twice the distance each time, rounding each time, as the lanes of a warp do."""
        numbers = np.moveaxis(numbers_of(input.handle), self.axis, 0)
        distance = 1
        while distance < len(numbers):
            combined = bfloat16_numbers(op(numbers[:-distance], numbers[distance:]))
            numbers = np.concatenate([numbers[:distance], combined])
            distance *= 2
        return [self.to_tensor(rounded_to(tl.bfloat16, np.moveaxis(numbers, 0, self.axis)).data, input.dtype)]


def _tree_sum(numbers: Array, axis: int) -> Array:
    """Halves onto halves, rounding each time: no order is promised on a GPU, but it is such a tree."""
    while numbers.shape[axis] > 1:
        low, high = np.split(numbers, 2, axis)
        numbers = bfloat16_numbers(low + high)
    return numbers

"""Compiling a recorded launch for a GPU that need not be there: no driver, no CUDA.

Triton makes a kernel once for each kind of arguments: types, multiples of 16, ones. The kind of a recorded
launch is found by Triton's own functions, so that what is compiled here is what the launch would run. A meta
tensor counts as lying at its storage offset from an aligned address, as allocators give them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.cache import get_cache_manager
from triton.runtime.jit import JITFunction, create_function_from_signature

from nybble.kernels.compiled.packed_operands import scattered_operands
from nybble.kernels.compiled.sass import Resources, disassemble, parse_resources
from nybble.kernels.triton.launch import KernelLaunch

TRITON_VERSION: str = triton.__version__
# Of triton's own; a CUDA toolkit is not needed.
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compile_launch(launch: KernelLaunch, arch: int) -> CompiledKernel:
    """The kernel as `launch` would run it on compute capability `arch` (80 is 8.0).

    Raises TypeError for a kernel made where TRITON_INTERPRET is set: that one has no compiler.
    """
    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise TypeError(f"{kernel} was made to be interpreted: import it where TRITON_INTERPRET is not set")
    target = GPUTarget("cuda", arch, 32)
    source, options = _specialized(kernel, launch, make_backend(target))
    return triton.compile(source, target=target, options=options)


def launch_resources(launch: KernelLaunch, arch: int) -> Resources:
    """What the kernel of `launch` takes, what its loops are made of, and whether it is compiled as meant."""
    compiled = compile_launch(launch, arch)
    metadata = compiled.metadata
    resources = parse_resources(
        _listing(compiled),
        num_warps=metadata.num_warps,
        shared_bytes=metadata.shared,
        tensor_memory=metadata.tmem_size,
    )
    return replace(resources, scattered_operands=tuple(scattered_operands(compiled.asm["ttgir"])))


def _listing(compiled: CompiledKernel) -> str:
    """Kept with the kernel in Triton's cache, since nvdisasm takes as long as a compiler."""
    cache = get_cache_manager(compiled.hash)
    path = cache.get_file("listing.txt")
    if path is None:
        path = cache.put(disassemble(compiled.asm["cubin"], TOOLS), "listing.txt", binary=False)
    return Path(path).read_text()


def _specialized(kernel: Any, launch: KernelLaunch, backend: Any) -> tuple[ASTSource, dict[str, Any]]:
    """The kernel with the types and constants of this launch, as JITFunction.run puts them together."""
    named = launch.options | {"enable_fp_fusion": True}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, kinds, options = bind(*launch.arguments, **named)
    options, signature, constants, attributes = kernel._pack_args(backend, named, bound, kinds, options)
    return ASTSource(kernel, signature, constants, attributes), vars(options)

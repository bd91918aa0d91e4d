"""The shared library of C kernels: found, checked and given Python signatures.

It holds the same functions for several levels (instruction sets). Which of them this machine runs is asked
of the library, once; which one a pool uses is said when it is made.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

# From slowest to fastest; the order of nybble_level in nybble_cpu.h.
LEVELS = ("portable", "avx2", "avx512vnni")

Operation = Callable[[int, ctypes.Structure], int]

_FOLDER = Path(__file__).parent
LIBRARY = _FOLDER / "_native.so"
SOURCES = _FOLDER / "native"


class NativeLibraryError(Exception):
    """The library is not there or cannot be used; the text says why, and what helps."""


class NativeLibrary:
    """Functions of one loaded library.

    An operation is a C function `int nybble_NAME(nybble_pool *, const struct nybble_NAME *)`.
    """

    def __init__(self, path: Path) -> None:
        """Raises NativeLibraryError: `path` cannot be loaded, or is no such library."""
        try:
            # CDLL and not PyDLL: calls release the interpreter lock.
            self._functions = ctypes.CDLL(str(path))
            self._declare()
        except (OSError, AttributeError) as error:
            raise NativeLibraryError(f"{path} is not the native CPU backend: {error}") from error
        has_level = self._functions.nybble_has_level
        self.levels = tuple(name for number, name in enumerate(LEVELS) if has_level(number))
        self._operations: dict[str, Operation] = {}

    def sources_digest(self) -> str:
        """Of the C sources that it was built from."""
        digest: bytes = self._functions.nybble_sources_digest()
        return digest.decode()

    def operation(self, name: str, arguments: type[ctypes.Structure]) -> Operation:
        """An operation, to be called with a pool's handle and its arguments; it returns a status."""
        if name not in self._operations:
            function = self._functions[name]
            function.restype = ctypes.c_int
            function.argtypes = (ctypes.c_void_p, ctypes.POINTER(arguments))
            self._operations[name] = function
        return self._operations[name]

    def create_pool(self, num_threads: int, level: str, cores: list[int] | None) -> int:
        """The handle of a new pool, or 0; cores as in nybble_cpu.h."""
        array = None if cores is None else (ctypes.c_int * len(cores))(*cores)
        return self._functions.nybble_pool_create(num_threads, LEVELS.index(level), array) or 0

    def destroy_pool(self, handle: int) -> None:
        self._functions.nybble_pool_destroy(handle)

    def _declare(self) -> None:
        functions = self._functions
        functions.nybble_sources_digest.restype = ctypes.c_char_p
        functions.nybble_has_level.restype = ctypes.c_bool
        functions.nybble_has_level.argtypes = (ctypes.c_int,)
        functions.nybble_pool_create.restype = ctypes.c_void_p
        functions.nybble_pool_create.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_int))
        functions.nybble_pool_destroy.restype = None
        functions.nybble_pool_destroy.argtypes = (ctypes.c_void_p,)


def load_library(path: Path, sources: Path) -> NativeLibrary:
    """The library at `path`, which must be built from `sources` where that folder is there.

    Raises:
        NativeLibraryError
    """
    remedy = "python scripts/native_build.py" if sources.is_dir() else "install a C compiler and nybble again"
    if not path.exists():
        raise NativeLibraryError(f"the native CPU backend was not built (no {path.name}): {remedy}")
    library = NativeLibrary(path)
    if sources.is_dir() and library.sources_digest() != digest_of(sources):
        raise NativeLibraryError(f"the native CPU backend is older than its C sources: {remedy}")
    return library


@cache
def native_library() -> NativeLibrary:
    """The installed library, loaded once.

    Raises:
        NativeLibraryError
    """
    return load_library(LIBRARY, SOURCES)


def digest_of(sources: Path) -> str:
    """As scripts/native_build.py computes it."""
    digest = hashlib.sha256()
    for path in sorted(path for path in sources.iterdir() if path.suffix in (".c", ".h", ".inc")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()

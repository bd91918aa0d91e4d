"""Compile the native CPU backend: each C file with the flags of its level, linked to one shared library.

Run as a program, it builds into the source tree, for an editable install whose C sources have changed:

    .venv/bin/python scripts/native_build.py
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "kernels" / "cpu" / "native"
LIBRARY = ROOT / "kernels" / "cpu" / "_native.so"

_COMMON = (
    "-std=c11",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",  # sqrtf and lrintf become instructions
    "-fno-trapping-math",
    "-pthread",
    "-Wall",
    "-Wextra",
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
# By the end of the file's name. All others are for any machine of the architecture.
_LEVEL_FLAGS = {"_avx2": _AVX2, "_avx512vnni": (*_AVX2, *_AVX512, "-mprefer-vector-width=512")}
_X86 = ("x86_64", "amd64")
ZIG_TARGETS = {
    ("linux", "x86_64"): ("-target", "x86_64-linux-gnu.2.28", "-mcpu=x86_64"),
    ("linux", "aarch64"): ("-target", "aarch64-linux-gnu.2.28", "-mcpu=generic"),
    ("darwin", "x86_64"): ("-mcpu=x86_64",),
    ("darwin", "arm64"): ("-mcpu=apple_m1",),
}


class NativeBuildError(Exception):
    """The library cannot be built here; the text says why."""


@dataclass(frozen=True)
class Compiler:
    """A command that takes gcc's options, and options that it always needs."""

    command: tuple[str, ...]
    options: tuple[str, ...] = ()


def is_supported() -> bool:
    """The pool needs POSIX threads."""
    return sys.platform in ("linux", "darwin")


def system_compiler() -> Compiler | None:
    """The one that CC names, or the first that is there of cc, gcc and clang."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            return Compiler(tuple(command))
    return None


def zig_compiler() -> Compiler | None:
    """clang as PyPI's ziglang brings it. Unless told otherwise it compiles for this very processor."""
    target = ZIG_TARGETS.get((sys.platform, platform.machine()))
    if target is None or importlib.util.find_spec("ziglang") is None:
        return None
    return Compiler((sys.executable, "-m", "ziglang", "cc"), (*target, "-fno-sanitize=undefined"))


def find_compiler() -> Compiler:
    compiler = system_compiler() or zig_compiler()
    if compiler is None:
        raise NativeBuildError("there is no C compiler (cc, gcc, clang or PyPI's ziglang)")
    return compiler


def source_files() -> list[Path]:
    """All C sources, included files too, in a fixed order."""
    return sorted(path for path in SOURCES.iterdir() if path.suffix in (".c", ".h", ".inc"))


def sources_digest() -> str:
    """Of names and contents of all C sources. The loader computes it too, to notice an old library."""
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def level_flags(stem: str) -> tuple[str, ...]:
    """Of the level that a file's name ends with."""
    return next((flags for end, flags in _LEVEL_FLAGS.items() if stem.endswith(end)), ())


def compiled_files(machine: str | None = None) -> list[Path]:
    """For an architecture, by default this one. All but x86-64 have only the portable level."""
    files = [path for path in source_files() if path.suffix == ".c"]
    if (machine or platform.machine()).lower() in _X86:
        return files
    return [path for path in files if not level_flags(path.stem)]


def build(
    library: Path,
    objects: Path,
    extra_flags: Sequence[str] = (),
    extra_files: Sequence[Path] = (),
    machine: str | None = None,
) -> None:
    """Write the shared library; `objects` keeps what was compiled, for the next time.

    machine: what the compiler compiles for, if that is not this one.

    Raises:
        NativeBuildError: there is no compiler, or it failed.
    """
    if not is_supported():
        raise NativeBuildError(f"it is for Linux and macOS, and this is {sys.platform}")
    compiler = find_compiler()
    objects.mkdir(parents=True, exist_ok=True)
    files = [*compiled_files(machine), *extra_files]
    with ThreadPoolExecutor(2) as threads:
        parts = list(threads.map(lambda path: _compile(compiler, path, objects, extra_flags), files))
    for old in set(objects.glob("*.o")) - set(parts):
        old.unlink()
    new = library.with_name(library.name + ".new")
    command = [*compiler.command, *compiler.options, *extra_flags, "-shared", "-pthread", "-o", str(new)]
    _run([*command, *(str(part) for part in parts), "-lm"])
    new.replace(library)  # not over the old one, which a running process may have mapped


def _compile(compiler: Compiler, path: Path, objects: Path, extra_flags: Sequence[str]) -> Path:
    digest = sources_digest()
    flags = [*compiler.options, *_COMMON, f"-I{SOURCES}", *level_flags(path.stem), *extra_flags]
    # Only this file has the digest of all, so the others are compiled anew only for what they include.
    if path.name == "sources_digest.c":
        flags.append(f'-DNYBBLE_SOURCES_DIGEST="{digest}"')
    command = [*compiler.command, *flags, "-c", str(path)]
    target = objects / f"{path.stem}-{_key(command, path)}.o"
    if not target.exists():
        new = target.with_suffix(".new")
        _run([*command, "-o", str(new)])
        new.replace(target)
    return target


def _key(command: Sequence[str], path: Path) -> str:
    """Of what an object is made from: the command, the file, and every file that it could include."""
    included = [source for source in source_files() if source.suffix != ".c"]
    digest = hashlib.sha256("\0".join(command).encode())
    for source in (path, *included):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise NativeBuildError(f"{shlex.join(command)} failed:\n{result.stdout}{result.stderr}")
    if result.stderr:
        print(result.stderr, end="", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the native CPU backend.")
    parser.add_argument("--output", type=Path, default=LIBRARY, help="default: within the source tree")
    parser.add_argument("--flag", action="append", default=[], help="one more for compiler and linker")
    parser.add_argument("--file", action="append", default=[], type=Path, help="one more C file")
    parser.add_argument("--machine", help="that CC compiles for; default: this one")
    arguments = parser.parse_args()
    objects = ROOT / "build" / "native" / arguments.output.stem
    try:
        build(arguments.output, objects, arguments.flag, arguments.file, arguments.machine)
    except NativeBuildError as error:
        sys.exit(f"native_build: {error}")


if __name__ == "__main__":
    main()

"""The native library as setuptools' extension: what pyproject.toml cannot say."""

from __future__ import annotations

from pathlib import Path

import native_build
from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class BuildNative(build_ext):
    """Without it everything else works, so where it cannot be built the install goes on."""

    def get_ext_filename(self, fullname: str) -> str:
        """Not a Python module, so without Python's version in its name."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)  # of an earlier build
        try:
            native_build.build(library, Path(self.build_temp) / "native")
        except native_build.NativeBuildError as error:
            self.warn(f"the native CPU backend is not built: {error}")


class PlatformWheel(bdist_wheel):
    """For one platform and any Python 3: ctypes loads the library."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "nybble.kernels.cpu._native",
            [
                str(path.relative_to(native_build.ROOT))
                for path in native_build.source_files()
                if path.suffix == ".c"
            ],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)

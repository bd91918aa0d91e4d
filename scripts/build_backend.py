"""PEP 517 hooks: setuptools' own, but a machine without a C compiler is asked to fetch one for the build."""

from __future__ import annotations

import platform
import sys
from typing import Any

import native_build
from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_ZIG = "ziglang==0.17.1"


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_compiler()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *_compiler()]


def _compiler() -> list[str]:
    """Where there is no wheel of ziglang for the machine, asking for it would make the whole install fail."""
    is_there = native_build.system_compiler() is not None
    can_be_fetched = (sys.platform, platform.machine()) in native_build.ZIG_TARGETS
    return [_ZIG] if can_be_fetched and not is_there else []

"""Command-line options from config dataclasses: a field is an option, its default the default."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Iterator
from typing import Any, TypeVar

Config = TypeVar("Config")


def add_options(parser: argparse.ArgumentParser, config_type: type, skip: frozenset[str]) -> None:
    """Add an option for every field of `config_type` and of the dataclasses inside it."""
    for field, annotation in _leaf_fields(config_type):
        if field.name in skip:
            continue
        settings: dict[str, Any] = {"help": _help(field), "default": argparse.SUPPRESS}
        if annotation is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(annotation) is typing.Literal:
            settings["choices"] = typing.get_args(annotation)
        else:
            settings["type"] = annotation
            settings["metavar"] = {int: "N", float: "X", str: "TEXT"}[annotation]
        parser.add_argument(f"--{field.name.replace('_', '-')}", **settings)


def from_options(config_type: type[Config], options: dict[str, Any]) -> Config:
    """Build `config_type` from parsed options; what was not given keeps its default."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config_type):  # type: ignore[arg-type]
        annotation = _annotations(config_type)[field.name]
        if dataclasses.is_dataclass(annotation):
            values[field.name] = from_options(typing.cast(type, annotation), options)
        elif field.name in options:
            values[field.name] = options[field.name]
    return config_type(**values)


def _leaf_fields(config_type: type) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    for field in dataclasses.fields(config_type):
        annotation = _annotations(config_type)[field.name]
        if dataclasses.is_dataclass(annotation):
            yield from _leaf_fields(typing.cast(type, annotation))
        else:
            yield field, _without_none(annotation)


def _annotations(config_type: type) -> dict[str, Any]:
    return typing.get_type_hints(config_type)


def _without_none(annotation: Any) -> Any:
    """`int` of `int | None`."""
    if not isinstance(annotation, types.UnionType):
        return annotation
    (kind,) = (a for a in typing.get_args(annotation) if a is not types.NoneType)
    return kind


def _help(field: dataclasses.Field[Any]) -> str:
    text = str(field.metadata["help"])
    has_default = field.default not in (None, dataclasses.MISSING) and "default" not in text
    return f"{text} (default: {field.default})" if has_default else text

"""JSON pointers (RFC 6901) as a schema's `$ref` has them: in the fragment of a URI."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote


def value_at(root: Any, reference: str) -> Any:
    """What a reference within `root`, "#" and what follows, leads to.

    Raises:
        LookupError: it leads nowhere, or out of `root`.
    """
    if not reference.startswith("#"):
        raise LookupError(reference)
    value = root
    for step in unquote(reference[1:]).split("/")[1:]:
        value = _member(value, step.replace("~1", "/").replace("~0", "~"))
    return value


def _member(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return value[name]
    if isinstance(value, list) and name.isdecimal() and len(name) < 9:
        return value[int(name)]
    raise LookupError(name)

"""From a request's bytes to a checked struct, or an error that names the field at fault."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from nybble.server.errors import BadRequestError

T = TypeVar("T", bound=msgspec.Struct)

# msgspec ends its messages with " - at `$.messages[0].content`" or " - at `key` in `$.logit_bias`".
_LOCATION = re.compile(r"^(?P<message>.*?)(?: - at (?:`key` in )?`\$\.?(?P<path>[^`]*)`)?$", re.DOTALL)

# A character beyond U+FFFF, and half of one: what is left where a client cuts a text in UTF-16.
_PAIR = re.compile(rb"\\ud[89ab]..\\ud[c-f]", re.IGNORECASE)
_HALF = re.compile(rb"\\ud[89a-f]", re.IGNORECASE)


def decode_body(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Decode and check types and ranges; BadRequestError names the field."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        message, param = split_location(str(error))
        raise BadRequestError(f"{param or 'request body'}: {message}", param) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        message = f"the request body is not JSON: {_fault(body, error)}"
        raise BadRequestError(message, code="invalid_json") from error
    except RecursionError as error:
        raise BadRequestError("the request body is nested too deeply", code="invalid_json") from error


def _fault(body: bytes, error: Exception) -> str:
    """What is wrong with a text that is no JSON, in other words than msgspec's where these mislead."""
    if not body.strip():
        return "it is empty"
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8: {error.reason} ({error.object[error.start]:#x})"
    if _HALF.search(_PAIR.sub(b"", body)):
        return "a string in it has half of a surrogate pair, which is no text"
    return str(error)


def check_supported(request: msgspec.Struct, unsupported: Mapping[str, tuple[object, ...]]) -> None:
    """Refuse each field of `unsupported` that holds a value other than null and those that change nothing."""
    for name, harmless in unsupported.items():
        value = getattr(request, name)
        if value is not None and value not in harmless:
            message = f"{name}: not supported by this server{_shown(value)}"
            raise BadRequestError(message, name, "unsupported_parameter")


def split_location(text: str) -> tuple[str, str | None]:
    """A message of msgspec's without its location, and the field that it names, if any."""
    match = _LOCATION.match(text)
    if match is None:
        return text, None
    message, path = match["message"], (match["path"] or "").removesuffix("[...]")
    missing = re.search(r"missing required field `(\w+)`", message)
    if missing:
        path = f"{path}.{missing[1]}" if path else missing[1]
        message = "a required field is missing"
    return message, path or None


def _shown(value: Any) -> str:
    """The value if it is short; an object or array may be anything."""
    is_short = isinstance(value, int | float) or (isinstance(value, str) and len(value) <= 40)
    return f" with value {value!r}" if is_short else ""

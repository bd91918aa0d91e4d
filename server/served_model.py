"""The model as the API shows it: its name, tokenizer, limits and defaults."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nybble.engine.checkpoint.model_config import read_json_object
from nybble.engine.errors import ConfigError
from nybble.engine.messages import EngineReady
from nybble.engine.tokenizer import Tokenizer
from nybble.server.errors import BadRequestError, NotFoundError


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What generation_config.json says a request means when it says nothing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """`created`: Unix time at which serving began. `fingerprint`: OpenAI's system_fingerprint, which changes
    when the same request and seed may be answered with other tokens."""

    name: str
    tokenizer: Tokenizer
    max_model_len: int
    stop_token_ids: tuple[int, ...]
    sampling_defaults: SamplingDefaults
    created: int
    fingerprint: str

    def check_name(self, name: str) -> None:
        """Raises NotFoundError: a request names another model."""
        if name != self.name:
            message = f"the model {name[:100]!r} is not served here; this is {self.name!r}"
            raise NotFoundError(message, "model", "model_not_found")

    def check_token_ids(self, token_ids: Sequence[int], field: str) -> tuple[int, ...]:
        """The ids. Raises BadRequestError: one of `field` is no token."""
        for place, token_id in enumerate(token_ids):
            if not self.tokenizer.has_token_id(token_id):
                message = f"{field}: token id {token_id}, at position {place}, is not in the vocabulary"
                raise BadRequestError(message, field)
        return tuple(token_ids)


def describe_model(name: str | None, tokenizer: Tokenizer, ready: EngineReady) -> ServedModel:
    """Join what the engine reported with the checkpoint's generation_config.json, if it has one.

    Raises:
        ConfigError: that file holds a value of a wrong type.
    """
    directory = Path(ready.config.checkpoint)
    path = directory / "generation_config.json"
    fields = read_json_object(path) if path.exists() else {}
    return ServedModel(
        name=name or directory.resolve().name,
        tokenizer=tokenizer,
        max_model_len=ready.max_model_len,
        stop_token_ids=tuple(dict.fromkeys((*ready.eos_token_ids, *_eos_token_ids(fields)))),
        sampling_defaults=SamplingDefaults(
            # "do_sample": false is transformers' greedy decoding.
            temperature=0.0
            if fields.get("do_sample") is False
            else _number(fields, "temperature", 1.0, maximum=2.0),
            top_p=_number(fields, "top_p", 1.0, maximum=1.0),
            top_k=int(_number(fields, "top_k", 0, maximum=2**31 - 1)),
            repetition_penalty=_number(fields, "repetition_penalty", 1.0, maximum=5.0, minimum=0.01),
        ),
        created=int(time.time()),
        fingerprint=_fingerprint(ready, fields),
    )


def _fingerprint(ready: EngineReady, generation_config: dict[str, Any]) -> str:
    """Of this version and of every option of the engine."""
    said = repr((version("nybble"), ready.config, generation_config))
    return f"fp_{hashlib.sha256(said.encode()).hexdigest()[:12]}"


def _eos_token_ids(fields: dict[str, Any]) -> list[int]:
    value = fields.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise ConfigError(f"generation_config.json: field 'eos_token_id' is {value!r}, expected token ids")
    return ids


def _number(fields: dict[str, Any], name: str, default: float, maximum: float, minimum: float = 0.0) -> float:
    value = fields.get(name)
    if value is None:
        return default
    # type() and not isinstance: true is an int; NaN fails the comparison.
    if type(value) not in (int, float) or not minimum <= value <= maximum:
        raise ConfigError(
            f"generation_config.json: field {name!r} is {value!r}, "
            f"expected a number from {minimum:g} to {maximum:g}"
        )
    return float(value)

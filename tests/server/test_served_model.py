from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nybble.engine.engine_config import EngineConfig
from nybble.engine.errors import CheckpointError, ConfigError
from nybble.engine.messages import EngineReady
from nybble.engine.tokenizer import Tokenizer
from nybble.server.served_model import SamplingDefaults, ServedModel, describe_model


def _describe(
    directory: Path, tokenizer: Tokenizer, name: str | None = None, eos: tuple[int, ...] = (5, 6)
) -> ServedModel:
    ready = EngineReady(
        config=EngineConfig(checkpoint=str(directory)), vocab_size=300, max_model_len=77, eos_token_ids=eos
    )
    return describe_model(name, tokenizer, ready)


def _write(directory: Path, **fields: Any) -> None:
    (directory / "generation_config.json").write_text(json.dumps(fields))


def test_without_a_generation_config(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = _describe(tmp_path, tokenizer)
    assert model.sampling_defaults == SamplingDefaults(temperature=1.0, top_p=1.0, top_k=0)
    assert model.stop_token_ids == (5, 6)
    assert model.max_model_len == 77
    assert model.tokenizer is tokenizer


def test_the_fingerprint_tells_configurations_apart(tmp_path: Path, tokenizer: Tokenizer) -> None:
    first = _describe(tmp_path, tokenizer).fingerprint
    assert first.startswith("fp_") and first == _describe(tmp_path, tokenizer, "renamed").fingerprint
    _write(tmp_path, temperature=0.5)
    assert _describe(tmp_path, tokenizer).fingerprint != first


@pytest.mark.parametrize("name", [None, ""])
def test_the_default_name_is_the_directorys(tmp_path: Path, tokenizer: Tokenizer, name: str | None) -> None:
    directory = tmp_path / "glm-4.7"
    directory.mkdir()
    assert _describe(directory, tokenizer, name).name == "glm-4.7"


@pytest.mark.parametrize("path", [".", "../glm-4.7", "../link"])
def test_the_name_is_the_real_directorys(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    (tmp_path / "glm-4.7").mkdir()
    (tmp_path / "link").symlink_to("glm-4.7")
    monkeypatch.chdir(tmp_path / "glm-4.7")
    assert _describe(Path(path), tokenizer).name == "glm-4.7"


def test_a_given_name(tmp_path: Path, tokenizer: Tokenizer) -> None:
    assert _describe(tmp_path, tokenizer, "org/name").name == "org/name"


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, SamplingDefaults()),
        ({"temperature": 0.6}, SamplingDefaults(temperature=0.6)),
        ({"temperature": 0}, SamplingDefaults(temperature=0)),
        ({"top_p": 0.95, "top_k": 40}, SamplingDefaults(top_p=0.95, top_k=40)),
        ({"temperature": None, "top_p": None, "top_k": None}, SamplingDefaults()),
        ({"transformers_version": "5", "do_sample": True}, SamplingDefaults()),
    ],
)
def test_sampling_defaults(
    tmp_path: Path, tokenizer: Tokenizer, fields: dict[str, Any], wanted: SamplingDefaults
) -> None:
    _write(tmp_path, **fields)
    assert _describe(tmp_path, tokenizer).sampling_defaults == wanted


@pytest.mark.parametrize(
    ("eos", "wanted"),
    [(None, (5, 6)), (6, (5, 6)), (0, (5, 6, 0)), ([7, 5, 8, 7], (5, 6, 7, 8)), ([], (5, 6))],
)
def test_stop_tokens_are_joined(
    tmp_path: Path, tokenizer: Tokenizer, eos: Any, wanted: tuple[int, ...]
) -> None:
    _write(tmp_path, eos_token_id=eos)
    assert _describe(tmp_path, tokenizer).stop_token_ids == wanted


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", -1),
        ("top_p", [0.9]),
        ("top_k", "40"),
        ("top_k", -1),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [1, "2"]),
        ("eos_token_id", [None]),
        ("eos_token_id", 1.5),
    ],
)
def test_a_bad_field_is_named(tmp_path: Path, tokenizer: Tokenizer, name: str, value: Any) -> None:
    _write(tmp_path, **{name: value})
    with pytest.raises(ConfigError, match=rf"generation_config\.json: field '{name}'"):
        _describe(tmp_path, tokenizer)


@pytest.mark.parametrize("content", ["", "{", "[]", "1"])
def test_a_broken_file_is_named(tmp_path: Path, tokenizer: Tokenizer, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        _describe(tmp_path, tokenizer)

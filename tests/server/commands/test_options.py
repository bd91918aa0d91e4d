from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from nybble.engine.engine_config import EngineConfig
from nybble.server.commands.options import add_options, from_options
from nybble.server.server_config import ServeConfig, ServerConfig


def _option(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Wheels:
    num_wheels: int = _option("how many wheels", 4)
    pressure: float | None = _option("bar (default: what the wheel says)", None)


@dataclass(frozen=True, kw_only=True)
class Car:
    name: str = field(metadata={"help": "what to call it"})
    colour: Literal["red", "blue"] = _option("paint", "red")
    has_roof: bool = _option("with a roof", True)
    is_fast: bool = _option("with a big engine", False)
    num_doors: int | None = _option("doors", None)
    owner: str = _option("whose it is (default: nobody)", "")
    wheels: Wheels = field(default_factory=Wheels)


def _parser(skip: frozenset[str] = frozenset()) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_options(parser, Car, skip)
    return parser


def _car(*arguments: str) -> Car:
    return from_options(Car, vars(_parser().parse_args(["--name", "x", *arguments])))


def test_nothing_given_keeps_every_default() -> None:
    assert _car() == Car(name="x")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--colour", "blue"], Car(name="x", colour="blue")),
        (["--no-has-roof"], Car(name="x", has_roof=False)),
        (["--has-roof"], Car(name="x")),
        (["--is-fast"], Car(name="x", is_fast=True)),
        (["--no-is-fast"], Car(name="x")),
        (["--num-doors", "0"], Car(name="x", num_doors=0)),
        (["--num-doors", "5"], Car(name="x", num_doors=5)),
        (["--num-wheels", "3"], Car(name="x", wheels=Wheels(num_wheels=3))),
        (["--pressure", "2.5"], Car(name="x", wheels=Wheels(pressure=2.5))),
        (["--owner", "7"], Car(name="x", owner="7")),
        (["--name", "y", "--owner", ""], Car(name="y")),
    ],
)
def test_an_option_sets_its_field(arguments: list[str], wanted: Car) -> None:
    assert _car(*arguments) == wanted


@pytest.mark.parametrize(
    "arguments",
    [
        ["--colour", "green"],
        ["--num-doors", "2.5"],
        ["--num-doors", "many"],
        ["--num-doors", "None"],
        ["--pressure", "low"],
        ["--num-wheels", ""],
        ["--num-wheels"],
        ["--has-roof=yes"],
        ["--wheels", "3"],
        ["--num_doors", "3"],
    ],
)
def test_a_bad_option_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        _car(*arguments)
    assert caught.value.code == 2
    assert arguments[0].split("=")[0] in capsys.readouterr().err


def test_skipped_fields_have_no_option() -> None:
    with pytest.raises(SystemExit):
        _parser(skip=frozenset({"num_wheels"})).parse_args(["--num-wheels", "3"])


def test_other_options_are_ignored() -> None:
    assert from_options(Car, {"name": "x", "run": print, "ask": None}) == Car(name="x")


@pytest.mark.parametrize(
    "wanted",
    [
        "--colour {red,blue} paint (default: red)",
        "--has-roof, --no-has-roof with a roof (default: True)",
        "--is-fast, --no-is-fast with a big engine (default: False)",
        "--num-wheels N how many wheels (default: 4)",
        "--pressure X bar (default: what the wheel says)",
        "--num-doors N doors --",
        "--owner TEXT whose it is (default: nobody) --",
        "--name TEXT what to call it --",
    ],
)
def test_help(wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    assert wanted in " ".join(_parser().format_help().split())


def test_every_serve_option_reaches_its_config() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, ServeConfig, skip=frozenset({"checkpoint"}))
    given = ["--port", "1", "--max-num-seqs", "2", "--no-enable-prefix-caching"]
    given += ["--cached-price", "0.5", "--device", "cpu"]
    config = from_options(ServeConfig, vars(parser.parse_args(given)) | {"checkpoint": "there"})
    assert config.engine.checkpoint == "there"
    assert (config.server.port, config.engine.scheduler.max_num_seqs) == (1, 2)
    assert (config.engine.cache.enable_prefix_caching, config.engine.device) == (False, "cpu")
    assert config.server.prices.cached_price == 0.5
    assert config.server.host == ServerConfig().host
    assert config.engine.dtype == EngineConfig(checkpoint="there").dtype

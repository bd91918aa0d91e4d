"""The benchmark's command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from nybble.kernels.bench.cases import Selection
from nybble.kernels.bench.options import parse_options
from nybble.kernels.triton.launch_table import default_launch_table


def test_defaults() -> None:
    options = parse_options([])
    assert options.selection == Selection()
    assert options.gpu.name == "H100 80GB" and options.with_peers and not options.static
    assert (options.out, options.compare, options.tune, options.seconds) == (None, None, None, None)


def test_all_of_them() -> None:
    text = (
        "--quick --op experts qkv --tp 1 8 --tokens 4 --format nvfp4 --context 1024 --routing zipf --out "
        "d --static "
        "--gpu b200 --no-peers --seconds 9.5 --processes 3"
    )
    options = parse_options(text.split())
    assert options.selection == Selection(
        ("experts", "qkv"), (1, 8), (4,), ("nvfp4",), (1024,), ("zipf",), quick=True
    )
    assert (options.out, options.gpu.name, options.seconds, options.processes) == (Path("d"), "B200", 9.5, 3)
    assert options.static and not options.with_peers


def test_tune_and_compare() -> None:
    assert parse_options(["--tune"]).tune == default_launch_table()
    assert parse_options(["--tune", "t.json"]).tune == Path("t.json")
    assert parse_options(["--compare", "a.json", "b.json"]).compare == (Path("a.json"), Path("b.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "expert"], "invalid choice: 'expert'"),
        (["--tokens", "0"], "0 is not a positive number"),
        (["--gpu", "tpu"], "GPU 'tpu' is not known"),
        (["--compare", "a.json"], "expected 2 arguments"),
        (["--quik"], "unrecognized arguments: --quik"),
    ],
)
def test_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_options(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("usage: nybble bench ops")

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from nybble.engine.log_format import JSONFormatter

SCRIPT = """
import logging
from nybble.engine.log_format import configure_logging
configure_logging(logging.INFO, {format!r})
logging.getLogger("nybble.server").info("two %s", "lines\\nand a \\"quote\\"")
logging.getLogger("nybble.server").debug("unseen")
"""


def logged(log_format: str) -> str:
    command = [sys.executable, "-c", SCRIPT.format(format=log_format)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == ""
    return done.stderr


def test_text() -> None:
    assert logged("text") == 'INFO nybble.server: two lines\nand a "quote"\n'


def test_json_is_one_object_a_line() -> None:
    (line,) = logged("json").splitlines()
    fields = json.loads(line)
    assert fields.pop("pid") > 0
    assert fields.pop("time").endswith("Z")
    assert fields == {"level": "INFO", "logger": "nybble.server", "message": 'two lines\nand a "quote"'}


def test_times_and_tracebacks() -> None:
    try:
        raise RuntimeError("boom")
    except RuntimeError:
        record = logging.LogRecord("x", logging.ERROR, "", 1, "failed", None, sys.exc_info())
    record.created, record.msecs = 86400.25, 250.0
    fields = json.loads(JSONFormatter().format(record))
    assert fields["time"] == "1970-01-02T00:00:00.250Z"
    assert "RuntimeError: boom" in fields["exception"]


@pytest.mark.parametrize("level", [logging.DEBUG, logging.WARNING])
def test_levels_have_their_names(level: int) -> None:
    record = logging.LogRecord("x", level, "", 1, "m", None, None)
    assert json.loads(JSONFormatter().format(record))["level"] == logging.getLevelName(level)

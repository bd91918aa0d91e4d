"""Requests that schemathesis makes of /openapi.json, valid and not: no 5xx, and answers as described."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import served

# Fields that are not supported are described, so that a request may fit the description and be refused.
BY_DESIGN = "positive_data_acceptance"


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose answers are short, since its context is."""
    directory = tmp_path_factory.mktemp("short")
    options = ("--max-model-len", "64")
    with served(directory / "log", "tiny_server.py", str(directory / "checkpoint"), *options) as url:
        yield url


def _with_our_model(value: Any) -> Any:
    """The description, with the served model as the only one, else hardly a request would be run; and without
    timeouts, which rightly end in 504."""
    if isinstance(value, list):
        return [_with_our_model(one) for one in value]
    if not isinstance(value, dict):
        return value
    changed = {key: _with_our_model(one) for key, one in value.items()}
    fields = changed.get("properties", {})
    fields.pop("timeout", None)
    if "model" in fields:
        fields["model"] = {"enum": ["glm"] if "model" in changed.get("required", ()) else ["glm", None]}
    return changed


@pytest.mark.parametrize(("is_our_model", "num_examples"), [(False, 100), (True, 20)])
def test_every_answer_is_as_described(
    short: str, tmp_path: Path, is_our_model: bool, num_examples: int
) -> None:
    with urllib.request.urlopen(f"{short}/openapi.json") as answer:
        description = json.load(answer)
    path = tmp_path / "openapi.json"
    path.write_text(json.dumps(_with_our_model(description) if is_our_model else description))
    command = [Path(sys.executable).with_name("schemathesis"), "run", path, "--url", short, "--no-color"]
    options = ["--exclude-checks", BY_DESIGN, "--suppress-health-check", "all", "--warnings", "off"]
    options += ["--max-examples", str(num_examples), "--request-timeout", "60", "--continue-on-failure"]
    done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    print(done.stdout)  # how many there were
    assert done.returncode == 0, done.stdout

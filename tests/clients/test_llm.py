"""The command `llm`, with the server as one of its own models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CITY = "name, is_capital bool"
TOOL = 'def get_weather(city: str) -> str:\n    "Weather"\n    return city + ": warm</think>Warm."\n'
PARIS = "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value></tool_call>"


@pytest.fixture(scope="module")
def home(parrot: str, random_glm: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llm")
    common = {"model_name": "glm", "can_stream": True, "supports_schema": True, "supports_tools": True}
    models = [
        {"model_id": name, "api_base": f"{url}/v1", "api_key_name": "none"} | common
        for name, url in (("parrot", parrot), ("random", random_glm))
    ]
    (directory / "extra-openai-models.yaml").write_text(json.dumps(models))  # JSON is YAML
    return directory


def llm(home: Path, *arguments: str) -> str:
    environment = os.environ | {"LLM_USER_PATH": str(home), "OPENAI_API_KEY": "none"}
    command = [Path(sys.executable).with_name("llm"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("stream", [[], ["--no-stream"]])
def test_an_answer(home: Path, stream: list[str]) -> None:
    assert llm(home, "-m", "parrot", "R</think>An answer, é😀.", *stream).strip().endswith("An answer, é😀.")


def test_a_conversation_and_a_system_prompt(home: Path) -> None:
    llm(home, "-m", "parrot", "-s", "Be brief.", "</think>one")
    assert llm(home, "-c", "</think>two").strip() == "two"


def test_a_tool(home: Path) -> None:
    shown = llm(home, "-m", "parrot", "--functions", TOOL, f"</think>{PARIS}")
    assert shown.strip().endswith("Warm.")


def test_a_schema(home: Path) -> None:
    options = ["-o", "max_tokens", "3000", "-o", "logit_bias", json.dumps({"34": 6, "125": 6})]
    answer = json.loads(llm(home, "-m", "random", "--no-stream", "--schema", CITY, *options, "hello"))
    assert set(answer) == {"name", "is_capital"} and isinstance(answer["is_capital"], bool)

"""GLM's own chat templates, rendered by Jinja with nothing of ours: the oracle of prompts.

tests/data/chat_templates says where the templates are from. Jinja has the settings and the JSON that Hugging
Face's templates are written for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATES = Path(__file__).parent.parent / "data" / "chat_templates"
NAMES = ("GLM-4.7-Flash", "GLM-4.6")


def template_of(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


def rendered(name: str, messages: Sequence[Any], tools: Sequence[Any] = (), **options: bool) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = _to_json
    template = environment.from_string(template_of(name))
    options = {"add_generation_prompt": True} | options
    return template.render(messages=messages, tools=tools or None, **options)


def _to_json(value: Any, ensure_ascii: bool = True) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii)

"""A served model with the tokens of GLM-4.7 and one of its chat templates, without weights."""

from __future__ import annotations

from pathlib import Path

import glm_template
from tiny_tokenizer import write_tokenizer

from nybble.engine.tokenizer import Tokenizer
from nybble.server.served_model import SamplingDefaults, ServedModel

_SPECIAL_TOKENS = (*glm_template.SPECIAL_TOKENS, "/nothink", "<|end|>")


def glm_model(directory: Path, template: str = glm_template.TEMPLATE) -> ServedModel:
    write_tokenizer(directory, template, _SPECIAL_TOKENS, glm_template.TEXT_TOKENS)
    tokenizer = Tokenizer(directory)
    return ServedModel(
        name="glm",
        tokenizer=tokenizer,
        max_model_len=1 << 16,
        stop_token_ids=tokenizer.encode("<|end|><|user|><|observation|>"),
        sampling_defaults=SamplingDefaults(),
        created=1_700_000_000,
        fingerprint="fp_glm",
    )

from __future__ import annotations

from dataclasses import replace

import pytest
from glm_model import glm_model
from hypothesis import settings
from tiny_tokenizer import tiny_tokenizer

from nybble.engine.tokenizer import Tokenizer
from nybble.server.served_model import SamplingDefaults, ServedModel

settings.register_profile("server", deadline=None)  # a busy machine is not a failure
settings.load_profile("server")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def end_id(tokenizer: Tokenizer) -> int:
    """A special token."""
    (token_id,) = tokenizer.encode("<|end|>")
    return token_id


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer, end_id: int) -> ServedModel:
    return ServedModel(
        name="tiny",
        tokenizer=tokenizer,
        max_model_len=64,
        stop_token_ids=(end_id,),
        sampling_defaults=SamplingDefaults(temperature=0.5, top_p=0.75, top_k=7),
        created=1_700_000_000,
        fingerprint="fp_tiny",
    )


@pytest.fixture(scope="session")
def glm(model: ServedModel, tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    """A model with the tags and the chat template of GLM-4.7."""
    glm = glm_model(tmp_path_factory.mktemp("glm"))
    return replace(model, tokenizer=glm.tokenizer, max_model_len=4096, stop_token_ids=glm.stop_token_ids)

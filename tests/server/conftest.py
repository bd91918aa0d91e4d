from __future__ import annotations

import pytest
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
    )

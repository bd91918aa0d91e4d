"""The null model behind a server: the whole front end, over an engine that computes nothing.

What `nybble serve --null-step-ms` runs, so that `nybble bench serving` can measure HTTP, JSON, text and the
engine's host work alone, at a known speed of the model.
"""

from __future__ import annotations

import math
from pathlib import Path

from nybble.engine.engine import Engine
from nybble.engine.engine_config import EngineConfig
from nybble.engine.errors import OptionError
from nybble.engine.messages import EngineReady
from nybble.engine.model.null_model import MAX_MODEL_LEN, VOCAB_SIZE, null_engine
from nybble.engine.tokenizer import Tokenizer

_WORD = " word"  # what it answers with, over and over
_TOKENS_PER_SEQUENCE = 8192  # of the KV cache that it makes believe to have


def start_null_engine(config: EngineConfig) -> tuple[Engine, EngineReady]:
    """An engine for `config.null_step_ms`, and what it tells the server.

    Raises:
        OptionError: an option is out of range, or there is more than one rank.
        CheckpointError: the tokenizer cannot be used.
    """
    step_ms = config.null_step_ms
    if step_ms is None or not 0 <= step_ms < math.inf:
        raise OptionError(f"null_step_ms is {step_ms}, expected a number from 0")
    if config.parallel.split.num_ranks > 1:
        raise OptionError("null_step_ms: the null model runs on one rank")
    if config.cache.block_size < 1:
        raise OptionError(f"block_size is {config.cache.block_size}, expected at least 1")
    token_id = Tokenizer(Path(config.checkpoint)).encode(_WORD)[-1]
    max_model_len = config.max_model_len or MAX_MODEL_LEN
    num_tokens = max(max_model_len, config.scheduler.max_num_seqs * _TOKENS_PER_SEQUENCE)
    engine = null_engine(config, -(-num_tokens // config.cache.block_size), token_id, step_ms / 1e3)
    return engine, EngineReady(
        config=config, vocab_size=VOCAB_SIZE, max_model_len=max_model_len, eos_token_ids=()
    )

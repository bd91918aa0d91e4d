"""Becomes `nybble serve` over a random GLM of a few layers with GLM's tokens and chat template.

Arguments are a directory for the checkpoint, which is made there, and options of the command.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import glm_template
from tiny_glm import make_checkpoint
from tiny_tokenizer import write_tokenizer

from nybble.engine.tokenizer import Tokenizer


def main() -> None:
    directory, *options = sys.argv[1:]
    special = (*glm_template.SPECIAL_TOKENS, "<|end|>")
    write_tokenizer(Path(directory), glm_template.TEMPLATE, special, glm_template.TEXT_TOKENS)
    (end_id,) = Tokenizer(Path(directory)).encode("<|end|>")
    sizes = {"vocab_size": 320, "max_position_embeddings": 4096, "eos_token_id": end_id}
    make_checkpoint(Path(directory), seed=3, **sizes)
    nybble = Path(sys.executable).with_name("nybble")
    os.execv(nybble, [nybble, "serve", directory, "--port", "0", "--served-model-name", "glm", *options])


if __name__ == "__main__":
    main()

"""What can go wrong in the engine.

NybbleError
├── CheckpointError      a checkpoint directory that cannot be served, naming file and tensor
│   └── ConfigError      a field of its config.json that is missing or unsupported
├── OptionError          an option that cannot be satisfied on this machine
├── InvalidRequestError  a request that the engine refuses, naming its parameter
│   └── ContextLengthError   prompt and answer together are longer than the context
├── QueueFullError       too many requests wait already; says when to come again
├── RequestTimeoutError  a request whose deadline passed before its answer was complete
├── RequestFailedError   a request at which the engine failed, and went on without it
├── EngineBrokenError    the engine failed and cannot go on
└── EngineDeadError      the engine process ended; the request was lost with it
"""

from __future__ import annotations


class NybbleError(Exception):
    """An error whose message is meant for the user as it stands."""


class CheckpointError(NybbleError):
    """A checkpoint that cannot be served."""


class ConfigError(CheckpointError):
    """A config.json field that is missing, of a wrong type, or not supported."""


class OptionError(NybbleError):
    """An option that cannot be satisfied on this machine."""


class InvalidRequestError(NybbleError):
    """A request that cannot be run. `parameter` is the request field at fault."""

    def __init__(self, message: str, parameter: str) -> None:
        super().__init__(message)
        self.parameter = parameter


class ContextLengthError(InvalidRequestError):
    """Prompt and answer do not fit in the context. `parameter` is "prompt" or "max_tokens".

    The message begins as OpenAI's does: clients know this error by those words and shorten the prompt.
    """

    @classmethod
    def check(cls, num_prompt_tokens: int, max_tokens: int, limit: int) -> None:
        """Raise unless a prompt and `max_tokens` of answer fit in a context of `limit` tokens."""
        known = f"This model's maximum context length is {limit} tokens"
        if num_prompt_tokens + min(max_tokens, 1) > limit:
            message = f"{known}, and the prompt has {num_prompt_tokens}: no room is left for an answer"
            raise cls(message, "prompt")
        if num_prompt_tokens + max_tokens > limit:
            raise cls(
                f"{known}. The prompt has {num_prompt_tokens} and the answer may have {max_tokens}; "
                f"at most {limit - num_prompt_tokens} are left",
                "max_tokens",
            )


class QueueFullError(NybbleError):
    """A request that came while too many were waiting. `retry_after`: seconds until it may be tried again."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RequestTimeoutError(NybbleError):
    """A request whose deadline passed."""


class RequestFailedError(NybbleError):
    """A request that was part of a step which failed. The engine goes on."""


class EngineBrokenError(NybbleError):
    """A step failed and left the engine unable to run another."""


class EngineDeadError(NybbleError):
    """The engine process ended before the request did."""

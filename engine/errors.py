"""What can go wrong in the engine.

NybbleError
├── CheckpointError      a checkpoint directory that cannot be served, naming file and tensor
│   └── ConfigError      a field of its config.json that is missing or unsupported
├── OptionError          an option that cannot be satisfied on this machine
├── InvalidRequestError  a request that the engine refuses, naming its parameter
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


class EngineDeadError(NybbleError):
    """The engine process ended before the request did."""

"""Options of the HTTP server. A field's metadata is its help text on the command line."""

from __future__ import annotations

from dataclasses import dataclass, field

from nybble.engine.engine_config import EngineConfig
from nybble.server.access.prices import Prices


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on"})
    port: int = field(default=8000, metadata={"help": "port to listen on; 0 picks a free one"})
    served_model_name: str | None = field(
        default=None, metadata={"help": "name of the model in the API (default: the directory's)"}
    )
    api_key_file: str | None = field(
        default=None, metadata={"help": "TOML file of API keys; made by `nybble key` (default: no keys)"}
    )
    usage_ledger: str | None = field(
        default=None,
        metadata={
            "help": "file that use is written to, by key (default: the key file's name and .usage.jsonl)"
        },
    )
    max_failed_attempts: int = field(
        default=20, metadata={"help": "unknown API keys an address may try within a minute; 0 is no limit"}
    )
    allow_no_keys: bool = field(
        default=False, metadata={"help": "listen to other machines although there are no API keys"}
    )
    ssl_certfile: str | None = field(
        default=None, metadata={"help": "PEM file of the TLS certificate (default: no TLS)"}
    )
    ssl_keyfile: str | None = field(
        default=None, metadata={"help": "PEM file of its private key (default: in the certificate's file)"}
    )
    ready_timeout: int = field(
        default=10, metadata={"help": "seconds within which the engine must give a token to be called ready"}
    )
    max_body_bytes: int = field(default=16 << 20, metadata={"help": "largest request body that is read"})
    client_timeout: int = field(
        default=60,
        metadata={
            "help": "seconds that a client may take for a request's head, for its body, or to take nothing"
        },
    )
    shutdown_timeout: int = field(
        default=30, metadata={"help": "seconds that open requests may go on after SIGTERM"}
    )
    max_replay_tokens: int = field(
        default=4_000_000,
        metadata={"help": "tokens of answers kept, to read them alike when they come back (0: none)"},
    )
    prices: Prices = field(default_factory=Prices)


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Everything that `nybble serve` takes."""

    engine: EngineConfig
    server: ServerConfig = field(default_factory=ServerConfig)

"""The socket that the server listens on: its address, who may reach it, and TLS."""

from __future__ import annotations

import ipaddress
import resource
import socket
import ssl

from nybble.engine.errors import NybbleError
from nybble.server.server_config import ServerConfig

_MAX_TIMEOUT = 86400  # seconds


class BindError(NybbleError):
    """The address cannot be listened on."""


class TLSError(NybbleError):
    """The certificate or its key cannot be used."""


def url_of(sock: socket.socket, is_tls: bool = False) -> str:
    """The address of a listening socket."""
    host, port = sock.getsockname()[:2]
    return f"http{'s' * is_tls}://{f'[{host}]' if ':' in host else host}:{port}"


def listen(sock: socket.socket) -> None:
    """With as many connections as the system lets this process have: a soft limit of 1,024 files is usual.

    Raises:
        BindError: another server began to listen on the port while we loaded.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        sock.listen()
    except OSError as error:
        raise BindError(f"cannot listen on {sock.getsockname()}: {error}") from error


def bind(config: ServerConfig) -> socket.socket:
    """Take the port at once, so that one on which a server listens is known before the weights are loaded.

    It does not listen yet: until the engine is ready, a client is refused, not left waiting.
    """
    if not 0 <= config.port <= 65535:
        raise BindError(f"port is {config.port}, expected 0 to 65535")
    if not 1 <= config.client_timeout <= _MAX_TIMEOUT:
        raise BindError(f"client_timeout is {config.client_timeout}, expected 1 to {_MAX_TIMEOUT}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # For each connection: how long its client may acknowledge nothing, or have no room for more.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, config.client_timeout * 1000)
            sock.bind(address)
            _check_reach(sock, config)
        except (OSError, BindError):
            sock.close()
            raise
    except (OSError, UnicodeError) as error:
        raise BindError(f"cannot listen on {config.host}:{config.port}: {error}") from error
    return sock


def tls_context(config: ServerConfig) -> ssl.SSLContext | None:
    """None without a certificate. Raises TLSError."""
    if config.ssl_certfile is None:
        if config.ssl_keyfile is not None:
            raise TLSError("ssl_keyfile is given without ssl_certfile")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # Without a password of its own, OpenSSL would ask the terminal for one.
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password=lambda: "")
    except (OSError, ValueError) as error:
        files = " and ".join(filter(None, (config.ssl_certfile, config.ssl_keyfile)))
        raise TLSError(f"{files}: not a certificate and its private key: {error}") from error
    return context


def _check_reach(sock: socket.socket, config: ServerConfig) -> None:
    """Raises BindError: other machines could use the server, and nothing would ask them for a key."""
    address = sock.getsockname()[0]
    is_local = ipaddress.ip_address(address.split("%")[0]).is_loopback
    if not (is_local or config.api_key_file is not None or config.allow_no_keys):
        raise BindError(
            f"{address} can be reached from other machines: give --api-key-file (see `nybble key`), "
            "or --allow-no-keys to serve whoever comes"
        )

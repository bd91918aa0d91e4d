from __future__ import annotations

import resource
import socket
from pathlib import Path

import pytest

from nybble.server.listening import BindError, TLSError, bind, listen, tls_context, url_of
from nybble.server.server_config import ServerConfig


@pytest.mark.parametrize(("host", "port"), [("127.0.0.1", 70000), ("..", 0)])
def test_bind_refuses(host: str, port: int) -> None:
    with pytest.raises(BindError):
        bind(ServerConfig(host=host, port=port)).close()


@pytest.mark.parametrize("timeout", [0, -1, 100_000])
def test_a_time_limit_for_clients_there_must_be(timeout: int) -> None:
    with pytest.raises(BindError, match="client_timeout"):
        bind(ServerConfig(port=0, client_timeout=timeout)).close()


def test_connections_inherit_it() -> None:
    with bind(ServerConfig(port=0, client_timeout=7)) as sock:
        listen(sock)
        with socket.create_connection(sock.getsockname()), sock.accept()[0] as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 7000


def test_connections_are_not_bounded_by_a_soft_limit() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        with bind(ServerConfig(port=0)) as sock:
            listen(sock)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (before[1], before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_only_one_of_two_servers_that_load_at_once_gets_the_port() -> None:
    with bind(ServerConfig(port=0)) as first, bind(ServerConfig(port=first.getsockname()[1])) as second:
        listen(first)
        with pytest.raises(BindError, match="Address already in use"):
            listen(second)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_reach_it_only_with_keys_or_when_told_so(host: str) -> None:
    with pytest.raises(BindError, match="--api-key-file"):
        bind(ServerConfig(host=host, port=0))
    bind(ServerConfig(host=host, port=0, allow_no_keys=True)).close()
    bind(ServerConfig(host=host, port=0, api_key_file="keys.toml")).close()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1"])
def test_this_machine_reaches_it_without(host: str) -> None:
    with bind(ServerConfig(host=host, port=0)) as sock:
        assert url_of(sock).startswith("http://")
        assert url_of(sock, is_tls=True).startswith("https://")


def test_a_certificate_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cert.pem"
    path.write_text("nonsense")
    for file in (path, tmp_path / "missing.pem"):
        with pytest.raises(TLSError, match=file.name):
            tls_context(ServerConfig(ssl_certfile=str(file)))
    with pytest.raises(TLSError, match="without ssl_certfile"):
        tls_context(ServerConfig(ssl_keyfile=str(path)))
    assert tls_context(ServerConfig()) is None

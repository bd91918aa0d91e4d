"""A certificate of localhost and 127.0.0.1 that signs itself, until 2126, and its key. For tests only."""

from __future__ import annotations

from pathlib import Path

_CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBmzCCAUGgAwIBAgIUUuY7o0LOmmDWqIRmhAxZiZB5rJwwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyNjIxMDcyNloYDzIxMjYxMTAy
MjEwNzI2WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAATM2NH3u5VuHr5HAYp8aQKffMDuRT6yiAMV332jlejF7lUFdocISOB0
bzDtUYy64mEAGkU5lB1wzOzUzXkecnmRo28wbTAdBgNVHQ4EFgQU3fKaBx80hCc9
lJqxYHWW/f5ailMwHwYDVR0jBBgwFoAU3fKaBx80hCc9lJqxYHWW/f5ailMwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDSAAwRQIhANiMXeXPstPz0D/zRuXQ49hx+y/OAUEFZrzBUi6T/54/AiBg
MGQ2U5nB7RkVQoeexCYL8owW/kJaCNt6A0suhhJnig==
-----END CERTIFICATE-----
"""

_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgl/q3bpaKuUvZy37i
6zEq84LOi0aAWslnbKGe1fL5qr2hRANCAATM2NH3u5VuHr5HAYp8aQKffMDuRT6y
iAMV332jlejF7lUFdocISOB0bzDtUYy64mEAGkU5lB1wzOzUzXkecnmR
-----END PRIVATE KEY-----
"""


def write_certificate(directory: Path) -> tuple[Path, Path]:
    """The files of the certificate and of its key."""
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    certificate.write_text(_CERTIFICATE)
    key.write_text(_KEY)
    return certificate, key

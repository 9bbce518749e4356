"""The URL of a remote, taken apart: where it is, what it may be called in front of people, and who asks.

Whoever prints an address prints `name`. User and password are in no field that a repr shows.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from pipeline.errors import ConfigError, RemoteError, Trouble
from pipeline.remotes.contract import Terms

_PASSWORDS = "in a user or a password, write / ? # : @ as %2F %3F %23 %3A %40"


@dataclass(frozen=True)
class Address:
    """A remote's URL.

    name        scheme, host, port and path: what a person is told
    host, port  of the authority; port is None where the URL names none
    path        decoded, without a slash at its end
    query       its parameters, by name
    """

    name: str
    scheme: str
    host: str
    port: int | None
    path: str
    query: Mapping[str, str]
    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)

    @classmethod
    def of(cls, url: str, parameters: Collection[str] = ()) -> Address:
        """Takes a URL apart. Raises ConfigError, which never shows credentials, on what cannot be meant."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            # What Python says shows a part of the URL, which may be one of the password.
            raise ConfigError("the remote's URL cannot be read", hint=_PASSWORDS) from None
        if "@" in parts.path + parts.query + parts.fragment:
            raise ConfigError("the remote's URL has an @ behind its server", hint=f"{_PASSWORDS}; in a path too, %40")
        name = _name(parts, host, port)
        plainly, meant = parts.netloc + parts.path, unquote(parts.netloc + parts.path)
        if " " in plainly or any(ord(each) < 32 or ord(each) == 127 for each in meant):
            said = f"the remote's URL {name!r} has a space or a control character in it"
            raise ConfigError(said, hint="write %20 for a space")
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        for unknown in sorted(set(query).difference(parameters)):
            known = f"what is known: {', '.join(parameters)}" if parameters else "take it out"
            raise ConfigError(f"the remote {name} is given a parameter {unknown[:40]!r}", hint=known)
        if parts.fragment:
            raise ConfigError(f"the remote {name} is given a fragment (#…)", hint="write %23 for a # in a path")
        user, password = unquote(parts.username or ""), unquote(parts.password or "")
        return cls(name, parts.scheme, host, port, unquote(parts.path).rstrip("/"), query, user, password)

    @property
    def where(self) -> str:
        """Host and port, as they stand in a URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port is None else f"{host}:{self.port}"

    def authorization(self, terms: Terms) -> str | None:
        """What the header `Authorization` says: the token of the terms, otherwise user and password of the URL."""
        if token := terms.secrets.get("token"):
            if not token.isascii() or not token.isprintable():
                raise ConfigError(f"the token for {self.name} has a character in it that no token has")
            return f"Bearer {token}"
        if self.user or self.password:
            return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()
        return None

    def error(self, trouble: Trouble, what: str, hint: str = "") -> RemoteError:
        """An error that names this remote: `what` goes on from "the remote …"."""
        return RemoteError(f"the remote {self.name} {what}", trouble=trouble, hint=hint)


def _name(parts: SplitResult, host: str, port: int | None) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{shown}{'' if port is None else f':{port}'}{parts.path.rstrip('/')}"


def trusted_certificates() -> bytes | None:
    """The certificates that the environment says to trust, as PEM; None where it leaves that to the system."""
    path = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
    if not path:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"the certificates in {path} cannot be read: {error.strerror or error}") from error

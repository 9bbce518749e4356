"""Which remote a machine uses, how, and whom it trusts.

    environment                TVMAKE_REMOTE, TVMAKE_REMOTE_POLICY, TVMAKE_REMOTE_TOKEN, TVMAKE_SIGN_WITH, TVMAKE_TRUST
    tvmake.toml                beside dodo.py: the team's
    tvmake.toml                in the user's configuration folder, or the file that TVMAKE_CONFIG names: the machine's

What stands higher wins, key by key. Whom to trust is the machine's to say, not a workspace's: what arrives with a
workspace may not loosen it.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from pipeline.amounts import size_of, span_of
from pipeline.errors import ConfigError

FILE = "tvmake.toml"


class Policy(enum.StrEnum):
    """What a machine does with its remote."""

    READ_WRITE = "read-write"
    READ_ONLY = "read-only"
    WRITE_ONLY = "write-only"
    OFF = "off"

    @property
    def reads(self) -> bool:
        return self in (Policy.READ_WRITE, Policy.READ_ONLY)

    @property
    def writes(self) -> bool:
        return self in (Policy.READ_WRITE, Policy.WRITE_ONLY)


class RemoteTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[remote]

    url      where: file:///… http(s)://… s3://… gs://… az://… grpc(s)://…
    policy   read-write, read-only, write-only or off
    connect  seconds until it has accepted a connection
    stall    seconds without a byte once it has
    """

    url: str | None = None
    policy: Policy | None = None
    connect: float | None = None
    stall: float | None = None


class TrustTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[trust], in the user's file only.

    keys       public keys whose signatures are believed
    required   whether what is not signed by one of them is refused; where nothing is said it is, if keys are listed or
               this machine signs: who signs vouches for what it found as well
    sign_with  a private key with which all that this machine writes is signed, and which it trusts
    """

    keys: tuple[str, ...] = ()
    required: bool | None = None
    sign_with: str | None = None


class StoreTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[store], in the user's file only: what `doit cache gc` keeps the local store within.

    size  such as "20 GB"
    age   since it was last used, such as "60 days"
    """

    size: str | None = None
    age: str | None = None


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tvmake.toml."""

    remote: RemoteTable = RemoteTable()
    trust: TrustTable | None = None
    store: StoreTable | None = None


@dataclass(frozen=True)
class Settings:
    """What the three places say together. `url` is None where there is no remote."""

    url: str | None = field(default=None, repr=False)  # a password may stand in it
    policy: Policy = Policy.READ_WRITE
    connect: float = 2.0
    stall: float = 10.0
    secrets: Mapping[str, str] | None = field(default=None, repr=False)
    trusted: tuple[str, ...] = ()
    signature_required: bool = False
    sign_with: Path | None = None
    max_bytes: int | None = None
    max_age: float | None = None

    @property
    def uses_remote(self) -> bool:
        return self.url is not None and self.policy is not Policy.OFF


def load(workspace: Path | None, environment: Mapping[str, str] = os.environ) -> Settings:
    """The settings for a workspace's folder (None: outside of any).

    Raises ConfigError that says which file or variable, which key, and what is allowed.
    """
    files = [_read(_users_file(environment), is_users=True)]
    if workspace is not None:
        files.insert(0, _read(workspace / FILE, is_users=False))
    own = files[-1]
    trust, store = own.trust or TrustTable(), own.store or StoreTable()
    tables = [_from(environment), *(file.remote for file in files)]
    keys = (*trust.keys, *environment.get("TVMAKE_TRUST", "").split())
    sign_with = environment.get("TVMAKE_SIGN_WITH") or trust.sign_with
    token = environment.get("TVMAKE_REMOTE_TOKEN")
    url = next((table.url for table in tables if table.url), None)
    settings = Settings(
        url=None if url in (None, "off") else url,
        policy=next((table.policy for table in tables if table.policy is not None), Policy.READ_WRITE),
        connect=next((table.connect for table in tables if table.connect is not None), Settings.connect),
        stall=next((table.stall for table in tables if table.stall is not None), Settings.stall),
        secrets={"token": token} if token else None,
        trusted=keys,
        signature_required=bool(keys or sign_with) if trust.required is None else trust.required,
        sign_with=Path(os.path.expanduser(sign_with)) if sign_with else None,
        max_bytes=size_of(store.size) if store.size else None,
        max_age=span_of(store.age) if store.age else None,
    )
    _require_sensible(settings)
    return settings


def _users_file(environment: Mapping[str, str]) -> Path:
    if chosen := environment.get("TVMAKE_CONFIG"):
        return Path(os.path.expanduser(chosen))
    # What platformdirs answers, without the milliseconds that it takes: a build with nothing to do asks as well.
    home = environment.get("XDG_CONFIG_HOME", "")
    if not os.path.isabs(home):
        home = os.path.expanduser("~/.config")
    # Who has no home has no file: one relative to where a build runs would be the workspace's to write.
    return Path(home if os.path.isabs(home) else "/nonexistent", "tvmake", FILE)


def _from(environment: Mapping[str, str]) -> RemoteTable:
    policy = environment.get("TVMAKE_REMOTE_POLICY")
    try:
        chosen = Policy(policy) if policy else None
    except ValueError as error:
        raise ConfigError(f"TVMAKE_REMOTE_POLICY is {policy!r}", hint=_policies()) from error
    return RemoteTable(url=environment.get("TVMAKE_REMOTE") or None, policy=chosen)


def _read(path: Path, is_users: bool) -> File:
    try:
        text = path.read_text()
    except FileNotFoundError:
        return File()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    import tomllib  # not for a build with nothing to do, where there is no file

    try:
        read = msgspec.convert(tomllib.loads(text), File)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    except msgspec.ValidationError as error:
        said = str(error).replace("Object contains unknown", "unknown").replace("field", "key")
        raise ConfigError(f"{path}: {said}", hint=_allowed(is_users)) from error
    if not is_users and (read.trust is not None or read.store is not None):
        raise ConfigError(
            f"{path}: [trust] and [store] are the machine's to say, not a workspace's",
            hint=f"write them into {_users_file(os.environ)}",
        )
    return read


def _allowed(is_users: bool) -> str:
    tables = {"[remote]": RemoteTable, **({"[trust]": TrustTable, "[store]": StoreTable} if is_users else {})}
    return "; ".join(f"under {name}: {', '.join(table.__struct_fields__)}" for name, table in tables.items())


def _policies() -> str:
    return f"policies: {', '.join(Policy)}"


def _require_sensible(settings: Settings) -> None:
    for name, seconds in (("connect", settings.connect), ("stall", settings.stall)):
        if not 0 < seconds <= _LONGEST:
            raise ConfigError(f"remote.{name} is {seconds}", hint=f"give seconds, more than 0, {_LONGEST:,} at most")
    if settings.signature_required and not settings.trusted and settings.sign_with is None:
        raise ConfigError("trust.required is true and no key is trusted", hint='list some: keys = ["ed25519:…"]')


_LONGEST = 86400  # seconds that one may wait for a remote

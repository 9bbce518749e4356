"""Remotes behind `s3://`, `gs://` and `az://`: buckets, through obstore: `<prefix>/cas/<sha256>`, `<prefix>/ac/<key>`.

    s3://bucket/prefix?region=…&endpoint=…      AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL
    gs://bucket/prefix                          GOOGLE_APPLICATION_CREDENTIALS, GOOGLE_SERVICE_ACCOUNT_KEY
    az://container/prefix?account=…&endpoint=…  AZURE_STORAGE_ACCOUNT_NAME, AZURE_STORAGE_ACCOUNT_KEY

Who asks is said by the environment, in these and the other variables that obstore reads; where it says nothing,
requests are not signed, which public buckets answer. `?credentials=instance` has the machine's own role asked for, as
clouds give one: not without being told to, because elsewhere that question waits for an answer that does not come. An
endpoint of http:// is allowed.

A blob of more than PART bytes goes in parts, which are seen as one or not at all.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Collection, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, RemoteError, SetupError, Trouble
from pipeline.hashing import Digest
from pipeline.remotes.address import Address, trusted_certificates
from pipeline.remotes.blobs import is_digest, opened, plain
from pipeline.remotes.contract import CHUNK, LARGEST_DOCUMENT, Remote, Terms
from pipeline.remotes.questions import Questions
from pipeline.remotes.statuses import hint_for, trouble_of
from pipeline.remotes.waiting import Beat, StalledError, within

PART = 8 << 20  # bytes of a blob that are sent in one request, at most
_PARTS_AT_ONCE = 2
_BLOCK = 256 << 10  # bytes of an object that are waited for together
_PATIENCE = 3  # times `stall`, which a part or a block may take: what is waited for at once is no single read or write
_RETRIES = 2

_PARAMETERS = {
    "s3": ("region", "endpoint", "credentials"),
    "gs": ("credentials",),
    "az": ("account", "endpoint", "credentials"),
}
# Any of these in the environment says who asks.
_CREDENTIALS = {
    "s3": (
        "AWS_ACCESS_KEY_ID",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    ),
    "gs": (
        "GOOGLE_APPLICATION_CREDENTIALS",
        "GOOGLE_SERVICE_ACCOUNT",
        "GOOGLE_SERVICE_ACCOUNT_PATH",
        "GOOGLE_SERVICE_ACCOUNT_KEY",
        "GOOGLE_BEARER_TOKEN",
    ),
    "az": (
        *(f"AZURE_STORAGE_{name}" for name in ("ACCOUNT_KEY", "ACCESS_KEY", "MASTER_KEY", "SAS_KEY", "SAS_TOKEN")),
        *("AZURE_STORAGE_CLIENT_ID", "AZURE_CLIENT_ID", "AZURE_STORAGE_TOKEN", "AZURE_FEDERATED_TOKEN_FILE"),
    ),
}
_STATUS = re.compile(r"non-2xx status code: (\d{3})")
_CODES = {  # in the body of an S3 error, where it tells more than the status
    "NoSuchBucket": (Trouble.REFUSED, "has no such bucket", "make it, or correct the URL"),
    "RequestTimeTooSkewed": (Trouble.REFUSED, "finds this machine's clock wrong", "set the clock"),
    "EntityTooLarge": (Trouble.FULL, "takes no blob as large as that", ""),
    "QuotaExceeded": (Trouble.FULL, "has no space left", "free some space, or raise the quota"),
    "StorageFull": (Trouble.FULL, "has no space left", "free some space, or raise the quota"),
    "AuthorizationHeaderMalformed": (Trouble.REFUSED, "belongs to another region", "add ?region=… to the URL"),
}


def open_url(url: str, terms: Terms) -> Remote:
    """The bucket at a URL. Nothing is sent yet."""
    scheme = url.partition(":")[0].lower()
    address = Address.of(url, _PARAMETERS.get(scheme, ()))
    if not address.host or address.port is not None:
        raise ConfigError(f"the remote's URL {address.name!r} names no bucket", hint=f"write {scheme}://bucket/prefix")
    if address.user or address.password:
        hint = f"set them in the environment: {_CREDENTIALS[scheme][0]}, …"
        raise ConfigError(f"the remote {address.name} is given credentials in its URL", hint=hint)
    if address.query.get("credentials", "instance") != "instance":
        raise ConfigError(f"the remote {address.name} is given other credentials than `instance`")
    return BucketRemote(address, terms)


class BucketRemote:
    """A bucket. See pipeline.remotes.contract for what each method promises."""

    def __init__(self, address: Address, terms: Terms) -> None:
        self.name = address.name
        self._address = address
        self._terms = terms
        self._obstore = _imported(address)
        self._store = self._opened(terms.stall)
        self._questions = Questions()

    def action(self, key: str) -> bytes | None:
        found = self._asked(self._obstore.get, f"ac/{plain(key)}")
        if found is None:
            return None
        return b"".join(self._pieces(found, LARGEST_DOCUMENT, f"the document {key[:12]}"))

    def put_action(self, key: str, document: bytes) -> None:
        self._put(self._store, f"ac/{plain(key)}", document, use_multipart=False)

    def blob(self, digest: Digest) -> Iterator[bytes] | None:
        found = self._asked(self._obstore.get, f"cas/{plain(digest)}") if is_digest(digest) else None
        if found is None:
            return None
        if (size := found.meta["size"]) != digest.size:
            what = f"has {size:,} bytes as the blob {digest} of {digest.size:,}"
            raise self._address.error(Trouble.GARBLED, what)
        return self._pieces(found, digest.size, f"the blob {digest}")

    def put_blob(self, digest: Digest, path: Path) -> None:
        name = f"cas/{plain(digest)}"
        with opened(path, digest) as stream:
            if digest.size <= PART:
                store = self._store if digest.size <= CHUNK else self._patient
                self._put(store, name, stream.read(), use_multipart=False)
            else:
                parts = {"chunk_size": PART, "max_concurrency": _PARTS_AT_ONCE}
                self._put(self._patient, name, stream, use_multipart=True, **parts)

    def missing(self, digests: Collection[Digest]) -> set[Digest]:
        return self._questions.missing(digests, self._has)

    def close(self) -> None:
        self._questions.close()

    def _has(self, digest: Digest) -> bool:
        """Whether a blob is there. One of another length is not: it is put again."""
        found = self._asked(self._obstore.head, f"cas/{plain(digest)}") if is_digest(digest) else None
        return found is not None and found["size"] == digest.size

    # the client

    @functools.cached_property
    def _patient(self) -> Any:
        """The same bucket, for requests that send much."""
        return self._opened(self._terms.stall * _PATIENCE)

    def _opened(self, stall: float) -> Any:
        stores = self._obstore.store
        make = {"s3": stores.S3Store, "gs": stores.GCSStore, "az": stores.AzureStore}[self._address.scheme]
        # A server that is away must be known as such soon after `connect`.
        pause = timedelta(seconds=self._terms.connect / 8)
        retries = {
            "max_retries": _RETRIES,
            "retry_timeout": timedelta(seconds=self._terms.connect / 2),
            "backoff": {"init_backoff": pause / 4, "max_backoff": pause, "base": 2},
        }
        try:
            return make(
                self._address.host,
                prefix=self._address.path.strip("/") or None,
                config=_config(self._address),
                client_options=_options(self._address, self._terms.connect, stall),
                retry_config=retries,
            )
        except (self._obstore.exceptions.BaseError, ValueError, TypeError) as error:
            raise ConfigError(f"the remote {self.name} cannot be opened: {_first(error)}") from error

    # requests

    def _asked(self, question: Callable[[Any, str], Any], name: str) -> Any | None:
        """What the bucket answers; None where it has no such object."""
        try:
            return question(self._store, name)
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise self._told(error) from error
            return None
        except (self._obstore.exceptions.BaseError, OSError, ValueError) as error:
            raise self._told(error) from error

    def _put(self, store: Any, name: str, content: Any, **how: Any) -> None:
        if self._address.scheme == "gs" and _is_nobody(self._address):
            # obstore would ask for the machine's own role before it sends anything, signed or not.
            raise self._address.error(Trouble.REFUSED, "takes nothing from nobody", self._who())
        try:
            self._obstore.put(store, name, content, **how)
        except (self._obstore.exceptions.BaseError, OSError, ValueError) as error:
            raise self._told(error) from error

    def _pieces(self, found: Any, most: int, what: str) -> Iterator[bytes]:
        """An object in pieces of CHUNK at most, none of them empty."""
        blocks = iter(found.stream(min_chunk_size=_BLOCK))
        left = most
        while piece := self._next(blocks):
            left -= len(piece)
            if left < 0:
                raise self._address.error(Trouble.GARBLED, f"sends more than {most:,} bytes as {what}")
            for begin in range(0, len(piece), CHUNK):
                yield piece[begin : begin + CHUNK]

    def _next(self, blocks: Iterator[Any]) -> bytes:
        """What comes next: some CHUNK where it comes fast, at least a block where it does not, nothing after the last.

        obstore sees to each read, and not to how many a block takes.
        """

        def read(beat: Beat) -> bytes:
            until = time.monotonic() + self._terms.stall / 2
            parts, size = [], 0
            while (block := next(blocks, None)) is not None:
                beat()
                parts.append(block)
                size += len(block)
                if size >= CHUNK or time.monotonic() > until:
                    break
            return b"".join(parts)

        try:
            return within(self._terms.stall * _PATIENCE, read)
        except StalledError as error:
            raise self._address.error(Trouble.AWAY, "does not answer in time") from error
        except (self._obstore.exceptions.BaseError, OSError, ValueError) as error:
            raise self._told(error) from error

    def _told(self, error: Exception) -> RemoteError:
        """An error of obstore's in words of our own: its own go on for many lines, and show parts of requests."""
        said = str(error)
        for code, (trouble, what, hint) in _CODES.items():
            if code in said:
                return self._address.error(trouble, what, hint)
        if match := _STATUS.search(said):
            status = int(match[1])
            if status == 404:
                hint = "is it made, and the URL right?"
                return self._address.error(Trouble.REFUSED, "does not find where to put it", hint)
            hint = self._who() if status in (401, 403) else hint_for(status)
            return self._address.error(trouble_of(status), f"answers with status {status}", hint)
        if "certificate" in said.lower():
            hint = "set SSL_CERT_FILE to the certificates that this machine should trust"
            return self._address.error(Trouble.REFUSED, "has a certificate that is not trusted here", hint)
        if "kind: Timeout" in said or "TimedOut" in said:
            return self._address.error(Trouble.AWAY, "does not answer in time")
        if "kind: Connect" in said or "HTTP error" in said or "HttpError" in said or "reqwest" in said:
            return self._address.error(Trouble.AWAY, "has no connection that holds")
        if isinstance(error, FileNotFoundError | PermissionError):
            return self._address.error(Trouble.REFUSED, f"is not to be had: {_first(error)}", self._who())
        return self._address.error(Trouble.GARBLED, "does not answer as a bucket does", "does the URL lead to one?")

    def _who(self) -> str:
        return f"credentials are read from the environment: {_CREDENTIALS[self._address.scheme][0]}, …"


def _imported(address: Address) -> Any:
    try:
        import obstore
        import obstore.exceptions
        import obstore.store
    except ImportError as error:
        hint = "pip install 'tvmake[remote-buckets]'"
        raise SetupError(f"the remote {address.name} needs the package obstore", hint=hint) from error
    return obstore


def _config(address: Address) -> dict[str, Any]:
    """What the URL says of a bucket; obstore adds what the environment says."""
    config: dict[str, Any] = {}
    if _is_nobody(address):
        config["skip_signature"] = True
    for parameter, setting in (("region", "region"), ("endpoint", "endpoint"), ("account", "account_name")):
        if value := address.query.get(parameter):
            config[setting] = value
    return config


def _is_nobody(address: Address) -> bool:
    """Whether nothing says who asks."""
    return "credentials" not in address.query and not any(map(os.environ.get, _CREDENTIALS[address.scheme]))


def _options(address: Address, connect: float, stall: float) -> dict[str, Any]:
    """How its server is spoken to."""
    options: dict[str, Any] = {
        "connect_timeout": timedelta(seconds=connect),
        "read_timeout": timedelta(seconds=stall),
        "timeout": timedelta(days=1),  # for a whole request; that it moves is seen to otherwise
        "user_agent": "tvmake",
    }
    if _endpoint(address).startswith("http://"):
        options["allow_http"] = True
    elif certificates := trusted_certificates():
        options["root_certificate"] = certificates
    return options


def _endpoint(address: Address) -> str:
    """Where requests go, if it is said anywhere."""
    variables = {
        "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
        "gs": ("GOOGLE_BASE_URL",),
        "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
    }[address.scheme]
    said = (os.environ.get(name) for name in variables)
    return address.query.get("endpoint") or next(filter(None, said), "")


def _first(error: Exception) -> str:
    """The first line of an error, without a request's URL, which may have a signature in it."""
    return re.sub(r"https?://\S+", "…", (str(error).splitlines() or [""])[0])[:160]

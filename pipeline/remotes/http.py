"""Remotes behind `http://` and `https://`: any server of Bazel's HTTP cache protocol, `<url>/ac/<key>` and
`<url>/cas/<sha256>`, by GET, HEAD and PUT.

    https://bazel.build/remote/caching#http-caching

nginx with WebDAV, bazel-remote, Artifactory, … Who asks is said by user and password in the URL or by the token of the
terms. Proxies and certificates are those of HTTP_PROXY, HTTPS_PROXY, NO_PROXY, REQUESTS_CA_BUNDLE, SSL_CERT_FILE.

    GET, HEAD   200 is a hit; 404 and 410 are misses; redirects are followed, with credentials only on the same server
    PUT         200, 201, 202 and 204 are success
    any         401, 403, 405, 407, 501 → REFUSED; 413, 507 → FULL; 408, 429, other 5xx, no answer → AWAY; else GARBLED
"""

from __future__ import annotations

import contextlib
import http.client
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import urllib3
from urllib3 import exceptions

from pipeline.errors import ConfigError, RemoteError, Trouble
from pipeline.hashing import Digest
from pipeline.remotes.address import Address
from pipeline.remotes.blobs import is_digest, opened, pieces_of, plain
from pipeline.remotes.connections import Connections
from pipeline.remotes.contract import CHUNK, LARGEST_DOCUMENT, Remote, Terms
from pipeline.remotes.questions import Questions
from pipeline.remotes.statuses import hint_for, trouble_of

_BLOCK = 128 * 1024  # bytes that are handed to the system at once when sending; each must be gone within `stall`
_HOPS = 5  # redirects that are followed
_UNQUOTED = "/:@!$&'()*+,;=~"  # in the path of a URL
_REDIRECTS = {301, 302, 303, 307, 308}
_STORED = {200, 201, 202, 204}
_MISSES = {404, 410}


def open_url(url: str, terms: Terms) -> Remote:
    """The HTTP remote at a URL. Nothing is sent yet."""
    address = Address.of(url)
    if not address.host:
        raise ConfigError(f"the remote's URL {address.name!r} names no server", hint="write http://server:port/path")
    return HttpRemote(address, terms)


class HttpRemote:
    """A server of Bazel's HTTP cache protocol. See pipeline.remotes.contract for what each method promises."""

    def __init__(self, address: Address, terms: Terms) -> None:
        self.name = address.name
        self._address = address
        self._base = f"{address.scheme}://{address.where}{quote(address.path, safe=_UNQUOTED)}"
        self._terms = terms
        self._authorization = address.authorization(terms)
        self._connections = Connections(terms)
        self._questions = Questions()

    def action(self, key: str) -> bytes | None:
        response = self._read("GET", f"ac/{plain(key)}")
        if response is None:
            return None
        return b"".join(self._pieces(response, LARGEST_DOCUMENT, f"the document {key[:12]}"))

    def put_action(self, key: str, document: bytes) -> None:
        self._write(f"ac/{plain(key)}", len(document), lambda: [document] if document else [])

    def blob(self, digest: Digest) -> Iterator[bytes] | None:
        response = self._read("GET", f"cas/{plain(digest)}") if is_digest(digest) else None
        if response is None:
            return None
        length = response.headers.get("Content-Length")
        if length is not None and length != str(digest.size):
            response.close()
            what = f"sends {length[:20]} bytes as the blob {digest} of {digest.size}"
            raise self._address.error(Trouble.GARBLED, what)
        return self._pieces(response, digest.size, f"the blob {digest}")

    def put_blob(self, digest: Digest, path: Path) -> None:
        with opened(path, digest) as stream:
            self._write(f"cas/{plain(digest)}", digest.size, lambda: pieces_of(stream, _BLOCK))

    def missing(self, digests: Collection[Digest]) -> set[Digest]:
        return self._questions.missing(digests, self._has)

    def close(self) -> None:
        self._questions.close()
        self._connections.clear()

    def _has(self, digest: Digest) -> bool:
        """Whether a blob is there. One of another length is not: it is put again."""
        response = self._read("HEAD", f"cas/{plain(digest)}") if is_digest(digest) else None
        if response is None:
            return False
        _discard(response)
        return response.headers.get("Content-Length", str(digest.size)) == str(digest.size)

    # requests

    def _read(self, method: str, path: str) -> urllib3.BaseHTTPResponse | None:
        """The answer with the body that was asked for, or None for a miss. Follows redirects."""
        url = f"{self._base}/{path}"
        for _ in range(_HOPS + 1):
            response = self._sent(method, url)
            if response.status == 200:
                if response.headers.get("Content-Encoding", "identity") != "identity":
                    response.close()
                    raise self._address.error(Trouble.GARBLED, "sends what was not asked for: a compressed body")
                return response
            _discard(response)
            if response.status in _MISSES:
                return None
            if response.status not in _REDIRECTS:
                raise self._refusal(method, response.status)
            began, url = url, urljoin(url, response.headers.get("Location", ""))
            if urlsplit(url).scheme not in ("https", urlsplit(began).scheme):
                break  # also from https to http: whoever is between would be believed
        raise self._address.error(Trouble.GARBLED, "redirects to nowhere", hint="does the URL lead to a cache?")

    def _write(self, path: str, size: int, blocks: Callable[[], Any]) -> None:
        response = self._sent("PUT", f"{self._base}/{path}", {"Content-Length": str(size)}, blocks)
        _discard(response)
        if response.status not in _STORED:
            raise self._refusal("PUT", response.status)

    def _refusal(self, method: str, status: int) -> RemoteError:
        return self._address.error(trouble_of(status), f"answers {method} with status {status}", hint_for(status))

    def _sent(
        self, method: str, url: str, headers: dict[str, str] | None = None, blocks: Callable[[], Any] | None = None
    ) -> urllib3.BaseHTTPResponse:
        """One request. It is sent once more where the connection was closed before an answer, as a server may do with
        one that was kept open: every request here can be repeated."""
        sent = {"Accept-Encoding": "identity", "User-Agent": "tvmake", "Accept": "*/*", **(headers or {})}
        if self._authorization and _same_server(url, self._base):
            sent["Authorization"] = self._authorization
        for is_last in (False, True):
            with self._told():
                try:
                    return self._connections.to(url).request(
                        method,
                        url,
                        body=blocks() if blocks is not None else None,
                        headers=sent,
                        timeout=urllib3.Timeout(connect=self._terms.connect, read=self._terms.stall),
                        retries=False,
                        redirect=False,
                        preload_content=False,
                        decode_content=False,
                    )
                except exceptions.ProtocolError as error:
                    if is_last or not _was_closed(error):
                        raise
        raise AssertionError("a request ends by an answer or an error")

    def _pieces(self, response: urllib3.BaseHTTPResponse, most: int, what: str) -> Iterator[bytes]:
        """The body of an answer in pieces, as they come."""
        left, is_read = most, False
        try:
            while True:
                with self._told():
                    piece = response.read1(CHUNK)
                if not piece:
                    is_read = True
                    return
                left -= len(piece)
                if left < 0:
                    raise self._address.error(Trouble.GARBLED, f"sends more than {most:,} bytes as {what}")
                yield piece
        finally:
            # A connection with something left in it is of no use to the next request.
            response.release_conn() if is_read else response.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Turns what urllib3 raises into a RemoteError in words of our own, as its own show addresses of proxies."""
        try:
            yield
        except (exceptions.HTTPError, http.client.HTTPException, OSError, ValueError) as error:
            raise _told(self._address, error) from error


def _told(address: Address, error: Exception) -> RemoteError:
    causes = list(_causes(error))
    said = " ".join(map(str, causes))
    if isinstance(error, exceptions.ProxyError):
        return address.error(Trouble.AWAY, "is behind a proxy that does not answer", hint="HTTP_PROXY, HTTPS_PROXY")
    if isinstance(error, exceptions.SSLError):
        if "CERTIFICATE_VERIFY_FAILED" in said:
            hint = "set SSL_CERT_FILE to the certificates that this machine should trust"
            return address.error(Trouble.REFUSED, "has a certificate that is not trusted here", hint)
        return address.error(Trouble.GARBLED, "does not speak TLS as https:// needs it")
    if isinstance(error, exceptions.NameResolutionError):
        return address.error(Trouble.AWAY, "has a name that nobody knows")
    if isinstance(error, exceptions.TimeoutError) or any(isinstance(each, TimeoutError) for each in causes):
        return address.error(Trouble.AWAY, "does not answer in time")
    if any(isinstance(each, OSError | http.client.IncompleteRead) for each in causes):
        why = next((each.strerror for each in causes if isinstance(each, OSError) and each.strerror), "it broke")
        return address.error(Trouble.AWAY, f"has no connection that holds: {why}")
    return address.error(Trouble.GARBLED, "does not speak HTTP as a cache does", hint="does the URL lead to a cache?")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it wraps or came from."""
    while error is not None:
        yield error
        inner = [each for each in error.args if isinstance(each, BaseException)]
        error = inner[0] if inner else error.__cause__ or error.__context__


def _was_closed(error: Exception) -> bool:
    closed = (ConnectionResetError, BrokenPipeError, ConnectionAbortedError)
    return any(isinstance(each, closed) for each in _causes(error))


def _same_server(one: str, other: str) -> bool:
    """Whether two URLs have scheme, host and port in common."""
    return urlsplit(one)[:2] == urlsplit(other)[:2]


def _discard(response: urllib3.BaseHTTPResponse) -> None:
    """Has done with an answer: reads what little is left, so that its connection can be used again, or closes it."""
    left = response.length_remaining
    try:
        if left is not None and left <= _BLOCK:
            response.drain_conn()
        else:
            response.close()
        response.release_conn()
    except (exceptions.HTTPError, OSError):
        response.close()

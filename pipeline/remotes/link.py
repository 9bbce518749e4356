"""A gRPC connection to a server of the Remote Execution API: opened when it is needed, calls that keep the terms, and
what goes wrong in words of our own.

How long it may take: a connection is tried for `connect` seconds; a call that moves little must end within `stall`, and
a stream must move a message within each. gRPC is loaded when a Link is made. Do not fork a process that has opened one:
gRPC's threads do not come along.
"""

from __future__ import annotations

import os
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from pipeline.errors import RemoteError, SetupError, Trouble
from pipeline.remotes import messages
from pipeline.remotes.address import Address, trusted_certificates
from pipeline.remotes.contract import LARGEST_DOCUMENT, Terms
from pipeline.remotes.waiting import Beat, StalledError, connected, within

_CAPABILITIES = "/build.bazel.remote.execution.v2.Capabilities/GetCapabilities"
_LARGEST_ANSWER = LARGEST_DOCUMENT + (64 << 10)  # bytes of a message, with what it has beside a document
_DISTRUST = "CERTIFICATE_VERIFY_FAILED"  # in what gRPC tells

_TROUBLES = {
    **dict.fromkeys(("UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED"), Trouble.AWAY),
    **dict.fromkeys(("UNAUTHENTICATED", "PERMISSION_DENIED"), Trouble.REFUSED),
    "RESOURCE_EXHAUSTED": Trouble.FULL,
}
_HINTS = {
    Trouble.REFUSED: "give credentials, or other ones; if this machine is only to read, say so: policy read-only",
    Trouble.FULL: "free some space on the server, or raise its limits",
    Trouble.GARBLED: "does the URL lead to a server of the Remote Execution API, and to the right instance?",
}


@dataclass(frozen=True)
class Server:
    """A channel, and what the server at its other end says of its cache (a message CacheCapabilities)."""

    channel: Any
    cache: Any


class Link:
    """The connection of one remote. Every method may be called from any thread, and raises RemoteError."""

    def __init__(self, address: Address, terms: Terms) -> None:
        self._address = address
        self._terms = terms
        self._grpc = _imported(address)
        authorization = address.authorization(terms)
        self._metadata = (("authorization", authorization),) if authorization else ()
        self._lock = threading.Lock()
        self._known: Server | None = None
        self._opening: Future[Server] | None = None

    # calls

    def ask(self, method: str, request: Any, answer: Any) -> Any | None:
        """The answer to one question, a message of the class `answer`; None where the server says NOT_FOUND."""
        try:
            return self._unary(self.server().channel, method, request, answer)
        except self._grpc.RpcError as error:
            if error.code() is self._grpc.StatusCode.NOT_FOUND:
                return None
            raise self._told(error) from error

    def read(self, method: str, request: Any, answer: Any) -> Iterator[Any] | None:
        """The messages of a stream that the server sends; None where it says NOT_FOUND."""
        call = _method(self.server().channel.unary_stream, method, answer)(request, metadata=self._metadata)
        try:
            first = self._message(call)
        except self._grpc.RpcError as error:
            if error.code() is self._grpc.StatusCode.NOT_FOUND:
                return None
            raise self._told(error) from error
        return self._messages(first, call)

    def write(self, method: str, requests: Callable[[Beat], Iterator[Any]], answer: Any) -> Any:
        """What the server says to a stream of messages, or of its beginning. Each message is to be told by a beat."""
        beat = Beat()
        send = _method(self.server().channel.stream_unary, method, answer)
        call = send.future(requests(beat), metadata=self._metadata)
        try:
            while True:
                try:
                    return call.result(timeout=max(beat.left(self._terms.stall), 0.001))
                except self._grpc.FutureTimeoutError:
                    if beat.left(self._terms.stall) <= 0:
                        raise self._stalled() from None
        except self._grpc.RpcError as error:
            raise self._told(error) from error
        finally:
            call.cancel()  # where it has ended, nothing

    def close(self) -> None:
        with self._lock:
            server, self._known = self._known, None
        if server is not None:
            server.channel.close()

    def is_missing(self, status: Any) -> bool:
        """Whether a status within an answer is NOT_FOUND."""
        return bool(status.code == self._grpc.StatusCode.NOT_FOUND.value[0])

    def refuse_unless_good(self, status: Any) -> None:
        """Raises what a status within an answer says."""
        if status.code:
            codes = {code.value[0]: code.name for code in self._grpc.StatusCode}
            raise self._refusal(codes.get(status.code, "UNKNOWN"), status.message)

    def _unary(self, channel: Any, method: str, request: Any, answer: Any) -> Any:
        call = _method(channel.unary_unary, method, answer)
        return call(request, timeout=self._terms.stall, metadata=self._metadata)

    def _message(self, call: Any) -> Any | None:
        """The next message of a stream, None after the last."""
        try:
            return within(self._terms.stall, lambda _: next(call, None))
        except StalledError as error:
            call.cancel()
            raise self._stalled() from error

    def _messages(self, message: Any | None, call: Any) -> Iterator[Any]:
        try:
            while message is not None:
                yield message
                message = self._message(call)
        except self._grpc.RpcError as error:
            raise self._told(error) from error
        finally:
            call.cancel()

    # the connection

    def server(self) -> Server:
        """The server, connected to where it is not. Threads that need it at once wait for one of them to do so."""
        with self._lock:
            if self._known is not None:
                return self._known
            opening = self._opening
            is_mine = opening is None
            if opening is None:
                opening = self._opening = Future()
        if is_mine:
            try:
                server = self._open()
            except BaseException as error:
                self._opened(None)
                opening.set_exception(error)
            else:
                self._opened(server)
                opening.set_result(server)
        return opening.result()

    def _opened(self, server: Server | None) -> None:
        with self._lock:
            self._known, self._opening = server, None

    def _open(self) -> Server:
        if not _has_proxy(self._address):
            self._require_somebody()
        channel = self._channel()
        request = messages.GetCapabilitiesRequest(instance_name=self._address.path.strip("/"))
        try:
            answer = self._unary(channel, _CAPABILITIES, request, messages.ServerCapabilities)
        except self._grpc.RpcError as error:
            if error.code() is not self._grpc.StatusCode.UNIMPLEMENTED:
                raise self._told(error) from error
            answer = messages.ServerCapabilities()  # it can what every server can
        cache = answer.cache_capabilities
        if cache.digest_functions and messages.SHA256 not in cache.digest_functions:
            raise self._address.error(Trouble.GARBLED, "does not name blobs by SHA-256", "configure it to")
        return Server(channel, cache)

    def _require_somebody(self) -> None:
        """Knocks. gRPC would say late, and in other words, that nobody is there."""
        assert self._address.port is not None
        try:
            connected(self._address.host, self._address.port, self._terms.connect).close()
        except TimeoutError as error:
            raise self._address.error(Trouble.AWAY, "does not answer in time") from error
        except OSError as error:
            raise self._address.error(Trouble.AWAY, f"does not answer: {error.strerror or error}") from error

    def _channel(self) -> Any:
        connect = int(self._terms.connect * 1000)
        options = [
            ("grpc.max_receive_message_length", _LARGEST_ANSWER),
            ("grpc.max_send_message_length", -1),
            ("grpc.min_reconnect_backoff_ms", connect),  # is also the time limit of an attempt
            ("grpc.max_reconnect_backoff_ms", connect),
            ("grpc.use_local_subchannel_pool", 1),  # no other remote's failures
            ("grpc.primary_user_agent", "tvmake"),
        ]
        if self._address.scheme == "grpc":
            return self._grpc.insecure_channel(self._address.where, options=options)
        # What gRPC is told to trust by its own variable comes first.
        own = os.environ.get("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH")
        credentials = self._grpc.ssl_channel_credentials(None if own else trusted_certificates())
        return self._grpc.secure_channel(self._address.where, credentials, options=options)

    def _forget(self) -> None:
        """Has the next call open a connection of its own, with no memory of what failed. Calls under way go on."""
        with self._lock:
            self._known = None

    # what goes wrong

    def _stalled(self) -> RemoteError:
        self._forget()
        return self._address.error(Trouble.AWAY, "does not answer in time")

    def _told(self, error: Any) -> RemoteError:
        return self._refusal(error.code().name, error.details() or "")

    def _refusal(self, code: str, details: str) -> RemoteError:
        trouble = _trouble(code, details)
        if trouble is Trouble.AWAY:
            self._forget()
        if code == "DEADLINE_EXCEEDED":
            return self._address.error(trouble, "does not answer in time")
        if _DISTRUST in details:
            hint = "set SSL_CERT_FILE to the certificates that this machine should trust"
            return self._address.error(trouble, "has a certificate that is not trusted here", hint)
        # What a server says may repeat what it was sent.
        for secret in (*self._terms.secrets.values(), self._address.password, *dict(self._metadata).values()):
            details = details.replace(secret, "…") if secret else details
        said = " ".join("".join(each if each.isprintable() else " " for each in details).split())[:160]
        return self._address.error(trouble, f"answers {code}: {said}", _HINTS.get(trouble, ""))


def _trouble(code: str, details: str) -> Trouble:
    if "http1.x" in details or f"vs. {_LARGEST_ANSWER})" in details:  # the second: larger than we take
        return Trouble.GARBLED
    if code == "INTERNAL" and "RST_STREAM" in details:
        return Trouble.AWAY  # what gRPC calls a connection that breaks in the middle of a stream
    if _DISTRUST in details:
        return Trouble.REFUSED
    return _TROUBLES.get(code, Trouble.GARBLED)


def _method(kind: Any, name: str, answer: Any) -> Any:
    return kind(name, request_serializer=_serialized, response_deserializer=answer.FromString)


def _serialized(message: Any) -> Any:
    return message.SerializeToString()


def _imported(address: Address) -> Any:
    # gRPC writes to the terminal what it also raises, and has handlers for forks that wait for its threads.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    try:
        import grpc
    except ImportError as error:
        hint = "pip install 'tvmake[remote-grpc]'"
        raise SetupError(f"the remote {address.name} needs the package grpcio", hint=hint) from error
    return grpc


def _has_proxy(address: Address) -> bool:
    """Whether gRPC would go through a proxy. It looks at these variables, whatever the scheme."""
    named = any(os.environ.get(name) for name in ("grpc_proxy", "https_proxy", "http_proxy"))
    return named and not urllib.request.proxy_bypass(address.where)

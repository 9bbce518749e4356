"""Servers that do what servers must not: the first part of the path of a URL, or of an instance's name, says what.

Everything here runs in threads of the test's process.
"""

from __future__ import annotations

import contextlib
import gzip
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import grpc
import zstandard

from pipeline.remotes import messages

PAGE = b"<html><body>Sign in to go on</body></html>"


@dataclass
class Crooked:
    """An HTTP server. `held` is what it has, `seen` are the requests: method, path, headers in lower case."""

    url: str
    held: dict[str, bytes] = field(default_factory=dict)
    seen: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    elsewhere: str = ""  # where /away leads to
    connections: int = 0  # that were made


@contextlib.contextmanager
def crooked(tls: tuple[Path, Path] | None = None) -> Iterator[Crooked]:
    """What each part does is said by the methods of `_Handler`. `tls`: the files of a key and of its certificate."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    if tls is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(tls[1], tls[0])
        server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients that turn away are no news here
    server.double = Crooked(f"http{'s' if tls else ''}://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server.double  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer goes as one packet, or the next question waits for an acknowledgement

    def setup(self) -> None:
        super().setup()
        self.server.double.connections += 1  # type: ignore[attr-defined]

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        double: Crooked = self.server.double  # type: ignore[attr-defined]
        headers = {name.lower(): value for name, value in self.headers.items()}
        double.seen.append((self.command, self.path, headers))
        length = int(headers.get("content-length", 0))
        path = unquote(urlsplit(self.path).path)  # as a proxy, it is asked for whole URLs
        kind, _, rest = path.strip("/").partition("/")
        if kind == "stall":
            time.sleep(3)
            self.close_connection = True
            return
        body = self.rfile.read(length)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if kind.isdigit():
                self._say(int(kind), PAGE)
            else:
                getattr(self, f"_{kind}")(double, rest, body)

    def _say(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()

    def _good(self, double: Crooked, rest: str, body: bytes) -> None:
        """As it should be."""
        if self.command == "PUT":
            double.held[rest] = body
            self._say(201, b"")
        elif rest in double.held:
            self._say(200, double.held[rest])
        else:
            self._say(404, PAGE)

    def _closing(self, double: Crooked, rest: str, body: bytes) -> None:
        """Good, but closes each connection after an answer without saying so."""
        self._good(double, rest, body)
        self.close_connection = True

    def _dropping(self, double: Crooked, rest: str, body: bytes) -> None:
        """Good, but closes each second connection without an answer."""
        if len(double.seen) % 2:
            self.close_connection = True
        else:
            self._good(double, rest, body)

    def _chunked(self, double: Crooked, rest: str, body: bytes) -> None:
        """Good, but never tells a length."""
        if self.command == "PUT" or rest not in double.held:
            self._good(double, rest, body)
            return
        self._begin(Transfer_Encoding="chunked")
        data = double.held[rest]
        for piece in (data[: len(data) // 2], data[len(data) // 2 :]):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    def _html(self, double: Crooked, rest: str, body: bytes) -> None:
        """A page for everything, as of a portal."""
        self._say(200, PAGE, Content_Type="text/html")

    def _half(self, double: Crooked, rest: str, body: bytes) -> None:
        """Half of what it says, then nothing more."""
        data = double.held[rest]
        self._begin(Content_Length=str(len(data)))
        self.wfile.write(data[: len(data) // 2])
        self.close_connection = True

    def _longer(self, double: Crooked, rest: str, body: bytes) -> None:
        """More than there should be, with a length that is true."""
        self._say(200, double.held[rest] + b"x")

    def _endless(self, double: Crooked, rest: str, body: bytes) -> None:
        """More than there should be, without end."""
        self._begin(Transfer_Encoding="chunked")
        while True:
            self.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")

    def _hanging(self, double: Crooked, rest: str, body: bytes) -> None:
        """One byte, and then it hangs."""
        self._begin(Content_Length=str(len(double.held[rest])))
        self.wfile.write(b"x")
        self.wfile.flush()
        time.sleep(3)

    def _trickle(self, double: Crooked, rest: str, body: bytes) -> None:
        """A byte each 0.1 s."""
        data = double.held[rest]
        self._begin(Content_Length=str(len(data)))
        for place in range(100):
            self.wfile.write(data[place : place + 1])
            self.wfile.flush()
            time.sleep(0.1)

    def _drip(self, double: Crooked, rest: str, body: bytes) -> None:
        """A byte each 0.1 s, of the header already."""
        for byte in b"HTTP/1.1 200 OK\r\n" + b"X-Filler: abcdefghijklmnopqrstuvwxyz\r\n" * 100:
            self.wfile.write(bytes((byte,)))
            self.wfile.flush()
            time.sleep(0.1)

    def _noise(self, double: Crooked, rest: str, body: bytes) -> None:
        """No HTTP at all."""
        self.wfile.write(b"\x00\x01\x02 what is it?\r\n\r\n")
        self.close_connection = True

    def _shut(self, double: Crooked, rest: str, body: bytes) -> None:
        """Closes each connection without an answer."""
        self.close_connection = True

    def _gzip(self, double: Crooked, rest: str, body: bytes) -> None:
        """Compressed, though nobody asked for it."""
        self._say(200, gzip.compress(double.held[rest]), Content_Encoding="gzip")

    def _away(self, double: Crooked, rest: str, body: bytes) -> None:
        """It is elsewhere."""
        self._say(302, b"", Location=f"{double.elsewhere}/{rest}")

    def _moved(self, double: Crooked, rest: str, body: bytes) -> None:
        """It is here, under another name."""
        self._say(307, b"", Location=f"/good/{rest}")

    def _loop(self, double: Crooked, rest: str, body: bytes) -> None:
        """It is where you are."""
        self._say(302, b"", Location=self.path)

    def _nowhere(self, double: Crooked, rest: str, body: bytes) -> None:
        """It is in a file."""
        self._say(302, b"", Location="file:///etc/passwd")

    def _bucket(self, double: Crooked, rest: str, body: bytes) -> None:
        """Answers as S3 does, to whoever has a bucket of that name; any other name is a status."""
        name = rest.partition("/")[0].removeprefix("status-")
        if name.isdigit():
            self._say(int(name), b"<Error><Code>Whatever</Code></Error>", ETag='"1"')
        elif self.command == "PUT":
            double.held[rest] = body
            self._say(200, b"", ETag='"1"')
        elif rest in double.held:
            self._say(200, double.held[rest], ETag='"1"', Last_Modified="Thu, 01 Jan 2026 00:00:00 GMT")
        else:
            self._say(404, b"<Error><Code>NoSuchKey</Code></Error>")

    def _begin(self, **headers: str) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing to the terminal."""


@contextlib.contextmanager
def deaf() -> Iterator[int]:
    """A port of the loopback where connections are neither taken nor refused: its queue is full."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(0)
    port = listener.getsockname()[1]
    waiting = []
    for _ in range(4):
        one = socket.socket()
        one.setblocking(False)
        one.connect_ex(("127.0.0.1", port))
        waiting.append(one)
    try:
        yield port
    finally:
        for one in (*waiting, listener):
            one.close()


class Reapi:
    """A server of the Remote Execution API that holds everything in memory.

    `small` and `zstd` are what it says it can; `trick` is what it does wrong, by the name of a method:

        a code      that error
        "stall"     nothing, for some seconds
        "garbage"   other bytes
        "bomb"      a blob of much more than its size, compressed
    """

    def __init__(self) -> None:
        self.blobs: dict[tuple[str, int], bytes] = {}
        self.actions: dict[tuple[str, int], bytes] = {}
        self.small = 4 << 20
        self.zstd = False
        self.trick: dict[str, Any] = {}
        self.seen: list[str] = []  # methods, and resources of streams
        self.metadata: dict[str, str] = {}

    # What each method answers; requests and answers as messages.

    def capabilities(self, request: Any) -> Any:
        cache = {"digest_functions": self.trick.get("functions", [messages.SHA256])}
        cache["max_batch_total_size_bytes"] = self.small
        cache["supported_compressors"] = cache["supported_batch_update_compressors"] = (
            [messages.ZSTD] if self.zstd else []
        )
        return messages.ServerCapabilities(cache_capabilities=cache)

    def find_missing(self, request: Any) -> Any:
        absent = [each for each in request.blob_digests if (each.hash, each.size_bytes) not in self.blobs]
        return messages.FindMissingBlobsResponse(missing_blob_digests=absent)

    def read_small(self, request: Any) -> Any:
        answers = []
        for each in request.digests:
            data = self.blobs.get((each.hash, each.size_bytes))
            if data is None:
                answers.append({"digest": each, "status": {"code": grpc.StatusCode.NOT_FOUND.value[0]}})
            elif messages.ZSTD in request.acceptable_compressors:
                answers.append({"digest": each, "data": self._packed("read_small", data), "compressor": messages.ZSTD})
            else:
                answers.append({"digest": each, "data": self._sent("read_small", data)})
        return messages.BatchReadBlobsResponse(responses=answers)

    def put_small(self, request: Any) -> Any:
        for each in request.requests:
            data = zstandard.decompress(each.data) if each.compressor == messages.ZSTD else each.data
            self.blobs[each.digest.hash, each.digest.size_bytes] = data
        status = {"code": self.trick["status"].value[0], "message": "as it is"} if "status" in self.trick else {}
        return messages.BatchUpdateBlobsResponse(
            responses=[{"digest": each.digest, "status": status} for each in request.requests]
        )

    def read(self, request: Any) -> Iterator[Any]:
        self.seen.append(request.resource_name)
        *_, kind, hash_, size = request.resource_name.split("/")
        data = self.blobs[hash_, int(size)]
        data = self._packed("read", data) if kind == "zstd" else self._sent("read", data)
        for begin in range(0, len(data), 100_000):
            yield messages.ReadResponse(data=data[begin : begin + 100_000])
            if self.trick.get("read") == "hang":
                time.sleep(3)
            if self.trick.get("read") == "break":
                raise ConnectionError("broken")

    def write(self, requests: Iterator[Any]) -> Any:
        first = next(requests)
        self.seen.append(first.resource_name)
        *_, kind, hash_, size = first.resource_name.split("/")
        if (hash_, int(size)) in self.blobs:
            return messages.WriteResponse(committed_size=-1 if kind == "zstd" else int(size))
        if self.trick.get("write") == "half":
            return messages.WriteResponse(committed_size=len(first.data))
        data, is_finished = bytearray(first.data), first.finish_write
        for each in requests:
            assert each.write_offset == len(data)
            data += each.data
            is_finished = each.finish_write
        assert is_finished
        self.blobs[hash_, int(size)] = (
            zstandard.ZstdDecompressor().decompressobj().decompress(bytes(data)) if (kind == "zstd") else bytes(data)
        )
        return messages.WriteResponse(committed_size=len(data))

    def get_action(self, request: Any) -> Any:
        found = self.actions[request.action_digest.hash, request.action_digest.size_bytes]
        return messages.ActionResult.FromString(found)

    def put_action(self, request: Any) -> Any:
        digest = request.action_digest
        self.actions[digest.hash, digest.size_bytes] = request.action_result.SerializeToString()
        return request.action_result

    def _sent(self, name: str, data: bytes) -> bytes:
        return {"garbage": b"x" * len(data), "longer": data + b"x"}.get(self.trick.get(name, ""), data)

    def _packed(self, name: str, data: bytes) -> bytes:
        if self.trick.get(name) == "bomb":
            return zstandard.compress(bytes(200 << 20))
        return b"no zstd" if self.trick.get(name) == "garbage" else zstandard.compress(data)


_SERVICES = {
    "build.bazel.remote.execution.v2.Capabilities": {
        "GetCapabilities": ("capabilities", messages.GetCapabilitiesRequest),
    },
    "build.bazel.remote.execution.v2.ContentAddressableStorage": {
        "FindMissingBlobs": ("find_missing", messages.FindMissingBlobsRequest),
        "BatchReadBlobs": ("read_small", messages.BatchReadBlobsRequest),
        "BatchUpdateBlobs": ("put_small", messages.BatchUpdateBlobsRequest),
    },
    "build.bazel.remote.execution.v2.ActionCache": {
        "GetActionResult": ("get_action", messages.GetActionResultRequest),
        "UpdateActionResult": ("put_action", messages.UpdateActionResultRequest),
    },
    "google.bytestream.ByteStream": {
        "Read": ("read", messages.ReadRequest),
        "Write": ("write", messages.WriteRequest),
    },
}
_KINDS = {"read": grpc.unary_stream_rpc_method_handler, "write": grpc.stream_unary_rpc_method_handler}


@contextlib.contextmanager
def reapi(tls: tuple[Path, Path] | None = None) -> Iterator[tuple[Reapi, str]]:
    """A server of the Remote Execution API, and its URL. `tls`: the files of a key and of its certificate."""
    double = Reapi()
    server = grpc.server(futures.ThreadPoolExecutor(16), options=[("grpc.so_reuseport", 0)])
    for service, methods in _SERVICES.items():
        handlers = {}
        for method, (name, request) in methods.items():
            make = _KINDS.get(name, grpc.unary_unary_rpc_method_handler)
            handlers[method] = make(
                _handler(double, name),
                request_deserializer=request.FromString,
                response_serializer=lambda message: message.SerializeToString(),
            )
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    if tls is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        pair = (tls[0].read_bytes(), tls[1].read_bytes())
        port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
    server.start()
    try:
        yield double, f"grpc{'s' if tls else ''}://127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def _handler(double: Reapi, name: str) -> Callable[[Any, Any], Any]:
    def prepare(context: Any) -> None:
        double.seen.append(name)
        double.metadata = dict(context.invocation_metadata())
        trick = double.trick.get(name)
        if isinstance(trick, grpc.StatusCode):
            context.abort(trick, f"as it is, {double.metadata.get('authorization')}")
        if trick == "stall":
            time.sleep(3)

    def answer(request: Any, context: Any) -> Any:
        prepare(context)
        try:
            return getattr(double, name)(request)
        except KeyError:
            return context.abort(grpc.StatusCode.NOT_FOUND, "there is none")

    def stream(request: Any, context: Any) -> Iterator[Any]:
        prepare(context)
        try:
            yield from double.read(request)
        except KeyError:
            context.abort(grpc.StatusCode.NOT_FOUND, "there is none")
        except ConnectionError:
            context.abort(grpc.StatusCode.UNAVAILABLE, "broken")

    return stream if name == "read" else answer

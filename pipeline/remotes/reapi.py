"""Remotes behind `grpc://` and `grpcs://`: servers of the Remote Execution API, `grpc://host:port/instance`.

    https://github.com/bazelbuild/remote-apis/blob/main/build/bazel/remote/execution/v2/remote_execution.proto

    documents     ActionCache: GetActionResult, UpdateActionResult
    small blobs   ContentAddressableStorage: BatchReadBlobs, BatchUpdateBlobs
    others        ByteStream: Read, Write
    missing       ContentAddressableStorage: FindMissingBlobs

Blobs travel compressed where the server says that it speaks zstd and the package zstandard is installed. Who asks is
said by the token of the terms, or by user and password in the URL, as call metadata.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, Trouble
from pipeline.hashing import Digest
from pipeline.remotes import messages
from pipeline.remotes.address import Address
from pipeline.remotes.blobs import is_digest, opened, pieces_of, plain
from pipeline.remotes.contract import CHUNK, Remote, Terms
from pipeline.remotes.link import Link
from pipeline.remotes.packing import BrokenPackageError, Zstd
from pipeline.remotes.waiting import Beat

_AC = "/build.bazel.remote.execution.v2.ActionCache/"
_CAS = "/build.bazel.remote.execution.v2.ContentAddressableStorage/"
_BYTES = "/google.bytestream.ByteStream/"
_SMALL = 512 << 10  # bytes of a blob that goes in one message, which must be through within `stall`
_OVERHEAD = 16 << 10  # bytes of a message beside the blob in it, amply
_BLOCK = 256 << 10  # bytes in a message of a stream
_QUESTIONS = 4000  # digests in a question: some 300 kB, and a message may have 4 MB
_NOTHING = sha256().hexdigest()
# Servers such as Buildbarn find a document by the hash and the size of its action. Ours have no action with a size: any
# will do that is always the same. Not 0: with a size of 0, only the hash of nothing is a digest.
_ACTION_SIZE = 1


def open_url(url: str, terms: Terms) -> Remote:
    """The server at a URL. Nothing is sent yet."""
    address = Address.of(url)
    if not address.host or address.port is None:
        raise ConfigError(f"the remote's URL {address.name!r} names no port", hint="write grpc://server:port/instance")
    return ReapiRemote(address, terms)


class ReapiRemote:
    """A server of the Remote Execution API. See pipeline.remotes.contract for what each method promises."""

    def __init__(self, address: Address, terms: Terms) -> None:
        self.name = address.name
        self._address = address
        self._instance = address.path.strip("/")
        self._link = Link(address, terms)
        self._zstd = Zstd.found()

    # documents

    def action(self, key: str) -> bytes | None:
        named = {"instance_name": self._instance, "action_digest": _action(key)}
        request = messages.GetActionResultRequest(**named, inline_stdout=True)
        result = self._link.ask(f"{_AC}GetActionResult", request, messages.ActionResult)
        return None if result is None else result.SerializeToString(deterministic=True)

    def put_action(self, key: str, document: bytes) -> None:
        try:
            result = messages.ActionResult.FromString(document)
        except messages.DecodeError as error:
            raise ValueError(f"the document of {key[:12]} is no ActionResult") from error
        named = {"instance_name": self._instance, "action_digest": _action(key)}
        request = messages.UpdateActionResultRequest(**named, action_result=result)
        self._done(f"{_AC}UpdateActionResult", request, messages.ActionResult)

    # blobs

    def blob(self, digest: Digest) -> Iterator[bytes] | None:
        if _is_nothing(digest):
            return iter(())  # always there, says the API
        if not is_digest(digest):
            return None
        pieces = self._read_small(digest) if self._is_small(digest) else self._read(digest)
        return None if pieces is None else self._bounded(pieces, digest)

    def put_blob(self, digest: Digest, path: Path) -> None:
        if _is_nothing(digest):
            return
        is_small = self._is_small(digest)
        with opened(path, digest) as stream:
            if is_small:
                self._put_small(digest, stream.read())
            else:
                self._put(digest, pieces_of(stream, _BLOCK))

    def missing(self, digests: Collection[Digest]) -> set[Digest]:
        asked = [digest for digest in digests if is_digest(digest) and not _is_nothing(digest)]
        absent: set[tuple[str, int]] = set()
        for begin in range(0, len(asked), _QUESTIONS):
            batch = [_sent(digest) for digest in asked[begin : begin + _QUESTIONS]]
            request = messages.FindMissingBlobsRequest(instance_name=self._instance, blob_digests=batch)
            answer = self._done(f"{_CAS}FindMissingBlobs", request, messages.FindMissingBlobsResponse)
            absent.update((each.hash, each.size_bytes) for each in answer.missing_blob_digests)
        missing = {digest for digest in asked if (digest.hash, digest.size) in absent}
        return missing.union(digest for digest in digests if not is_digest(digest))

    def close(self) -> None:
        self._link.close()

    # small ones, in one message

    def _is_small(self, digest: Digest) -> bool:
        most = self._link.server().cache.max_batch_total_size_bytes or _SMALL + _OVERHEAD
        return digest.size <= min(_SMALL, most - _OVERHEAD)

    def _read_small(self, digest: Digest) -> Iterator[bytes] | None:
        zstd = self._speaks_zstd()
        accepted = [messages.ZSTD] if zstd else []
        named = {"instance_name": self._instance, "digests": [_sent(digest)]}
        request = messages.BatchReadBlobsRequest(**named, acceptable_compressors=accepted)
        answer = self._done(f"{_CAS}BatchReadBlobs", request, messages.BatchReadBlobsResponse)
        if len(answer.responses) != 1:
            raise self._address.error(Trouble.GARBLED, f"answers one question with {len(answer.responses)} blobs")
        blob = answer.responses[0]
        if self._link.is_missing(blob.status):
            return None
        self._link.refuse_unless_good(blob.status)
        data = iter((blob.data,))
        if blob.compressor == messages.IDENTITY:
            return data
        if blob.compressor == messages.ZSTD and zstd:
            return zstd.unpacked(data)
        raise self._address.error(Trouble.GARBLED, "compresses in a way that was not asked for")

    def _put_small(self, digest: Digest, data: bytes) -> None:
        compressor = messages.IDENTITY
        if (zstd := self._speaks_zstd(in_batches=True)) and len(packed := zstd.pack(data)) < len(data):
            data, compressor = packed, messages.ZSTD
        upload = {"digest": _sent(digest), "data": data, "compressor": compressor}
        request = messages.BatchUpdateBlobsRequest(instance_name=self._instance, requests=[upload])
        answer = self._done(f"{_CAS}BatchUpdateBlobs", request, messages.BatchUpdateBlobsResponse)
        for each in answer.responses:
            self._link.refuse_unless_good(each.status)

    # large ones, as a stream of messages

    def _read(self, digest: Digest) -> Iterator[bytes] | None:
        zstd = self._speaks_zstd()
        request = messages.ReadRequest(resource_name=self._resource("", digest, zstd))
        answers = self._link.read(f"{_BYTES}Read", request, messages.ReadResponse)
        if answers is None:
            return None
        pieces = _data(answers)
        return zstd.unpacked(pieces) if zstd else pieces

    def _put(self, digest: Digest, pieces: Iterator[bytes]) -> None:
        zstd = self._speaks_zstd()
        resource = self._resource(f"uploads/{uuid.uuid4()}/", digest, zstd)
        if zstd:
            pieces = zstd.packed(pieces, digest.size)
        answer = self._link.write(
            f"{_BYTES}Write", lambda beat: _writes(resource, pieces, beat), messages.WriteResponse
        )
        # A server that has the blob already stops listening and says the whole size; any other number is a part.
        if not zstd and answer.committed_size != digest.size:
            what = f"took {answer.committed_size:,} bytes of the blob {digest} of {digest.size:,}"
            raise self._address.error(Trouble.GARBLED, what)

    def _resource(self, upload: str, digest: Digest, zstd: Zstd | None) -> str:
        """What ByteStream calls a blob: [instance/][uploads/<uuid>/](blobs|compressed-blobs/zstd)/<hash>/<size>"""
        instance = f"{self._instance}/" if self._instance else ""
        kind = "compressed-blobs/zstd" if zstd else "blobs"
        return f"{instance}{upload}{kind}/{plain(digest)}/{digest.size}"

    # what both need

    def _speaks_zstd(self, *, in_batches: bool = False) -> Zstd | None:
        """What compresses, where the server takes it."""
        cache = self._link.server().cache
        takes = cache.supported_batch_update_compressors if in_batches else cache.supported_compressors
        return self._zstd if messages.ZSTD in takes else None

    def _bounded(self, pieces: Iterator[bytes], digest: Digest) -> Iterator[bytes]:
        """The pieces, up to as many bytes as a blob has, in pieces of CHUNK at most, none of them empty."""
        left = digest.size
        try:
            for piece in pieces:
                left -= len(piece)
                if left < 0:
                    what = f"sends more than {digest.size:,} bytes as the blob {digest}"
                    raise self._address.error(Trouble.GARBLED, what)
                for begin in range(0, len(piece), CHUNK):
                    yield piece[begin : begin + CHUNK]
        except BrokenPackageError as error:
            raise self._address.error(Trouble.GARBLED, "sends what is not zstd, as it says") from error

    def _done(self, method: str, request: Any, answer: Any) -> Any:
        """The answer to what nothing needs to be found for."""
        answered = self._link.ask(method, request, answer)
        if answered is None:
            what = f"does not know the instance {self._instance!r}"
            raise self._address.error(Trouble.REFUSED, what, "is the last part of the URL right?")
        return answered


def _is_nothing(digest: Digest) -> bool:
    return digest.size == 0 and digest.hash == _NOTHING


def _sent(digest: Digest) -> Any:
    return messages.Digest(hash=plain(digest), size_bytes=digest.size)


def _action(key: str) -> Any:
    return messages.Digest(hash=plain(key), size_bytes=_ACTION_SIZE)


def _data(answers: Iterator[Any]) -> Iterator[bytes]:
    for answer in answers:
        if answer.data:
            yield answer.data


def _writes(resource: str, pieces: Iterator[bytes], beat: Beat) -> Iterator[Any]:
    """The messages of an upload: the first names the resource, the last says that it is the last."""
    offset = 0
    for piece in pieces:
        beat()
        yield messages.WriteRequest(resource_name=resource, write_offset=offset, data=piece)
        resource, offset = "", offset + len(piece)
    beat()
    yield messages.WriteRequest(resource_name=resource, write_offset=offset, finish_write=True)

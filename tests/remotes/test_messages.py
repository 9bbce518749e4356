"""The messages on the wire: the bytes are what the Remote Execution API says, whatever made them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipeline.remotes import messages


def field(number: int, data: bytes) -> bytes:
    """A field of bytes, by the rules of protobuf's encoding: tag, length, bytes."""
    assert len(data) < 128
    return bytes((number << 3 | 2, len(data))) + data


def number(number: int, value: int) -> bytes:
    assert value < 128
    return bytes((number << 3, value))


DIGEST = field(1, b"ab") + number(2, 5)


def test_an_action_result_is_as_the_api_numbers_it() -> None:
    result = messages.ActionResult(
        output_files=[
            {"path": "x", "digest": {"hash": "ab", "size_bytes": 5}, "is_executable": True, "contents": b"c"}
        ],
        exit_code=3,
        stdout_raw=b"out",
        stdout_digest={"hash": "ab", "size_bytes": 5},
        stderr_raw=b"err",
        execution_metadata={"worker": "w"},
    )
    file = field(1, b"x") + field(2, DIGEST) + number(4, 1) + field(5, b"c")
    parts = (
        field(2, file),
        number(4, 3),
        field(5, b"out"),
        field(6, DIGEST),
        field(7, b"err"),
        field(9, field(1, b"w")),
    )
    assert result.SerializeToString(deterministic=True) == b"".join(parts)
    assert messages.ActionResult.FromString(b"".join(parts)) == result


def test_requests_are_as_the_api_numbers_them() -> None:
    digest = messages.Digest(hash="ab", size_bytes=5)
    named = {"instance_name": "i", "action_digest": digest}
    upload = {"digest": digest, "data": b"d", "compressor": messages.ZSTD}
    download = {"digest": digest, "data": b"d", "status": {"code": 5}, "compressor": messages.ZSTD}
    cache = {"digest_functions": [1], "max_batch_total_size_bytes": 9, "supported_compressors": [0, 1]}
    cases = (
        (
            messages.GetActionResultRequest(**named, inline_stdout=True),
            field(1, b"i") + field(2, DIGEST) + number(3, 1),
        ),
        (
            messages.UpdateActionResultRequest(**named, action_result={"exit_code": 1}),
            field(1, b"i") + field(2, DIGEST) + field(3, number(4, 1)),
        ),
        (
            messages.FindMissingBlobsRequest(instance_name="i", blob_digests=[digest]),
            field(1, b"i") + field(2, DIGEST),
        ),
        (messages.FindMissingBlobsResponse(missing_blob_digests=[digest]), field(2, DIGEST)),
        (
            messages.BatchUpdateBlobsRequest(requests=[upload]),
            field(2, field(1, DIGEST) + field(2, b"d") + number(3, 1)),
        ),
        (
            messages.BatchReadBlobsRequest(digests=[digest], acceptable_compressors=[messages.ZSTD]),
            field(2, DIGEST) + field(3, b"\x01"),
        ),
        (
            messages.BatchReadBlobsResponse(responses=[download]),
            field(1, field(1, DIGEST) + field(2, b"d") + field(3, number(1, 5)) + number(4, 1)),
        ),
        (messages.ReadRequest(resource_name="r", read_offset=1), field(1, b"r") + number(2, 1)),
        (messages.ReadResponse(data=b"d"), field(10, b"d")),
        (
            messages.WriteRequest(resource_name="r", write_offset=7, finish_write=True, data=b"d"),
            field(1, b"r") + number(2, 7) + number(3, 1) + field(10, b"d"),
        ),
        (messages.WriteResponse(committed_size=9), number(1, 9)),
        (
            messages.ServerCapabilities(cache_capabilities=cache),
            field(1, field(1, b"\x01") + number(4, 9) + field(6, b"\x00\x01")),
        ),
    )
    for message, wire in cases:
        assert message.SerializeToString(deterministic=True) == wire


def test_what_is_not_in_the_table_is_kept() -> None:
    unknown = field(15, b"later")
    result = messages.ActionResult.FromString(field(5, b"out") + unknown)
    result.exit_code = 1
    assert unknown in result.SerializeToString()


@pytest.mark.parametrize("data", [b"<html></html>", b"\x0a\xff", b"\xff" * 20])
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(messages.DecodeError):
        messages.ActionResult.FromString(data)


def test_another_copy_of_the_api_in_the_process_does_not_clash() -> None:
    # The default pool refuses a second file of one name with other contents.
    code = """
from google.protobuf import descriptor_pb2, descriptor_pool
package = "build.bazel.remote.execution.v2"
file = descriptor_pb2.FileDescriptorProto(name="remote_execution.proto", package=package)
file.message_type.add(name="ActionResult")
descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
from pipeline.remotes import messages
messages.ActionResult(stdout_raw=b"x")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_messages_need_neither_grpc_nor_tvm() -> None:
    code = """
import sys
from pipeline.remotes import messages
sys.exit(bool({"grpc", "tvm", "urllib3"} & set(sys.modules)))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

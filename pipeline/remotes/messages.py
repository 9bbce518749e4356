"""The messages of the Remote Execution API that remotes exchange and store, as protobuf classes.

They are made from the table below when this module is imported: no generated file, no compiler of .proto files. They
lie in a pool of their own, so that a generated copy of the same API in the process does not clash with them. Of each
message the table has the fields that are used here; what else arrives is kept as protobuf's unknown fields and goes out
again with the message. Enumerations are int32, which is the same on the wire.

Numbers and names are those of

    https://github.com/bazelbuild/remote-apis/blob/main/build/bazel/remote/execution/v2/remote_execution.proto
    https://github.com/googleapis/googleapis/blob/master/google/bytestream/bytestream.proto

This module needs protobuf only; gRPC's side is pipeline.remotes.reapi.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, message, message_factory
from google.protobuf.descriptor_pool import DescriptorPool

# A message and its fields: number, name, type. `type*` is repeated; a type with a capital is a message of this table.
# Messages that are nested in the API stand beside the others under names of their own, as names are not on the wire.
_TABLE = """
Digest                      1 hash string, 2 size_bytes int64
Status                      1 code int32, 2 message string

OutputFile                  1 path string, 2 digest Digest, 4 is_executable bool, 5 contents bytes
OutputDirectory             1 path string, 3 tree_digest Digest
OutputSymlink               1 path string, 2 target string
ExecutedActionMetadata      1 worker string
ActionResult                2 output_files OutputFile*, 3 output_directories OutputDirectory*
                            12 output_symlinks OutputSymlink*
                            4 exit_code int32, 5 stdout_raw bytes, 6 stdout_digest Digest
                            7 stderr_raw bytes, 8 stderr_digest Digest
                            9 execution_metadata ExecutedActionMetadata
GetActionResultRequest      1 instance_name string, 2 action_digest Digest, 3 inline_stdout bool, 4 inline_stderr bool
                            5 inline_output_files string*
UpdateActionResultRequest   1 instance_name string, 2 action_digest Digest, 3 action_result ActionResult

FindMissingBlobsRequest     1 instance_name string, 2 blob_digests Digest*
FindMissingBlobsResponse    2 missing_blob_digests Digest*
BlobUpload                  1 digest Digest, 2 data bytes, 3 compressor int32
BatchUpdateBlobsRequest     1 instance_name string, 2 requests BlobUpload*
BlobUploaded                1 digest Digest, 2 status Status
BatchUpdateBlobsResponse    1 responses BlobUploaded*
BatchReadBlobsRequest       1 instance_name string, 2 digests Digest*, 3 acceptable_compressors int32*
BlobDownloaded              1 digest Digest, 2 data bytes, 3 status Status, 4 compressor int32
BatchReadBlobsResponse      1 responses BlobDownloaded*

GetCapabilitiesRequest      1 instance_name string
ActionCacheUpdate           1 update_enabled bool
CacheCapabilities           1 digest_functions int32*, 2 action_cache_update_capabilities ActionCacheUpdate
                            4 max_batch_total_size_bytes int64, 6 supported_compressors int32*
                            7 supported_batch_update_compressors int32*, 8 max_cas_blob_size_bytes int64
ServerCapabilities          1 cache_capabilities CacheCapabilities

ReadRequest                 1 resource_name string, 2 read_offset int64, 3 read_limit int64
ReadResponse                10 data bytes
WriteRequest                1 resource_name string, 2 write_offset int64, 3 finish_write bool, 10 data bytes
WriteResponse               1 committed_size int64
"""

SHA256 = 1  # DigestFunction.Value
IDENTITY, ZSTD = 0, 1  # Compressor.Value

DecodeError = message.DecodeError  # what `FromString` raises on bytes that are no such message

_PACKAGE = "tvmake.remotes"
_Field = descriptor_pb2.FieldDescriptorProto


def _file_of(table: str) -> Any:
    """The table as a protobuf file: `Digest  1 hash string` → message Digest { string hash = 1; }"""
    file = descriptor_pb2.FileDescriptorProto(name="tvmake/remotes.proto", package=_PACKAGE, syntax="proto3")
    for line in filter(None, table.splitlines()):
        fields = line.strip()
        if not line[0].isspace():
            name, fields = line.split(maxsplit=1)
            current = file.message_type.add(name=name)
        for field in fields.split(","):
            number, name, kind = field.split()
            label = _Field.LABEL_REPEATED if kind.endswith("*") else _Field.LABEL_OPTIONAL
            made = current.field.add(name=name, number=int(number), label=label)
            kind = kind.removesuffix("*")
            if kind[0].isupper():
                made.type, made.type_name = _Field.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
            else:
                made.type = _Field.Type.Value(f"TYPE_{kind.upper()}")
    return file


_POOL = DescriptorPool()
_POOL.AddSerializedFile(_file_of(_TABLE).SerializeToString())


def _class(name: str) -> Any:
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(f"{_PACKAGE}.{name}"))


Digest = _class("Digest")
OutputFile = _class("OutputFile")
ActionResult = _class("ActionResult")
GetActionResultRequest = _class("GetActionResultRequest")
UpdateActionResultRequest = _class("UpdateActionResultRequest")
FindMissingBlobsRequest = _class("FindMissingBlobsRequest")
FindMissingBlobsResponse = _class("FindMissingBlobsResponse")
BatchUpdateBlobsRequest = _class("BatchUpdateBlobsRequest")
BatchUpdateBlobsResponse = _class("BatchUpdateBlobsResponse")
BatchReadBlobsRequest = _class("BatchReadBlobsRequest")
BatchReadBlobsResponse = _class("BatchReadBlobsResponse")
GetCapabilitiesRequest = _class("GetCapabilitiesRequest")
ServerCapabilities = _class("ServerCapabilities")
ReadRequest = _class("ReadRequest")
ReadResponse = _class("ReadResponse")
WriteRequest = _class("WriteRequest")
WriteResponse = _class("WriteResponse")

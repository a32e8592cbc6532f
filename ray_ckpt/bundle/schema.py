"""The TensorFlow messages that a checkpoint is made of, as protobuf classes.

They live in a descriptor pool of their own, so they neither need TensorFlow nor clash with it. Source:
``tensor_bundle.proto``, ``tensor_shape.proto``, ``tensor_slice.proto``, ``versions.proto`` and
``checkpoint_state.proto`` in TensorFlow's tree. Enumerations are declared as int32, which has the
same bytes and keeps unknown values; fields that no reader needs are left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_Proto = descriptor_pb2.FieldDescriptorProto
_PACKAGE = "ray_ckpt.bundle"


class _Field(NamedTuple):
    name: str
    number: int
    type: str
    repeated: bool = False
    oneof: bool = False


_SCALARS = {
    "int32": _Proto.TYPE_INT32,
    "int64": _Proto.TYPE_INT64,
    "fixed32": _Proto.TYPE_FIXED32,
    "bool": _Proto.TYPE_BOOL,
    "double": _Proto.TYPE_DOUBLE,
    "string": _Proto.TYPE_STRING,
}

_MESSAGES: dict[str, tuple[_Field, ...]] = {
    "Dim": (_Field("size", 1, "int64"),),
    "TensorShapeProto": (
        _Field("dim", 2, "Dim", repeated=True),
        _Field("unknown_rank", 3, "bool"),
    ),
    "Extent": (_Field("start", 1, "int64"), _Field("length", 2, "int64", oneof=True)),
    "TensorSliceProto": (_Field("extent", 1, "Extent", repeated=True),),
    "VersionDef": (
        _Field("producer", 1, "int32"),
        _Field("min_consumer", 2, "int32"),
        _Field("bad_consumers", 3, "int32", repeated=True),
    ),
    "BundleHeaderProto": (
        _Field("num_shards", 1, "int32"),
        _Field("endianness", 2, "int32"),
        _Field("version", 3, "VersionDef"),
    ),
    "BundleEntryProto": (
        _Field("dtype", 1, "int32"),
        _Field("shape", 2, "TensorShapeProto"),
        _Field("shard_id", 3, "int32"),
        _Field("offset", 4, "int64"),
        _Field("size", 5, "int64"),
        _Field("crc32c", 6, "fixed32"),
        _Field("slices", 7, "TensorSliceProto", repeated=True),
    ),
    "CheckpointState": (
        _Field("model_checkpoint_path", 1, "string"),
        _Field("all_model_checkpoint_paths", 2, "string", repeated=True),
        _Field("all_model_checkpoint_timestamps", 3, "double", repeated=True),
        _Field("last_preserved_timestamp", 4, "double"),
    ),
}


def _describe(message: descriptor_pb2.DescriptorProto, fields: tuple[_Field, ...]) -> None:
    for field in fields:
        described = message.field.add(name=field.name, number=field.number)
        described.label = _Proto.LABEL_REPEATED if field.repeated else _Proto.LABEL_OPTIONAL
        if field.type in _SCALARS:
            described.type = _SCALARS[field.type]
        else:
            described.type = _Proto.TYPE_MESSAGE
            described.type_name = f".{_PACKAGE}.{field.type}"
        if field.oneof:
            described.oneof_index = len(message.oneof_decl)
            message.oneof_decl.add(name=f"has_{field.name}")


def _build() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="ray_ckpt/bundle.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        _describe(file.message_type.add(name=name), fields)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _MESSAGES
    }


_CLASSES = _build()
BundleHeaderProto: Any = _CLASSES["BundleHeaderProto"]
BundleEntryProto: Any = _CLASSES["BundleEntryProto"]
CheckpointState: Any = _CLASSES["CheckpointState"]

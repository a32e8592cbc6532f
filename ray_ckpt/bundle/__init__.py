"""The TensorFlow V2 checkpoint ("tensor bundle") format in pure Python: bytes <-> entries, no I/O.

Format: ``tensorflow/core/util/tensor_bundle/tensor_bundle.h``. A checkpoint is data shards of raw elements
and one index, a leveldb table of where each tensor, and each slice of a partitioned tensor, lies.
"""

from ray_ckpt.bundle.content import content_crc, decode_objects, encode_objects
from ray_ckpt.bundle.cover import first_fault
from ray_ckpt.bundle.crc import combine, crc32c, mask, unmask
from ray_ckpt.bundle.decode import Piece
from ray_ckpt.bundle.dtypes import DTYPE_NAMES, STRING, UNPARTITIONABLE, VARIANT, dtype_name, dtype_of, nbytes_of
from ray_ckpt.bundle.entry import encode_partitioned, encode_piece, piece_key
from ray_ckpt.bundle.index import Index, StoredTensor
from ray_ckpt.bundle.limits import MAX_PARTITIONED_RANK, MAX_SLICES, check_name, check_tensor
from ray_ckpt.bundle.naming import graph_name, index_name, parse_index_name, parse_shard_name, shard_name
from ray_ckpt.bundle.runs import decode_run, encode_run, merge_index
from ray_ckpt.bundle.state_file import StateFile, encode_state_file, parse_state_file
from ray_ckpt.bundle.strings import decode_strings, encode_strings

__all__ = [
    "DTYPE_NAMES",
    "MAX_PARTITIONED_RANK",
    "MAX_SLICES",
    "STRING",
    "UNPARTITIONABLE",
    "VARIANT",
    "Index",
    "Piece",
    "StateFile",
    "StoredTensor",
    "check_name",
    "check_tensor",
    "combine",
    "content_crc",
    "crc32c",
    "decode_objects",
    "decode_run",
    "decode_strings",
    "dtype_name",
    "dtype_of",
    "encode_objects",
    "encode_partitioned",
    "encode_piece",
    "encode_run",
    "encode_state_file",
    "encode_strings",
    "first_fault",
    "graph_name",
    "index_name",
    "mask",
    "merge_index",
    "nbytes_of",
    "parse_index_name",
    "parse_shard_name",
    "parse_state_file",
    "piece_key",
    "shard_name",
    "unmask",
]

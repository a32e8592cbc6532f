"""The directory's commit log: its records, claims and pins, and the `checkpoint` file derived from it."""

from ray_ckpt.log.claims import delete_claim, list_claims, list_pins, pin, put_claim
from ray_ckpt.log.codec import decode_record, encode_record
from ray_ckpt.log.records import append, prune, read_head, read_last_good
from ray_ckpt.log.state import live_checkpoints, repair_state_file

__all__ = [
    "append",
    "decode_record",
    "delete_claim",
    "encode_record",
    "list_claims",
    "list_pins",
    "live_checkpoints",
    "pin",
    "prune",
    "put_claim",
    "read_head",
    "read_last_good",
    "repair_state_file",
]

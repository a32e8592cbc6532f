"""Where checkpoints live: the narrow `Store` over local disks, Google Cloud Storage, S3 and fsspec."""

from ray_ckpt.storage.base import ObjectInfo, ObjectWriter, Reader, Store
from ray_ckpt.storage.location import locate
from ray_ckpt.storage.opening import open_store

__all__ = ["ObjectInfo", "ObjectWriter", "Reader", "Store", "locate", "open_store"]

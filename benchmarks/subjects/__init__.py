"""What is measured, in the order of the table; each is imported only where it is run."""

from __future__ import annotations

from importlib import import_module

from benchmarks.subjects.base import Subject

SUBJECTS = {
    "ours": "ours:Ours",
    "ours-memory": "ours:OursMemory",
    "ours-load": "ours:OursLoad",
    "ours-jax": "ours:OursJax",
    "tf": "tf:TfSync",
    "tf-async": "tf:TfAsync",
    "tf-hook": "tf:TfHook",
    "orbax": "orbax_ckpt:OrbaxOcdbt",
    "orbax-uncompressed": "orbax_ckpt:OrbaxUncompressed",
    "orbax-no-ocdbt": "orbax_ckpt:OrbaxNoOcdbt",
    "orbax-manager": "orbax_ckpt:OrbaxManager",
    "torch": "torch_dcp:TorchSave",
    "torch-no-crc": "torch_dcp:TorchSaveNoCrc",
    "dcp": "torch_dcp:TorchDcp",
    "dcp-cached": "torch_dcp:TorchDcpCached",
    "dcp-unsynced": "torch_dcp:TorchDcpUnsynced",
    "dcp-staged": "torch_dcp:TorchDcpStaged",
    "dcp-process": "torch_dcp:TorchDcpProcess",
    "ray-train": "ray_train:RayTrainReport",
    "ray-train-async": "ray_train:RayTrainReportAsync",
}
"""Key of the command line -> module of this package and class."""


def subject_class(key: str) -> type[Subject]:
    """The class behind a key; ``module:Class`` with a full module name stands for itself (tests use that).

    Raises:
        ImportError: its package, or the subject's own module, is not there.
    """
    module, _, name = SUBJECTS.get(key, key).partition(":")
    found: type[Subject] = getattr(import_module(module if "." in module else f"{__name__}.{module}"), name)
    return found

"""Ray Train V2's ``ray.train.report`` of a directory written by ``torch.save``, as its checkpoint guide shows.

Neither ``torch.save`` nor pyarrow's ``copy_files`` calls ``fsync``; ``torch.load`` does not look at the CRC-32 that
``torch.save`` puts into its zip archive. ``RAY_TRAIN_HEALTH_CHECK_INTERVAL_S`` (2 s) is left as it is: the controller
collects reports as often, and the guides name no other value.
"""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import numpy as np

from benchmarks.cases import Case
from benchmarks.subjects.base import Subject

_COMMIT_TIMEOUT_S = 300
"""Ray would wait for ever."""


class RayTrainReport(Subject):
    """Upload mode SYNC. Each rank saves its part as a file of its own, Ray Train merges them into one directory."""

    name: ClassVar[str] = "ray.train.report"
    gives_up: ClassVar[str] = "no fsync, no checksums verified"
    upload_mode: ClassVar[str] = "SYNC"

    def __init__(self, case: Case, rank: int, directory: str) -> None:
        super().__init__(case, rank, directory)
        self._last: int | None = None

    @classmethod
    def launch(cls, case: Case, directory: str, worker: Callable[[int], None]) -> bool:
        import ray
        import ray.train
        from ray.train.torch import TorchTrainer

        def train_loop() -> None:
            worker(ray.train.get_context().get_world_rank())

        os.makedirs(directory, exist_ok=True)
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        # CPUs are Ray's bookkeeping here: every worker must be placed, however few cores there are.
        ray.init(
            address="local",
            num_cpus=max(case.world_size, os.cpu_count() or 1),
            runtime_env={"env_vars": {"PYTHONPATH": path}},
        )
        try:
            # A name of its own: under an old name Ray Train would take up that run's checkpoints.
            TorchTrainer(
                train_loop,
                scaling_config=ray.train.ScalingConfig(num_workers=case.world_size),
                run_config=ray.train.RunConfig(name=f"run-{uuid4().hex[:8]}", storage_path=os.path.abspath(directory)),
            ).fit()
        finally:
            ray.shutdown()
        return True

    def start(self, arrays: Mapping[str, np.ndarray]) -> None:
        import torch

        self._state = {name: torch.tensor(array) for name, array in arrays.items()}

    def update(self, names: Sequence[str]) -> None:
        for name in names:
            self._state[name].add_(1)

    def save(self, step: int) -> None:
        import ray.train
        import torch

        self._last = step
        local = tempfile.mkdtemp(prefix="local-", dir=self.directory)
        torch.save(self._state, os.path.join(local, self._file()))
        ray.train.report(
            {"step": step},
            checkpoint=ray.train.Checkpoint.from_directory(local),
            checkpoint_dir_name=self._checkpoint_name(step),
            checkpoint_upload_mode=ray.train.CheckpointUploadMode[self.upload_mode],
            delete_local_checkpoint_after_upload=True,
        )

    def wait(self) -> None:
        """Until the controller, which hears of a step when all ranks have uploaded, has registered the checkpoint.

        The return of ``report`` does not mean that, in no mode: after it a crash may still go back to an older one.
        """
        import ray.train

        if self._last is None:
            raise RuntimeError(f"{self.name}: wait() without a save().")
        reported = ray.train.get_all_reported_checkpoints(
            consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED, timeout_s=_COMMIT_TIMEOUT_S
        )
        newest = os.path.basename(reported[-1].checkpoint.path) if reported else "none"
        if newest != self._checkpoint_name(self._last):
            raise RuntimeError(f"{self.name}: step {self._last} was reported, but the newest checkpoint is {newest}.")
        self._found(self._last)

    def _checkpoint_name(self, step: int) -> str:
        return f"step-{step:08d}"

    def _file(self) -> str:
        return f"model-rank={self.rank}.pt"

    def files(self, step: int) -> str:
        return os.path.join(self.directory, "run-*", self._checkpoint_name(step))

    def _found(self, step: int) -> str:
        """The checkpoint's one directory, with this rank's file in it."""
        found = glob.glob(self.files(step))
        if len(found) != 1 or not os.path.isfile(os.path.join(found[0], self._file())):
            raise RuntimeError(
                f"{self.name}: one directory {self.files(step)} with {self._file()} expected, not {found}."
            )
        return found[0]

    def open_restore(self, step: int) -> None:
        import ray.train
        import torch  # noqa: F401 -- its import belongs to what comes before reading

        self._checkpoint = ray.train.Checkpoint.from_directory(self._found(step))

    def restore(self) -> Mapping[str, Any]:
        import torch

        with self._checkpoint.as_directory() as directory:
            return torch.load(os.path.join(directory, self._file()), map_location="cpu", weights_only=True)

    def close(self) -> None:
        self._state = {}


class RayTrainReportAsync(RayTrainReport):
    """Upload mode ASYNC: the local file is still written in the call, a thread of the trainer copies it."""

    name: ClassVar[str] = "ray.train.report async"
    upload_mode: ClassVar[str] = "ASYNC"

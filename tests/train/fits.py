"""Fits of Ray Train on the test cluster."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from ray_ckpt.coordinator import run_id
from tests.cluster import RUNS


@dataclass
class Run:
    """An experiment of one name: `fit` may be called again."""

    folder: Path
    name: str = "exp"

    @property
    def notes(self) -> Path:
        """Where the workers leave what they saw."""
        (self.folder / "notes").mkdir(exist_ok=True)
        return self.folder / "notes"

    @property
    def data(self) -> Path:
        """Where a Checkpointer without a URL saves."""
        return self.folder / self.name / "ray_ckpt"

    def fit(
        self,
        loop: Callable[[dict[str, Any]], None],
        workers: int | tuple[int, int] = 2,
        *,
        trainer: type[DataParallelTrainer] = DataParallelTrainer,
        failures: FailureConfig | None = None,
        num_to_keep: int | None = None,
        scaling: dict[str, Any] | None = None,
        run_config: dict[str, Any] | None = None,
        more: dict[str, Any] | None = None,
        **config: Any,
    ) -> Result:
        """Train; ``config`` goes to the loop, ``scaling``, ``run_config`` and ``more`` to Ray Train's own."""
        RUNS.add(run_id(str(self.data)))
        return trainer(
            loop,
            train_loop_config={"notes": str(self.notes), **config},
            scaling_config=ScalingConfig(
                num_workers=workers, **{"resources_per_worker": {"CPU": 1}, **(scaling or {})}
            ),
            run_config=RunConfig(
                name=self.name,
                failure_config=failures or FailureConfig(),
                checkpoint_config=CheckpointConfig(num_to_keep=num_to_keep),
                **{"storage_path": str(self.folder), **(run_config or {})},
            ),
            **(more or {}),
        ).fit()

    def noted(self, start: int) -> list[dict[str, Any]]:
        """What the ranks of a start saw, by rank."""
        found = sorted(self.notes.glob(f"{start}-*.json"))
        return [json.loads(path.read_text()) for path in found]

    def pointers(self) -> list[str]:
        """The directories that Ray Train keeps."""
        return sorted(path.name for path in (self.folder / self.name).glob("checkpoint_*") if path.is_dir())

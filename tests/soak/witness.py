"""The oracle's process, and the handle on it: lines of JSON, asked and answered."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.soak.model import Model
from tests.soak.oracle import Finding, Oracle
from tests.soak.sources import BucketSource, FolderSource, Source

ROOT = Path(__file__).parents[2]
_END_S = 20.0

_ENVIRONMENT = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1", "TF_NUM_INTRAOP_THREADS": "1"}


class Witness:
    """Asks the oracle's process. ``source``: what `_source_of` takes."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def watch(self, run: str, source: dict[str, str], model: Model) -> None:
        """Have it judge this run from now on; a run that it knows is forgotten first."""
        self._ask({"call": "watch", "run": run, "source": source, "model": asdict(model)})

    def look(self, run: str) -> Finding:
        """As `Oracle.look`."""
        return Finding(**self._ask({"call": "look", "run": run}))

    def end(self, run: str, last: int) -> Finding:
        """As `Oracle.end`."""
        return Finding(**self._ask({"call": "end", "run": run, "last": last}))

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the oracle has ended with code {self._process.wait(_END_S)}: see its log")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def witness(log: Path) -> Iterator[Witness]:
    """The oracle in a process of its own, ended with the block. ``log``: what it says of itself."""
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.soak.witness"]
    pipe = subprocess.PIPE
    with log.open("w") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=said, text=True, start_new_session=True
        )
        try:
            yield Witness(process)
        finally:
            with contextlib.suppress(OSError):
                process.stdin.close()  # type: ignore[union-attr]
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _source_of(place: dict[str, str]) -> Source:
    if "folder" in place:
        return FolderSource(Path(place["folder"]))
    return BucketSource(place["endpoint"], place["bucket"], place["path"])


def _serve() -> None:
    # TensorFlow's own output must not come between the answers; its import takes long, so that it comes first.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    importlib.import_module("tensorflow")
    oracles: dict[str, Oracle] = {}
    for line in sys.stdin:
        question = json.loads(line)
        run, answer = question["run"], Finding()
        if question["call"] == "watch":
            oracles[run] = Oracle(_source_of(question["source"]), Model(**question["model"]))
        elif question["call"] == "look":
            answer = oracles[run].look()
        else:
            answer = oracles[run].end(question["last"])
        answers.write(json.dumps(asdict(answer)) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()

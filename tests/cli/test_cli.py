"""The command on real directories: tables, JSON, exit codes, and errors in one line."""

from __future__ import annotations

import json
import subprocess
import sys
import types
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from ray_ckpt.cli import app
from ray_ckpt.errors import UnavailableError
from ray_ckpt.storage import Store, open_store
from tests.restore.make import commit, flip, grid, record

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A directory with committed checkpoints of steps 400 and 500."""
    made = open_store(tmp_path if request.param == "file" else f"memory://{uuid.uuid4().hex}")
    for step in (400, 500):
        arrays = {"w": np.full((4, 6), step, np.float32), "b[0]": np.arange(3), "name": np.array(b"x", object)}
        commit(made, step, arrays, cuts={"w": grid((4, 6), (2, 1))})
    return made


def run(*arguments: str, code: int = 0) -> str:
    """Stdout of the command, whose exit code must be this."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    return result.stdout


def run_json(*arguments: str, code: int = 0) -> Any:
    return json.loads(run(*arguments, "--json", code=code))


def error_of(*arguments: str, code: int = 2) -> str:
    """The one line on stderr of a command that fails."""
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_ls(store: Store) -> None:
    found = run_json("ls", store.url)
    assert found["url"] == store.url
    assert [item["step"] for item in found["checkpoints"]] == [400, 500]
    assert set(found["checkpoints"][0]) == {
        *("step", "prefix", "time", "bytes", "num_shards", "world_size"),
        *("generation", "attempt", "superseded", "foreign"),
    }
    table = run("ls", store.url)
    assert "model.ckpt-400" in table
    assert "2023-11-14 22:21:40Z" in table


def test_ls_of_nothing(tmp_path: Path) -> None:
    assert run_json("ls", str(tmp_path))["checkpoints"] == []
    result = CliRunner().invoke(app, ["ls", str(tmp_path)])
    assert (result.exit_code, result.stdout) == (0, "")
    assert f"no checkpoint in {tmp_path}" in result.stderr
    assert "None at all is no error here" in run("ls", "--help")


def test_show(store: Store) -> None:
    found = run_json("show", store.url, "--step", "400")
    assert (found["step"], found["attempt"], found["format_version"]) == (400, "e1-400", 1)
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert sorted(tensors) == ["b[0]", "name", "w"]
    assert (tensors["w"]["dtype"], tensors["w"]["shape"], tensors["w"]["bytes"]) == ("float32", [4, 6], 96)
    assert [(s["offset"], s["shape"]) for s in tensors["w"]["slices"]] == [([0, 0], [2, 6]), ([2, 0], [2, 6])]
    assert [(s["shard_id"], s["host"], s["seconds"]) for s in found["shards"]] == [
        (0, "host-a", 0.5),
        (1, "host-b", 0.25),
        (2, None, None),
        (3, None, None),
    ]
    text = run("show", store.url)
    for expected in ("step 500", "b[0]", "4x6", "2: [0:2, 0:6] [2:4, 0:6]", "host-a", "scalar"):
        assert expected in text


def test_show_takes_no_superseded_one_by_default(store: Store) -> None:
    from dataclasses import replace

    from ray_ckpt.catalog import select

    older, newer = select(store, None)
    record(store, [older, replace(newer, superseded=True)])
    assert run_json("show", store.url)["step"] == 400
    assert "superseded" in run("show", store.url, "--step", "500")


def test_verify(store: Store) -> None:
    found = run_json("verify", store.url)
    assert found["ok"]
    assert [(item["step"], item["ok"], item["tensors"]) for item in found["checkpoints"]] == [
        (400, True, 3),
        (500, True, 3),
    ]
    path = "model.ckpt-400.data-00000-of-00004"
    flip(store, path, 1)
    found = run_json("verify", store.url, code=1)
    assert not found["ok"]
    assert [item["ok"] for item in found["checkpoints"]] == [False, True]
    assert found["checkpoints"][0]["damage"][0]["path"] == path
    assert run_json("verify", store.url, "--step", "500")["ok"]
    text = run("verify", store.url, code=1)
    assert "DAMAGED (1)" in text
    assert path in text


def test_a_damaged_index_is_an_exit_code_of_its_own(store: Store) -> None:
    flip(store, "model.ckpt-500.index", 3)
    assert "model.ckpt-500.index" in error_of("show", store.url, code=1)


@pytest.mark.parametrize("command", ["ls", "show", "verify"])
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nonsense://x"], "unknown scheme"),
        (["file:///x", "--storage-option", "secret"], "KEY=VALUE"),
    ],
)
def test_errors_are_one_line(command: str, arguments: list[str], text: str) -> None:
    assert text in error_of(command, *arguments)


def test_a_missing_step_is_answered_with_those_that_are_there(store: Store) -> None:
    for command in ("show", "verify"):
        assert "step 7 is not in" in error_of(command, store.url, "--step", "7")
        assert "400, 500" in error_of(command, store.url, "--step", "7")


def test_a_directory_without_checkpoints_is_named(tmp_path: Path) -> None:
    for command in ("show", "verify"):
        assert f"no checkpoint in file://{tmp_path}" in error_of(command, str(tmp_path))


def test_storage_options_reach_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray_ckpt.cli import listing

    seen: list[Any] = []
    monkeypatch.setattr(listing, "checkpoints", lambda url, storage_options: seen.append(storage_options) or [])
    options = ("anon=true", "token=a=b", 'client_kwargs={"x": 1}')
    run("ls", str(tmp_path), *(part for option in options for part in ("--storage-option", option)))
    assert seen == [{"anon": True, "token": "a=b", "client_kwargs": {"x": 1}}]


def coordinator(monkeypatch: pytest.MonkeyPatch, request_save: Any) -> None:
    module = types.ModuleType("ray_ckpt.coordinator")
    module.__dict__["request_save"] = request_save
    monkeypatch.setitem(sys.modules, "ray_ckpt.coordinator", module)


def test_save_asks_the_running_job(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    coordinator(monkeypatch, lambda *arguments: asked.append(arguments) or 1234)
    assert run_json("save", "gs://b/run", "--reason", "before maintenance", "--timeout", "5") == {
        "url": "gs://b/run",
        "step": 1234,
    }
    assert "step 1234 is saved" in run("save", "gs://b/run", "--address", "10.0.0.1:6379")
    assert asked == [
        ("gs://b/run", "before maintenance", 5.0, None),
        ("gs://b/run", "ray-ckpt save", 600.0, "10.0.0.1:6379"),
    ]


def test_the_address_reaches_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise ConnectionError(f"asked {options['address']}")

    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", refuse)
    assert "no Ray cluster to ask (asked 10.0.0.1:6379)" in error_of("save", "gs://b/run", "--address", "10.0.0.1:6379")
    assert "no Ray cluster to ask (asked auto)" in error_of("save", "gs://b/run")


def test_json_has_the_canonical_url(store: Store) -> None:
    written = store.url.replace("://", ":///", 1) if store.url.startswith("memory") else store.url + "/x/.."
    for command in ("ls", "show", "verify"):
        assert run_json(command, written)["url"] == store.url


def test_save_without_a_job_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(*_: object) -> int:
        raise UnavailableError("no job is running on gs://b/run")

    coordinator(monkeypatch, nobody)
    assert "no job is running" in error_of("save", "gs://b/run")


def test_the_installed_command_runs(tmp_path: Path) -> None:
    code = "import sys; from ray_ckpt.cli import main; sys.argv[0] = 'ray-ckpt'; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "verify", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "no checkpoint in" in done.stderr
    assert "Traceback" not in done.stderr


def test_reading_commands_do_not_import_ray() -> None:
    code = "import sys, ray_ckpt.cli; sys.exit(' '.join({'ray', 'tensorflow', 'jax'} & set(sys.modules)) or 0)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")

"""``ray-ckpt plan``: numbers of a save that is not made, against one that is, and errors in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ray_ckpt.models import HostMesh, layouts_of
from ray_ckpt.models.tensor import Tensor
from tests.models.test_models import state_of
from tests.target.saving import PREFIX, save

from .test_cli import error_of, run, run_json

SHAPES = {
    "layer/w": {"shape": [2048, 1024], "axes": ["fsdp", ["data", "tensor"]]},
    "layer/b": [1024],
    "table": {"shape": [1000, 16], "dtype": "bfloat16", "axes": ["tensor"]},
    "step": {"shape": [], "dtype": "int32"},
}


@pytest.fixture
def shapes(tmp_path: Path) -> str:
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps(SHAPES))
    return str(path)


def test_it_is_the_save_that_will_be_made(shapes: str, tmp_path: Path) -> None:
    arguments = ("--hosts", "4", "--devices-per-host", "2", "--fsdp", "4", "--tensor", "2")
    found = run_json("plan", shapes, *arguments)
    assert found["mesh"] == {"data": 1, "fsdp": 4, "tensor": 2}
    assert (found["tensors"], found["nbytes"]) == (4, (2048 * 1024 + 1024 + 1) * 4 + 32000)
    state = [
        Tensor("layer/w", (2048, 1024), (("fsdp",), ("data", "tensor"))),
        Tensor("layer/b", (1024,)),
        Tensor("table", (1000, 16), (("tensor",),), "bfloat16"),
        Tensor("step", (), dtype="int32"),
    ]
    layouts = layouts_of(state, HostMesh(found["mesh"], 4))
    stored = save([state_of(layout) for layout in layouts], tmp_path / "run")
    files = sorted((tmp_path / "run").glob(f"{PREFIX}.data-*"))
    assert len(files) == found["shards"] == stored.index.num_shards
    sizes = sorted(path.stat().st_size for path in files[:-1])
    assert [sizes[0], sizes[-1]] == found["nbytes_a_host"]
    assert (tmp_path / "run" / f"{PREFIX}.index").stat().st_size == pytest.approx(found["index_nbytes"], abs=4)


def test_the_table_says_it_to_people(shapes: str) -> None:
    text = run("plan", shapes, "--hosts", "2", "--fsdp", "2")
    for expected in ("shapes.json", "data 4 x fsdp 2 x tensor 1, 8 devices on 2 hosts", "4.2 MB", "snapshot memory"):
        assert expected in text
    assert "3.3 TB" not in text
    large = run("plan", "llama3-70b", "--hosts", "16", "--fsdp", "64")
    assert "846.6 GB in 2171 tensors" in large
    assert "70,553,706,496 parameters" in large


def test_yaml_is_read_too(shapes: str, tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    path = tmp_path / "shapes.yaml"
    path.write_text(yaml.safe_dump(SHAPES))
    found = [run_json("plan", name) for name in (shapes, str(path))]
    assert found[0] | {"model": ""} == found[1] | {"model": ""}


def test_rates_are_given_or_measured(shapes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray_ckpt.cli import measure

    slow = run_json("plan", shapes, "--write-rate", "1e6")
    assert slow["commit_s"] == pytest.approx(slow["nbytes"] / 1e6, rel=0.01)
    assert slow["rates"]["origin"].startswith("write as given; else this project's benchmark machine")
    monkeypatch.setattr(measure.measure, "__defaults__", (8 << 20,))
    store = tmp_path / "store"
    store.mkdir()
    found = run_json("plan", shapes, "--measure", str(store), "--read-rate", "5e8")
    assert found["rates"]["read"] == 5e8
    assert min(found["rates"]["snapshot"], found["rates"]["write"]) > 1e6
    assert "read as given; else measured here with file://" in found["rates"]["origin"]
    assert list(store.rglob("*.data-*")) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("nonsense",), "no model 'nonsense'; there are gpt2-124m, t5-small"),
        (("missing.json",), "missing.json: No such file"),
        (("gpt2-124m", "--hosts", "3", "--fsdp", "8"), "3 hosts of 4 devices are 12, which fsdp 8 x tensor 1 does not"),
        (("gpt2-124m", "--hosts", "2", "--data", "4"), "is 4 devices, but 2 hosts of 4 have 8"),
    ],
)
def test_calls_that_are_wrong(arguments: tuple[str, ...], text: str) -> None:
    assert text in error_of("plan", *arguments)


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ([1], "expected an object with one item a tensor"),
        ({"w": {"shape": [2, "x"]}}, "w: found shape [2, 'x']"),
        ({"w": {"shape": [2], "sharding": 1}}, "w: found unknown sharding"),
        ({"w": {"shape": [2], "dtype": "float33"}}, "float33"),
        ({"w": {"shape": [2], "dtype": "string"}}, "w: string has no fixed size"),
        ({"w": {"shape": [2], "dtype": "variant"}}, "w: variant has no fixed size"),
        ({"w": {"shape": [2], "axes": [3]}}, "w: found shape [2], axes [3]"),
        ({"w": {"shape": [2], "axes": [0]}}, "w: found shape [2], axes [0]"),
        ({"w": {"shape": [2], "axes": [["fsdp", 1]]}}, "w: found shape [2], axes [['fsdp', 1]]"),
        ({"w": {"shape": [4, 4], "axes": ["fsdp", "fsdp"]}}, "w: axes (('fsdp',), ('fsdp',)) use fsdp twice"),
        ({"w": {"shape": [4], "axes": [["data", "data"]]}}, "w: axes (('data', 'data'),) use data twice"),
        ({"w": {"shape": [2], "axes": ["rows"]}}, "w: shape (2,) with axes (('rows',),): at most one entry"),
    ],
)
def test_files_that_are_wrong(document: Any, text: str, tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps(document))
    assert text in error_of("plan", str(path))
    path.write_text("{")
    assert "cannot be read" in error_of("plan", str(path))


def test_what_stays_whole_is_said(tmp_path: Path) -> None:
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps({f"w{i}": {"shape": [7], "axes": ["fsdp"]} for i in range(7)}))
    assert run_json("plan", str(path), "--fsdp", "4")["unsharded"] == [f"w{i}" for i in range(7)]

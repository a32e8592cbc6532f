"""``ray-ckpt clean``: it removes what is provably dead, and nothing else."""

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from ray_ckpt.bundle import index_name, parse_index_name, parse_shard_name
from ray_ckpt.catalog import select
from ray_ckpt.cli import app
from ray_ckpt.cli.options import parse_age
from ray_ckpt.errors import UsageError
from ray_ckpt.log import list_claims, pin, put_claim
from ray_ckpt.snapshot import Segment
from ray_ckpt.storage import Store, open_store
from ray_ckpt.types import Claim, Dying
from tests.restore.make import commit, make_checkpoint, record
from tests.snapshot.helpers import of_version

WEIGHTS = {"w": np.arange(10)}


@pytest.fixture(params=["file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A directory with a live checkpoint of step 400 by epoch 1; the log's newest epoch is 2."""
    made = open_store(tmp_path if request.param == "file" else f"memory://{uuid.uuid4().hex}")
    commit(made, 400, WEIGHTS)
    record(made, select(made, None), epoch=2)
    return made


def claimed(store: Store, prefix: str, epoch: int, step: int, *, data: bool = True) -> None:
    put_claim(store, Claim(f"e{epoch}-9", epoch, epoch, step, prefix, 4))
    if data:
        make_checkpoint(store, prefix, WEIGHTS)


def prefixes(store: Store) -> set[str]:
    """Prefixes of all checkpoint files."""
    found = set()
    for info in store.list(""):
        shard = parse_shard_name(info.path)
        found.add(shard[0] if shard else parse_index_name(info.path))
    return {prefix for prefix in found if prefix is not None}


def clean(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["clean", *arguments, "--json"])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def snapshot(store: Store) -> list[str]:
    return [info.path for info in store.list("")]


def test_an_attempt_of_an_older_epoch_goes_claim_and_all(store: Store) -> None:
    claimed(store, "model.ckpt-300", epoch=1, step=300)
    claimed(store, "e1-7/model.ckpt-900", epoch=1, step=900)
    before = snapshot(store)
    found = clean(store.url, "--min-age", "0s")
    assert {item["path"].partition(".data")[0].removesuffix(".index") for item in found["orphans"]} == {
        "model.ckpt-300",
        "e1-7/model.ckpt-900",
    }
    assert [claim["prefix"] for claim in found["claims"]] == ["e1-7/model.ckpt-900", "model.ckpt-300"]
    assert not found["removed"]
    assert snapshot(store) == before
    assert clean(store.url, "--min-age", "0s", "--yes")["removed"]
    assert prefixes(store) == {"model.ckpt-400"}
    assert [claim.prefix for claim in list_claims(store)] == ["model.ckpt-400"]


def test_an_index_goes_before_its_data(store: Store) -> None:
    claimed(store, "model.ckpt-300", epoch=1, step=300)
    assert clean(store.url, "--min-age", "0s")["orphans"][0]["path"] == index_name("model.ckpt-300")


def test_what_somebody_may_need_stays(store: Store) -> None:
    claimed(store, "model.ckpt-500", epoch=2, step=500)  # the running job's attempt
    claimed(store, "model.ckpt-200", epoch=1, step=200)
    claimed(store, "model.ckpt-100", epoch=1, step=100)
    make_checkpoint(store, "model.ckpt-50", WEIGHTS)  # nobody's: TensorFlow may have written it
    make_checkpoint(store, "e2-3/model.ckpt-500", WEIGHTS)
    store.put("checkpoint", b'model_checkpoint_path: "model.ckpt-100"\n')
    live = select(store, None)
    dead = live[0].__class__(200, "model.ckpt-200", "e1-9", 1, 0.0, 0, 4, 4)
    record(store, live, epoch=2, dying=[Dying(dead, 1.0)])
    before = prefixes(store)
    found = clean(store.url, "--min-age", "0s", "--yes")
    assert (found["orphans"], found["claims"]) == ([], [])
    assert found["unknown"] == ["model.ckpt-50"]
    assert prefixes(store) == before


def test_what_is_pinned_or_young_stays(store: Store) -> None:
    claimed(store, "model.ckpt-300", epoch=1, step=300)
    with pin(store, "model.ckpt-300", "a test"):
        assert clean(store.url, "--min-age", "0s")["orphans"] == []
    found = clean(store.url, "--min-age", "1h")
    assert (found["orphans"], found["claims"]) == ([], [])


def test_a_claim_that_could_be_made_again_stays(store: Store) -> None:
    claimed(store, "model.ckpt-900", epoch=1, step=900)
    found = clean(store.url, "--min-age", "0s", "--yes")
    assert found["orphans"][0]["path"] == "model.ckpt-900.index"
    assert found["claims"] == []
    assert prefixes(store) == {"model.ckpt-400"}
    assert "model.ckpt-900" in {claim.prefix for claim in list_claims(store)}


def test_a_directory_that_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    make_checkpoint(store, "model.ckpt-50", WEIGHTS)
    make_checkpoint(store, "e1-1/model.ckpt-50", WEIGHTS)
    before = snapshot(store)
    found = clean(store.url, "--min-age", "0s", "--yes")
    assert (found["orphans"], found["unknown"]) == ([], [])
    assert snapshot(store) == before


def test_expired_pins_go(store: Store) -> None:
    for name, expires in (("old", 5.0), ("new", time.time() + 900)):
        text = json.dumps({"prefix": "model.ckpt-400", "by": "me", "expires": expires})
        store.put(f"_ray_ckpt/pins/model.ckpt-400.{name}", text.encode())
    assert clean(store.url)["pins"] == ["_ray_ckpt/pins/model.ckpt-400.old"]
    assert len(store.list("_ray_ckpt/pins")) == 2
    clean(store.url, "--yes")
    assert [info.path for info in store.list("_ray_ckpt/pins")] == ["_ray_ckpt/pins/model.ckpt-400.new"]


def test_unused_segments_of_an_age_go(tmp_path: Path) -> None:
    run = tmp_path / "run-1"
    run.mkdir()
    for name in ("old", "young"):
        Segment.create(run / name, 1000).close()
    os.utime(run / "old", (5.0, 5.0))
    arguments = ("--segments", "--segment-folder", str(tmp_path))
    with Segment.create(run / "used", 1000):
        os.utime(run / "used", (5.0, 5.0))
        assert [item["path"] for item in clean(*arguments)["segments"]] == [str(run / "old")]
        assert sorted(path.name for path in run.iterdir()) == ["old", "used", "young"]
        clean(*arguments, "--yes")
        assert sorted(path.name for path in run.iterdir()) == ["used", "young"]


def test_segments_of_another_version_are_named_and_go(tmp_path: Path) -> None:
    run = tmp_path / "run-1"
    run.mkdir()
    path = of_version(run / "00000-0.segment", b"2")
    arguments = ("clean", "--segments", "--segment-folder", str(tmp_path), "--min-age", "0s")
    assert "of another version" in CliRunner().invoke(app, arguments).stdout
    CliRunner().invoke(app, [*arguments, "--yes"])
    assert not path.exists()


def test_for_people_it_says_what_was_not_done(store: Store) -> None:
    claimed(store, "model.ckpt-300", epoch=1, step=300)
    result = CliRunner().invoke(app, ["clean", store.url, "--min-age", "0s"])
    assert "model.ckpt-300.index" in result.stdout
    assert "nothing was removed; with --yes" in result.stderr
    result = CliRunner().invoke(app, ["clean", store.url, "--min-age", "0s", "--yes"])
    assert "removed these" in result.stderr
    assert "nothing to clean" in CliRunner().invoke(app, ["clean", store.url, "--min-age", "0s"]).stderr


def test_something_must_be_named() -> None:
    result = CliRunner().invoke(app, ["clean"])
    assert result.exit_code == 2
    assert "name a checkpoint directory, or --segments" in result.stderr


@pytest.mark.parametrize(("text", "expected_s"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("2d", 172_800)])
def test_ages(text: str, expected_s: float) -> None:
    assert parse_age(text) == expected_s


@pytest.mark.parametrize("text", ["", "5", "h", "-1h", "5 weeks", "1e3s"])
def test_ages_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError, match="not an age"):
        parse_age(text)

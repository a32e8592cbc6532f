"""The same reads over gs:// and s3://, from real servers on this machine, and the command on such URLs."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator

import numpy as np
import pytest
from typer.testing import CliRunner

from ray_ckpt.catalog import load, verify
from ray_ckpt.cli import app
from ray_ckpt.restore import open_checkpoint, read_boxes
from ray_ckpt.storage import open_store
from ray_ckpt.testing.servers import Server, gcs_server, s3_server
from ray_ckpt.types import Box
from tests.restore.make import commit, flip, grid, random_bits, same_bits, truncate


@pytest.fixture(scope="module", params=[gcs_server, s3_server])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with request.param() as started:
        yield started


def test_a_checkpoint_on_an_object_store(server: Server, seed: int) -> None:
    url = f"{server.make_bucket(f'bucket-{uuid.uuid4().hex[:12]}')}/runs/1"
    options = server.storage_options
    store = open_store(url, storage_options=options)
    arrays = {
        "big": random_bits(np.dtype(np.float32), (1200, 1100), seed),
        "cut": random_bits(np.dtype(np.int64), (40, 50), seed),
        **{f"small/{i}": np.full(7, i) for i in range(50)},
    }
    for step in (400, 500):
        commit(store, step, arrays, cuts={"cut": grid((40, 50), (2, 2))})
    found = load(url, storage_options=options)
    assert all(same_bits(found[name], array) for name, array in arrays.items())
    out = np.empty((1200, 10), np.float32)
    box = Box((0, 90), out.shape)
    read_boxes(open_checkpoint(store, "model.ckpt-500"), [("big", box, out)])
    assert same_bits(out, arrays["big"][box.slices])

    flip(store, "model.ckpt-400.data-00000-of-00004", 5000)
    path = "model.ckpt-500.data-00001-of-00004"
    truncate(store, path, store.size(path) - 1)
    reports = verify(url, storage_options=options)
    assert [found.tensor for found in reports[0].damage] == ["big"]
    assert {found.path for found in reports[1].damage} == {path}

    given = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in options.items()]
    arguments = [part for item in given for part in ("--storage-option", item)]
    listed = CliRunner().invoke(app, ["ls", url, "--json", *arguments])
    assert [item["step"] for item in json.loads(listed.stdout)["checkpoints"]] == [400, 500]
    assert CliRunner().invoke(app, ["verify", url, *arguments]).exit_code == 1

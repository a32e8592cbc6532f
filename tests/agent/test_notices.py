"""What Compute Engine's metadata server says about the end of a machine, and what follows from it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from ray_ckpt.agent import notices
from tests.agent.metadata_server import MetadataServer, running

UPCOMING = "upcoming-maintenance?alt=json"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MetadataServer]:
    with running() as found:
        monkeypatch.setenv(notices.HOST_VARIABLE, found.host)
        yield found


def maintenance(in_s: float, **more: str) -> str:
    start = datetime.now(timezone.utc) + timedelta(seconds=in_s)
    return json.dumps({"maintenance_status": "PENDING", "window_start_time": start.isoformat(), **more})


def test_a_machine_that_stays(server: MetadataServer) -> None:
    assert notices.read_notice() is None
    server.keys["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
    assert notices.read_notice() is None
    server.keys[UPCOMING] = maintenance(3600.0)
    assert notices.read_notice() is None


@pytest.mark.parametrize(
    "value",
    [
        "{}",
        "NONE",
        '{"error": "no notifications have been received yet, try again later"}',
        pytest.param(maintenance(-9000.0, maintenance_status="COMPLETE"), id="complete"),
        pytest.param(maintenance(-9000.0, window_end_time="2026-01-01T00:00:00Z"), id="over"),
    ],
)
def test_no_maintenance_is_said_in_many_ways(server: MetadataServer, value: str) -> None:
    server.keys[UPCOMING] = value
    assert notices.read_notice() is None


def test_a_server_that_has_heard_nothing_yet(server: MetadataServer) -> None:
    server.busy.add(UPCOMING)
    assert notices.read_notice() is None


def test_one_key_that_cannot_be_read_hides_no_other(server: MetadataServer) -> None:
    server.keys[UPCOMING] = maintenance(10.0)
    server.broken.update({"preempted", "maintenance-event"})
    assert notices.read_notice() is not None
    del server.keys[UPCOMING]
    with pytest.raises(OSError, match="500"):
        notices.read_notice()


def test_no_proxy_is_asked(server: MetadataServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as proxy:
        proxy.keys["preempted"] = "TRUE"
        monkeypatch.setenv("http_proxy", f"http://{proxy.host}")
        assert notices.read_notice() is None


@pytest.mark.parametrize(
    ("key", "value", "text", "least_s", "most_s"),
    [
        ("preempted", "TRUE", "preempts this machine", 30, 30),
        ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE", "ends this machine", 60, 60),
        pytest.param(UPCOMING, maintenance(100.0), "begins at", 60, 100, id="maintenance soon"),
        pytest.param(UPCOMING, maintenance(-5.0), "begins at", 60, 60, id="maintenance now"),
        pytest.param(
            UPCOMING, maintenance(9999.0, maintenance_status="ONGOING"), "has begun", 60, 60, id="maintenance begun"
        ),
        (UPCOMING, json.dumps({"maintenanceStatus": "ONGOING"}), "has begun", 60, 60),
        (UPCOMING, json.dumps({"Upcoming maintenance": {"maintenanceStatus": "ONGOING"}}), "has begun", 60, 60),
    ],
)
def test_a_machine_that_goes(
    server: MetadataServer, key: str, value: str, text: str, least_s: float, most_s: float
) -> None:
    server.keys[key] = value
    notice = notices.read_notice()
    assert notice is not None
    assert text in notice.text
    assert least_s <= notice.left_s <= most_s


def test_the_window_of_google_s_own_form(server: MetadataServer) -> None:
    at = datetime.fromtimestamp(time.time() + 50, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.1234567Z")
    server.keys[UPCOMING] = json.dumps({"windowStartTime": at, "maintenanceStatus": "PENDING"})
    assert notices.read_notice() is not None


@pytest.mark.parametrize("value", ["[]", "soon", '{"window_start_time": "soon"}'])
def test_what_is_not_understood_is_said(server: MetadataServer, value: str) -> None:
    server.keys[UPCOMING] = value
    with pytest.raises(OSError, match="not understood"):
        notices.read_notice()


def test_a_server_that_is_gone_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as found:
        monkeypatch.setenv(notices.HOST_VARIABLE, found.host)
    with pytest.raises(OSError, match="does not answer"):
        notices.read_notice()


def test_elsewhere_nobody_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(notices.HOST_VARIABLE, raising=False)
    product = tmp_path / "product_name"
    monkeypatch.setattr(notices, "_PRODUCT_FILE", product)
    assert not notices.on_compute_engine()
    product.write_text("Standard PC\n")
    assert not notices.on_compute_engine()
    product.write_text("Google Compute Engine\n")
    assert notices.on_compute_engine()
    product.unlink()
    monkeypatch.setenv(notices.HOST_VARIABLE, "127.0.0.1:1")
    assert notices.on_compute_engine()

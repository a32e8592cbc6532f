"""Notices of Google Compute Engine that this machine will be taken away, and telling Ray of them.

Keys of the metadata server: https://cloud.google.com/compute/docs/metadata/predefined-metadata-keys and
https://cloud.google.com/tpu/docs/view-maintenance-notifications.
"""

from __future__ import annotations

import json
import os
import re
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import ProxyHandler, Request, build_opener

import ray

HOST_VARIABLE = "GCE_METADATA_HOST"
"""Google's own libraries look for the metadata server there too."""

_DEFAULT_HOST = "metadata.google.internal"
_PRODUCT_FILE = Path("/sys/class/dmi/id/product_name")
_TIMEOUT_S = 3.0
_PREEMPTED_S = 30.0
"""So long a spot machine goes on after its notice."""
_TERMINATED_S = 60.0
_DRAIN_S = 10.0
_AHEAD_S = 120.0
"""Maintenance is announced days ahead: training goes on until shortly before its window."""
_DIRECT = build_opener(ProxyHandler({}))
"""A proxy is another machine, and may answer for itself."""


@dataclass(frozen=True, slots=True)
class Notice:
    """This machine goes in ``left_s`` seconds, as far as is known; ``text`` is what people should read."""

    text: str
    left_s: float


def on_compute_engine() -> bool:
    """Whether there is a metadata server to ask, without asking the network."""
    if os.environ.get(HOST_VARIABLE):
        return True
    try:
        return _PRODUCT_FILE.read_text().startswith("Google")
    except OSError:
        return False


def read_notice() -> Notice | None:
    """What the metadata server says now; None while this machine stays.

    A live migration is none: it takes the machine along. One key that cannot be read hides no other.

    Raises:
        OSError: there is no notice in what could be read, and something could not.
    """
    problem: OSError | None = None
    for read in (_preempted, _terminated, _maintained):
        try:
            notice = read()
        except OSError as error:
            problem = error
        else:
            if notice is not None:
                return notice
    if problem is not None:
        raise problem
    return None


def _preempted() -> Notice | None:
    found = _get("preempted") == "TRUE"
    return Notice("Compute Engine preempts this machine", _PREEMPTED_S) if found else None


def _terminated() -> Notice | None:
    found = _get("maintenance-event") == "TERMINATE_ON_HOST_MAINTENANCE"
    return Notice("Compute Engine ends this machine for maintenance of its host", _TERMINATED_S) if found else None


def _maintained() -> Notice | None:
    """Of a planned maintenance. Where none is, the server says so in several ways."""
    text = _get("upcoming-maintenance?alt=json")
    try:
        content = json.loads(text) if text and text != "NONE" else {}
        if isinstance(content, dict) and len(content) == 1 and isinstance(next(iter(content.values())), dict):
            content = next(iter(content.values()))
        # Written with underscores by the server, and without by Google's other tools.
        found = {key.replace("_", "").lower(): str(value) for key, value in content.items()}
        if not found or "error" in found:
            return None
        status = found.get("maintenancestatus", "PENDING").upper()
        if status == "ONGOING":
            return Notice("maintenance of this machine's host has begun", _TERMINATED_S)
        left_s, over_s = _until(found["windowstarttime"]), _until(found.get("windowendtime", ""))
    except (ValueError, KeyError, AttributeError) as error:
        raise OSError(f"upcoming-maintenance of the metadata server is not understood ({error!r}): {text!r}") from None
    if status != "PENDING" or left_s > _AHEAD_S or over_s < 0:
        return None
    return Notice(
        f"maintenance of this machine's host begins at {found['windowstarttime']}", max(left_s, _TERMINATED_S)
    )


def _until(text: str) -> float:
    """Seconds from now; a time that is not given never comes. Raises `ValueError`."""
    if not text:
        return float("inf")
    # Python 3.10 reads no fraction but of 3 or 6 digits, and no "Z".
    plain = re.sub(r"\.\d+", "", text).replace("Z", "+00:00")
    return datetime.fromisoformat(plain).timestamp() - time.time()


def _get(key: str) -> str:
    """The value of an instance's key; empty where there is none (yet)."""
    host = os.environ.get(HOST_VARIABLE) or _DEFAULT_HOST
    request = Request(f"http://{host}/computeMetadata/v1/instance/{key}", headers={"Metadata-Flavor": "Google"})
    try:
        with _DIRECT.open(request, timeout=_TIMEOUT_S) as answer:
            found: bytes = answer.read()
            return found.decode(errors="replace").strip()
    except HTTPError as error:
        if error.code in (404, 503):
            return ""
        raise
    except URLError as error:
        raise OSError(f"the metadata server at {host} does not answer: {error.reason}") from error


def drain(node_id: str, notice: Notice) -> None:
    """Have Ray take no new work to this node and tell everybody, as for any node that goes; may be repeated.

    Raises:
        OSError: Ray refuses, or is too old to know how.
    """
    try:
        from ray.core.generated import autoscaler_pb2

        client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int((time.time() + notice.left_s) * 1000)
        accepted, why_not = client.drain_node(node_id, reason, notice.text, deadline_ms, timeout=_DRAIN_S)
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        raise OSError(f"this version of Ray cannot be told to drain a node: {error!r}") from error
    if not accepted:
        raise OSError(f"Ray does not drain node {node_id}: {why_not}")

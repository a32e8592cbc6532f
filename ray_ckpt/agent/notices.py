"""Notices of Google Compute Engine that this machine will be taken away, and telling Ray of them.

Keys of the metadata server: https://cloud.google.com/compute/docs/metadata/predefined-metadata-keys and
https://cloud.google.com/tpu/docs/view-maintenance-notifications.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import ray

HOST_VARIABLE = "GCE_METADATA_HOST"
"""Google's own libraries look for the metadata server there too."""

_DEFAULT_HOST = "metadata.google.internal"
_PRODUCT_FILE = Path("/sys/class/dmi/id/product_name")
_TIMEOUT_S = 5.0
_PREEMPTED_S = 30.0
"""So long a spot machine goes on after its notice."""
_TERMINATED_S = 60.0
_AHEAD_S = 120.0
"""Maintenance is announced days ahead: training goes on until shortly before its window."""


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

    A live migration is none: it takes the machine along.

    Raises:
        OSError: it does not answer.
    """
    if _get("preempted") == "TRUE":
        return Notice("Compute Engine preempts this machine", _PREEMPTED_S)
    if _get("maintenance-event") == "TERMINATE_ON_HOST_MAINTENANCE":
        return Notice("Compute Engine ends this machine for maintenance of its host", _TERMINATED_S)
    upcoming = _get("upcoming-maintenance?alt=json")
    return _maintenance(upcoming) if upcoming else None


def _maintenance(text: str) -> Notice | None:
    try:
        content = json.loads(text)
        # Written with underscores by the server, and without by Google's other tools.
        found = {key.replace("_", "").lower(): str(value) for key, value in content.items()}
        if found.get("maintenancestatus", "").upper() == "ONGOING":
            return Notice("maintenance of this machine's host has begun", 0.0)
        start = datetime.fromisoformat(found["windowstarttime"].replace("Z", "+00:00"))
    except (ValueError, KeyError, AttributeError) as error:
        raise OSError(f"upcoming-maintenance of the metadata server is not understood ({error!r}): {text!r}") from None
    left_s = start.timestamp() - time.time()
    return Notice(f"maintenance of this machine's host begins at {start}", left_s) if left_s <= _AHEAD_S else None


def _get(key: str) -> str:
    """The value of an instance's key; empty where there is none."""
    host = os.environ.get(HOST_VARIABLE) or _DEFAULT_HOST
    request = Request(f"http://{host}/computeMetadata/v1/instance/{key}", headers={"Metadata-Flavor": "Google"})
    try:
        with urlopen(request, timeout=_TIMEOUT_S) as answer:
            found: bytes = answer.read()
            return found.decode().strip()
    except HTTPError as error:
        if error.code == 404:
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
        deadline_ms = int((time.time() + max(notice.left_s, 1.0)) * 1000)
        accepted, why_not = client.drain_node(node_id, reason, notice.text, deadline_ms)
    except (AttributeError, ImportError, TypeError, ValueError) as error:
        raise OSError(f"this version of Ray cannot be told to drain a node: {error!r}") from error
    if not accepted:
        raise OSError(f"Ray does not drain node {node_id}: {why_not}")

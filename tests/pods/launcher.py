"""What a launcher config must say that neither Ray's schema nor its GCP code asks for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

Config = dict[str, Any]

_STORAGE_SCOPES = ("/auth/cloud-platform", "/auth/devstorage.read_write", "/auth/devstorage.full_control")
_CHIPS_PER_HOST = 4
_CORES_PER_CHIP = {"v2": 2, "v3": 2, "v4": 2, "v5p": 2, "v5litepod": 1, "v6e": 1}


def hosts_of(accelerator_type: str) -> int:
    """Hosts of a slice, "v4-16" for one: v2 to v4 and v5p count cores, the others chips; four chips a host."""
    generation, _, size = accelerator_type.partition("-")
    return math.ceil(int(size) / _CORES_PER_CHIP[generation] / _CHIPS_PER_HOST)


def faults(config: Config) -> list[str]:
    """What would fail only once machines are paid for, one line each; empty for a good config."""
    return [*_place(config), *_head(config), *_slices(config), *_installation(config)]


def _place(config: Config) -> Iterator[str]:
    provider = config.get("provider", {})
    for key in ("region", "availability_zone", "project_id"):
        if not provider.get(key):
            yield f"provider.{key} is missing: Ray fills in one of its own, or nothing"
    region, zone = provider.get("region") or "", provider.get("availability_zone") or ""
    if region and zone and not zone.startswith(f"{region}-"):
        yield f"provider.availability_zone {zone} is not in region {region}"


def _head(config: Config) -> Iterator[str]:
    head = config["available_node_types"][config["head_node_type"]]
    node = head["node_config"]
    if "acceleratorType" in node or "acceleratorConfig" in node or "TPU" in head.get("resources", {}):
        yield "the head has a TPU, which nothing on it uses"
    if head.get("resources", {}).get("CPU") != 0:
        yield "the head offers CPUs: training could land there"


def _slices(config: Config) -> Iterator[str]:
    found = {
        name: kind
        for name, kind in config["available_node_types"].items()
        if name != config["head_node_type"] and "TPU" in kind.get("resources", {})
    }
    if not found:
        yield "no worker type has TPUs"
    for name, kind in found.items():
        for fault in (*_slice_node(kind["node_config"]), *_slice_count(kind)):
            yield f"{name}: {fault}"
    wanted = sum(kind.get("min_workers", 0) for kind in found.values())
    if config.get("max_workers", 0) < wanted:
        yield f"max_workers is {config.get('max_workers')}, fewer than the {wanted} slices wanted"


def _slice_node(node: Config) -> Iterator[str]:
    if "machineType" in node:
        yield "machineType makes it an ordinary VM without a word"
    if not node.get("runtimeVersion"):
        yield "runtimeVersion is missing, which Google requires"
    account = node.get("serviceAccount", {})
    if "serviceAccounts" in node:
        yield "serviceAccounts is Compute Engine's field; a TPU's is serviceAccount, with scope"
    if not account.get("email"):
        yield "serviceAccount.email is missing: nobody would know whom to let write to the bucket"
    scopes = account.get("scope", [])
    if scopes and not any(scope.endswith(_STORAGE_SCOPES) for scope in scopes):
        yield f"serviceAccount.scope {scopes} leaves storage out: gs:// would refuse every write"


def _slice_count(kind: Config) -> Iterator[str]:
    least, most = kind.get("min_workers", 0), kind.get("max_workers", 0)
    if least < 1:
        yield "min_workers is 0: no slice is there when a job comes, and an idle one is given back"
    hosts = hosts_of(kind["node_config"].get("acceleratorType", "v4-8"))
    if hosts > 1 and least == hosts:
        yield f"min_workers counts slices, and {least} is the number of hosts of one"
    if most != least:
        yield f"max_workers {most} is not min_workers {least}: Ray would buy a slice for each host that a job wants"


def _installation(config: Config) -> Iterator[str]:
    mounts = [remote for remote, local in config.get("file_mounts", {}).items() if local == "."]
    if not mounts:
        yield "this checkout is not mounted on the hosts"
    commands = config.get("setup_commands", [])
    installed = [mount for mount in mounts for c in commands if re.search(rf"pip install .*{mount}(\[|'|\s|$)", c)]
    if not installed:
        yield f"no setup command installs the checkout from {mounts}"
    if not any("ray[" in c and "train" in c for c in commands):
        yield "no setup command installs ray[train]"
    if not any("jax[tpu]" in c for c in config.get("worker_setup_commands", [])):
        yield "no worker setup command installs jax[tpu]"
    if not any("google-api-python-client" in c for c in config.get("head_setup_commands", [])):
        yield "the head cannot start TPUs without google-api-python-client"

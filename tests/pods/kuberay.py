"""What a RayCluster for TPU slices on GKE must say, and strict checks against a CRD's schema."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

Spec = dict[str, Any]

_UNITS = {"Gi": 2**30, "Mi": 2**20, "G": 10**9, "M": 10**6}
_WITH_SLICES = {"tpu-v4-podslice", "tpu-v5-lite-podslice", "tpu-v5p-slice", "tpu-v6e-slice"}


def nbytes(quantity: str) -> float:
    """A quantity of Kubernetes, "200Gi" for one, in bytes."""
    for unit, factor in _UNITS.items():
        if quantity.endswith(unit):
            return float(quantity[: -len(unit)]) * factor
    return float(quantity)


def faults(spec: Spec) -> list[str]:
    """What would fail only on the cluster, one line each; empty for a good spec of a RayCluster."""
    found = [f"head: {fault}" for fault in _head(spec["headGroupSpec"])]
    for group in spec["workerGroupSpecs"]:
        found += [f"{group['groupName']}: {fault}" for fault in (*_slice(group), *_memory(group), *_end(group))]
    return found


def _pod(group: Spec) -> Spec:
    found: Spec = group["template"]["spec"]
    return found


def _ray(group: Spec) -> Spec:
    found: Spec = _pod(group)["containers"][0]
    return found


def _head(group: Spec) -> Iterator[str]:
    if "google.com/tpu" in _ray(group)["resources"]["limits"] or "nodeSelector" in _pod(group):
        yield "it has a TPU, which nothing on it uses"
    if group["rayStartParams"].get("num-cpus") != "0":
        yield "it offers CPUs: training could land there"
    if not _pod(group).get("serviceAccountName"):
        yield "no serviceAccountName: the coordinator could not write to gs://"


def _slice(group: Spec) -> Iterator[str]:
    selector = _pod(group).get("nodeSelector", {})
    kind = selector.get("cloud.google.com/gke-tpu-accelerator")
    topology = selector.get("cloud.google.com/gke-tpu-topology")
    if kind not in _WITH_SLICES:
        yield f"gke-tpu-accelerator {kind} is none of {', '.join(sorted(_WITH_SLICES))}"
    if topology is None:
        yield "gke-tpu-topology is missing"
        return
    resources = _ray(group)["resources"]
    chips, asked = resources["limits"].get("google.com/tpu"), resources["requests"].get("google.com/tpu")
    if chips is None or chips != asked:
        yield f"google.com/tpu must be equal in requests and limits, found {asked} and {chips}"
        return
    hosts = math.prod(map(int, topology.split("x"))) // int(chips)
    if group.get("numOfHosts", 1) != hosts:
        yield f"numOfHosts is {group.get('numOfHosts', 1)}, but {topology} with {chips} chips a host has {hosts}"
    if not group["minReplicas"] == group["replicas"] == group["maxReplicas"]:
        yield "replicas, minReplicas and maxReplicas count slices, which nobody here scales: make them equal"


def _memory(group: Spec) -> Iterator[str]:
    mounts = {m["mountPath"]: m["name"] for m in _ray(group).get("volumeMounts", [])}
    volumes = {v["name"]: v for v in _pod(group).get("volumes", [])}
    directory = volumes.get(mounts.get("/dev/shm", ""), {}).get("emptyDir", {})
    if directory.get("medium") != "Memory" or "sizeLimit" not in directory:
        yield "/dev/shm is no emptyDir of medium Memory with a sizeLimit: snapshots need a known room"
        return
    room, memory = nbytes(directory["sizeLimit"]), nbytes(_ray(group)["resources"]["limits"]["memory"])
    store = group["rayStartParams"].get("object-store-memory")
    if store is None or float(store) > room / 2:
        yield f"object-store-memory {store} leaves snapshots less than half of /dev/shm's {room:.0f} bytes"
    if room > 0.75 * memory:
        yield f"/dev/shm may fill {room:.0f} bytes of the container's {memory:.0f}: the process would be killed"


def _end(group: Spec) -> Iterator[str]:
    environment = {e["name"]: e.get("value") for e in _ray(group).get("env", [])}
    drain = float(environment.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 30))
    grace = _pod(group).get("terminationGracePeriodSeconds", 30)
    if not 0 < drain < grace:
        yield f"the pod is killed after {grace} s, before Ray has drained it, which takes {drain:.0f} s"
    if not _pod(group).get("serviceAccountName"):
        yield "no serviceAccountName: writers could not put to gs://"


def against(schema: Spec, value: Any, where: str = "") -> Iterator[str]:
    """What the schema of a CRD does not allow: unknown names, missing ones, other types, values out of an enum."""
    if schema.get("x-kubernetes-int-or-string"):
        if not isinstance(value, int | str):
            yield f"{where}: expected a number or text, found {value!r}"
        return
    types: dict[str, Any] = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}
    expected = types.get(schema.get("type", ""), object)
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        yield f"{where}: expected {schema['type']}, found {value!r}"
    elif "enum" in schema and value not in schema["enum"]:
        yield f"{where}: {value!r} is none of {schema['enum']}"
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from against(schema["items"], item, f"{where}[{i}]")
    elif isinstance(value, dict):
        yield from _members(schema, value, where)


def _members(schema: Spec, value: Spec, where: str) -> Iterator[str]:
    for name in schema.get("required", []):
        if name not in value:
            yield f"{where}.{name} is required"
    for name, item in value.items():
        part = schema.get("properties", {}).get(name, schema.get("additionalProperties"))
        if isinstance(part, dict):
            yield from against(part, item, f"{where}.{name}")
        elif part is None and not schema.get("x-kubernetes-preserve-unknown-fields"):
            yield f"{where}.{name} is unknown"

"""The manifests of `deploy/kuberay`: their structure by our own checks, and by the CRDs where these are at hand.

The CRDs are KubeRay's (helm-chart/kuberay-operator/crds in its repository); they are too large to be kept here. Name a
folder with them in RAY_CKPT_KUBERAY_CRDS.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from tests.pods.kuberay import Spec, against, faults, nbytes

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy" / "kuberay"
CRDS = os.environ.get("RAY_CKPT_KUBERAY_CRDS")


def documents(name: str) -> dict[str, Spec]:
    """A file's manifests by their kinds."""
    return {found["kind"]: found for found in yaml.safe_load_all((FOLDER / name).read_text())}


@pytest.fixture
def spec() -> Spec:
    found: Spec = documents("raycluster.yaml")["RayCluster"]["spec"]
    return found


def worker(spec: Spec) -> Spec:
    found: Spec = spec["workerGroupSpecs"][0]
    return found


def pod(group: Spec) -> Spec:
    found: Spec = group["template"]["spec"]
    return found


def ray_of(group: Spec) -> Spec:
    found: Spec = pod(group)["containers"][0]
    return found


def test_our_own_checks_pass(spec: Spec) -> None:
    assert faults(spec) == []
    assert faults(documents("rayjob.yaml")["RayJob"]["spec"]["rayClusterSpec"]) == []


def test_the_job_has_the_same_cluster_and_a_config(spec: Spec) -> None:
    made = documents("rayjob.yaml")
    job = made["RayJob"]["spec"]
    head = pod(job["rayClusterSpec"]["headGroupSpec"])
    mount = head["containers"][0].pop("volumeMounts")[0]
    assert head.pop("volumes")[0]["configMap"]["name"] == made["ConfigMap"]["metadata"]["name"]
    assert job["rayClusterSpec"] == spec
    _, script, _, path = job["entrypoint"].split()
    assert (ROOT / script.removeprefix("/home/ray/ray_ckpt/")).exists()
    assert path == f"{mount['mountPath']}/job.yaml"
    example = yaml.safe_load((ROOT / "examples" / "configs" / "jax_v6e_16.yaml").read_text())
    assert yaml.safe_load(made["ConfigMap"]["data"]["job.yaml"]) == example
    assert example["hosts"]["workers"] == worker(spec)["numOfHosts"] * worker(spec)["replicas"]
    assert example["hosts"]["topology"] == pod(worker(spec))["nodeSelector"]["cloud.google.com/gke-tpu-topology"]


def test_names_and_versions_agree(spec: Spec) -> None:
    account = documents("service_account.yaml")["ServiceAccount"]["metadata"]
    groups = [spec["headGroupSpec"], worker(spec)]
    assert {pod(group)["serviceAccountName"] for group in groups} == {account["name"]}
    assert len({ray_of(group)["image"] for group in groups}) == 1
    assert spec["rayVersion"] == ray.__version__
    text = (FOLDER / "Dockerfile").read_text()
    assert f"FROM rayproject/ray:{ray.__version__}-" in text
    assert f"'ray[default,train]=={ray.__version__}'" in text


def test_the_image_gets_the_sources_only() -> None:
    left_out = {line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().splitlines()}
    assert {line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()} | {".git"} <= left_out


Break = Callable[[Spec], Any]

BROKEN: dict[str, Break] = {
    "head: it has a TPU": lambda s: ray_of(s["headGroupSpec"])["resources"]["limits"].update({"google.com/tpu": "4"}),
    "head: it offers CPUs": lambda s: s["headGroupSpec"]["rayStartParams"].pop("num-cpus"),
    "head: no serviceAccountName": lambda s: pod(s["headGroupSpec"]).pop("serviceAccountName"),
    "gke-tpu-accelerator": lambda s: pod(worker(s))["nodeSelector"].pop("cloud.google.com/gke-tpu-accelerator"),
    "gke-tpu-topology is missing": lambda s: pod(worker(s))["nodeSelector"].pop("cloud.google.com/gke-tpu-topology"),
    "must be equal in requests": lambda s: ray_of(worker(s))["resources"]["requests"].pop("google.com/tpu"),
    "numOfHosts is 1": lambda s: worker(s).pop("numOfHosts"),
    "count slices": lambda s: worker(s).update(maxReplicas=4),
    "/dev/shm is no emptyDir": lambda s: pod(worker(s))["volumes"][0]["emptyDir"].pop("medium"),
    "object-store-memory": lambda s: worker(s)["rayStartParams"].clear(),
    "may fill": lambda s: pod(worker(s))["volumes"][0]["emptyDir"].update(sizeLimit="390Gi"),
    "before Ray has drained": lambda s: pod(worker(s)).update(terminationGracePeriodSeconds=30),
    "v6e-16: no serviceAccountName": lambda s: pod(worker(s)).pop("serviceAccountName"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_each_of_our_checks_fails_on_a_broken_copy(spec: Spec, fault: str) -> None:
    broken = copy.deepcopy(spec)
    BROKEN[fault](broken)
    assert any(fault in line for line in faults(broken)), faults(broken)


def test_quantities() -> None:
    assert [nbytes(q) for q in ("2Gi", "3G", "7")] == [2**31, 3e9, 7]


def test_the_check_against_a_schema() -> None:
    schema = {
        "type": "object",
        "required": ["a"],
        "properties": {
            "a": {"type": "array", "items": {"type": "integer"}},
            "b": {"type": "object", "additionalProperties": {"x-kubernetes-int-or-string": True}},
            "c": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
            "d": {"type": "string", "enum": ["x"]},
        },
    }
    assert list(against(schema, {"a": [1], "b": {"x": 1, "y": "2"}, "c": {"z": None}, "d": "x"})) == []
    assert list(against(schema, {"a": [True], "b": {"x": []}, "d": "y", "e": 1})) == [
        ".a[0]: expected integer, found True",
        ".b.x: expected a number or text, found []",
        ".d: 'y' is none of ['x']",
        ".e is unknown",
    ]
    assert next(against(schema, {"a": 1})) == ".a: expected array, found 1"
    assert list(against(schema, {})) == [".a is required"]


@pytest.mark.skipif(CRDS is None, reason="RAY_CKPT_KUBERAY_CRDS names no folder with KubeRay's CRDs")
@pytest.mark.parametrize(("name", "kind"), [("raycluster.yaml", "RayCluster"), ("rayjob.yaml", "RayJob")])
def test_the_crd_allows_it(name: str, kind: str) -> None:
    crd = yaml.load((Path(str(CRDS)) / f"ray.io_{kind.lower()}s.yaml").read_text(), yaml.CSafeLoader)
    version = next(v for v in crd["spec"]["versions"] if v["name"] == "v1")
    schema, found = version["schema"]["openAPIV3Schema"], documents(name)[kind]
    # Of the object's own fields a CRD says nothing.
    del schema["properties"]["metadata"], found["metadata"]
    assert list(against(schema, found)) == []
    found["spec"]["rayVersoin"] = "2"
    assert list(against(schema, found)) == [".spec.rayVersoin is unknown"]

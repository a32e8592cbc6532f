"""`cluster.yaml`, as far as it can be judged without Google Cloud: by Ray, by Google's own API schemas, by us."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from tests.pods.launcher import Config, faults, hosts_of

gcp = pytest.importorskip("ray.autoscaler._private.gcp.config", reason="Google's Python client is not installed")
util = pytest.importorskip("ray.autoscaler._private.util")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def config() -> Config:
    found: Config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return found


def nodes(config: Config) -> dict[str, Any]:
    """node_config by the name of its type."""
    return {name: kind["node_config"] for name, kind in config["available_node_types"].items()}


def test_ray_takes_it(config: Config) -> None:
    from ray.autoscaler._private.gcp.node_provider import GCPNodeProvider

    prepared = util.prepare_config(copy.deepcopy(config))
    util.validate_config(prepared)
    kinds = {name: gcp.get_node_type(node) for name, node in nodes(config).items()}
    assert kinds == {"head": gcp.GCPNodeType.COMPUTE, "tpu_v6e_16": gcp.GCPNodeType.TPU}
    filled = GCPNodeProvider.fillout_available_node_types_resources(prepared)
    assert filled["available_node_types"]["tpu_v6e_16"]["resources"] == {"TPU": 4, "TPU-v6e-16-head": 1}
    assert filled["available_node_types"]["head"]["resources"] == {"CPU": 0}


def test_ray_refuses_a_broken_one(config: Config) -> None:
    broken = util.prepare_config(copy.deepcopy(config))
    broken["available_node_types"]["head"]["min_wrokers"] = 0
    with pytest.raises(Exception, match="min_wrokers"):
        util.validate_config(broken)
    with pytest.raises(ValueError, match="acceleratorType"):
        gcp.get_node_type({"acceleratorType": "v6e16"})


def api(name: str) -> dict[str, Any]:
    """The schemas of one of Google's APIs, as its Python client ships them."""
    path = files("googleapiclient") / "discovery_cache" / "documents" / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text())["schemas"]
    return found


def unknown(schemas: dict[str, Any], kind: str, value: Any) -> list[str]:
    """The fields of a request that Google's API does not have, and values of another type, by their paths."""
    return _unknown(schemas, schemas[kind], value, "")


def _unknown(schemas: dict[str, Any], schema: dict[str, Any], value: Any, where: str) -> list[str]:
    if "$ref" in schema:
        return _unknown(schemas, schemas[schema["$ref"]], value, where)
    types: dict[str, Any] = {"object": dict, "array": list, "string": (str, int), "boolean": bool, "integer": int}
    if not isinstance(value, types[schema["type"]]):
        return [f"{where} is {value!r}, not of type {schema['type']}"]
    if isinstance(value, list):
        return [f for i, item in enumerate(value) for f in _unknown(schemas, schema["items"], item, f"{where}[{i}]")]
    if not isinstance(value, dict):
        return []
    found = []
    for key, item in value.items():
        part = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
        found += [f"{where}.{key} is unknown"] if part is None else _unknown(schemas, part, item, f"{where}.{key}")
    return found


@pytest.mark.parametrize(
    ("name", "kind", "document"), [("tpu_v6e_16", "Node", "tpu.v2alpha1"), ("head", "Instance", "compute.v1")]
)
def test_google_knows_every_field(config: Config, name: str, kind: str, document: str) -> None:
    schemas, node = api(document), nodes(config)[name]
    assert unknown(schemas, kind, node) == []
    assert unknown(schemas, kind, {**node, "runtimeversion": "x"}) == [".runtimeversion is unknown"]


def test_the_commented_lines_are_right_too() -> None:
    text = (ROOT / "cluster.yaml").read_text()
    spot, count = re.subn(r"# (schedulingConfig: .*)", r"\1", text)
    assert count == 1
    node = nodes(yaml.safe_load(spot))["tpu_v6e_16"]
    assert node["schedulingConfig"] == {"spot": True}
    assert unknown(api("tpu.v2alpha1"), "Node", node) == []
    assert hosts_of("v4-16") == 2
    assert "v4-16 (two hosts" in text


class Recorder:
    """Google's TPU API, as far as making a node goes: keeps what it was asked for."""

    def __init__(self) -> None:
        self.asked: dict[str, Any] = {}

    def projects(self) -> Recorder:
        return self

    locations = nodes = projects

    def create(self, **request: Any) -> Recorder:
        self.asked = request
        return self

    def execute(self, http: object) -> dict[str, str]:
        return {"name": "operation"}


def test_the_request_that_ray_sends(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler._private.gcp.node import GCPTPU

    google: Any = Recorder()
    google._http = None
    monkeypatch.setattr(GCPTPU, "get_new_authorized_http", lambda self, http: None)
    maker = GCPTPU(google, "project", "us-east5-b", "cluster")
    labels = {"ray-node-name": "worker"}
    # Twice: a second slice is made from the same config.
    for _ in range(2):
        maker.create_instance(nodes(config)["tpu_v6e_16"], labels, wait_for_operation=False)
        body = google.asked["body"]
        assert unknown(api("tpu.v2alpha1"), "Node", body) == []
        assert body["serviceAccount"]["scope"] == ["https://www.googleapis.com/auth/cloud-platform"]
        assert body["runtimeVersion"] == "v2-alpha-tpuv6e"


def test_our_own_checks_pass(config: Config) -> None:
    assert faults(config) == []


def test_the_version_of_ray_is_the_tested_one(config: Config) -> None:
    assert any(f"'ray[default,train]=={ray.__version__}'" in c for c in config["setup_commands"])


@pytest.mark.parametrize("name", ["cluster.yaml", "docs/tpu.md"])
def test_it_is_launched_with_the_autoscaler_that_counts_slices(name: str) -> None:
    text = (ROOT / name).read_text()
    launched = re.findall(r"(\S+ )?ray up cluster\.yaml", text)
    assert launched
    assert set(launched) == {"RAY_UP_enable_autoscaler_v2=0 "}


Break = Callable[[Config], Any]


def tpu(config: Config) -> Config:
    found: Config = config["available_node_types"]["tpu_v6e_16"]
    return found


BROKEN: dict[str, Break] = {
    "provider.region is missing": lambda c: c["provider"].pop("region"),
    "provider.availability_zone is missing": lambda c: c["provider"].pop("availability_zone"),
    "provider.project_id is missing": lambda c: c["provider"].update(project_id=None),
    "is not in region": lambda c: c["provider"].update(region="us-central2"),
    "the head has a TPU": lambda c: c["available_node_types"]["head"]["resources"].update(TPU=4),
    "the head offers CPUs": lambda c: c["available_node_types"]["head"].update(resources={"CPU": 8}),
    "no worker type has TPUs": lambda c: tpu(c).update(resources={"CPU": 4}),
    "fewer than the 1 slices": lambda c: c.update(max_workers=0),
    "machineType makes it": lambda c: tpu(c)["node_config"].update(machineType="n2-standard-8"),
    "runtimeVersion is missing": lambda c: tpu(c)["node_config"].pop("runtimeVersion"),
    "serviceAccounts is Compute Engine's": lambda c: tpu(c)["node_config"].update(serviceAccounts=[]),
    "serviceAccount.email is missing": lambda c: tpu(c)["node_config"]["serviceAccount"].pop("email"),
    "leaves storage out": lambda c: tpu(c)["node_config"]["serviceAccount"].update(
        scope=["https://www.googleapis.com/auth/logging.write"]
    ),
    "min_workers is 0": lambda c: tpu(c).update(min_workers=0, max_workers=0),
    "min_workers counts slices": lambda c: tpu(c).update(min_workers=4, max_workers=4),
    "is not min_workers 1": lambda c: tpu(c).update(max_workers=4),
    "is not mounted": lambda c: c.update(file_mounts={}),
    "no setup command installs the checkout": lambda c: c.update(setup_commands=["pip install 'ray[default,train]'"]),
    "installs ray[train]": lambda c: c.update(setup_commands=["pip install '/home/ubuntu/ray_ckpt[jax]'"]),
    "installs jax[tpu]": lambda c: c.update(worker_setup_commands=[]),
    "the head cannot start TPUs": lambda c: c.update(head_setup_commands=[]),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_each_of_our_checks_fails_on_a_broken_copy(config: Config, fault: str) -> None:
    broken = copy.deepcopy(config)
    BROKEN[fault](broken)
    assert any(fault in line for line in faults(broken)), faults(broken)

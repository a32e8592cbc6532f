"""The examples' configs, and what their reader says of wrong ones."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from examples.config import ConfigError, build, from_command, read

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "configs"


@dataclass(frozen=True)
class Inner:
    """A part."""

    size: int = 3


@dataclass(frozen=True)
class Outer:
    """Something of each kind."""

    name: str
    inner: Inner
    rate: float = 0.5
    topology: str | None = None
    fast: bool = False


def test_what_fits(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: x\ninner: {size: 4}\nrate: 2\ntopology: 4x4\n")
    assert read(path, Outer) == Outer("x", Inner(4), 2.0, "4x4")
    assert build(Outer, {"name": "x", "inner": {}, "topology": None}, "here") == Outer("x", Inner())


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ([], r"here: expected names with values, found \[\]"),
        ({"inner": {}}, "here: name must be given"),
        ({"name": "x", "inner": {}, "rtae": 1}, "here: 'rtae' is unknown; did you mean 'rate'?"),
        ({"name": "x", "inner": {}, 7: 1}, "here: 7 is unknown; there are name, inner, rate, topology, fast"),
        ({"name": "x", "inner": {"size": "4"}}, "here: inner: size must be int, found '4'; YAML takes"),
        ({"name": "x", "inner": {"size": True}}, "here: inner: size must be int, found True$"),
        ({"name": "x", "inner": 3}, "here: inner: expected names with values, found 3"),
        ({"name": "x", "inner": {}, "rate": "1e-3"}, "rate must be float, found '1e-3'; YAML takes .* write 1.0e-3"),
        ({"name": "x", "inner": {}, "topology": 4}, "here: topology must be str or nothing, found 4$"),
        ({"name": 5, "inner": {}}, "here: name must be str, found 5"),
    ],
)
def test_what_does_not_fit(found: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        build(Outer, found, "here")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.yaml: No such file or directory; paths are relative to"):
        read(tmp_path / "no.yaml", Outer)
    (tmp_path / "bad.yaml").write_text("{")
    with pytest.raises(ConfigError, match=r"bad\.yaml: not YAML"):
        read(tmp_path / "bad.yaml", Outer)


def test_options_win(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("name: x\ninner: {size: 4}\n")
    assert from_command(Outer, "", ["--config", str(path), "--rate", "3", "--name", "y"]) == Outer("y", Inner(4), 3.0)
    with pytest.raises(SystemExit):
        from_command(Outer, "", ["--rate", "3"])
    assert "name, inner must be given" in capsys.readouterr().err


def kind_of(name: str) -> type[Any]:
    """The dataclass of the example that a config is for."""
    if name.startswith("jax"):
        return pytest.importorskip("examples.jax_tpu_pod").Config  # type: ignore[no-any-return]
    example = {"tf_session": "examples.tf_session", "keras_fit": "examples.keras_fit"}[name]
    return pytest.importorskip(example).Config  # type: ignore[no-any-return]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_each_config_is_one(path: Path) -> None:
    read(path, kind_of(path.stem))


def test_the_pod_config_fits_its_slice() -> None:
    from ray.train import ScalingConfig

    from examples.jax_tpu_pod import Config, trainer

    local, pod = (read(CONFIGS / f"jax_{name}.yaml", Config) for name in ("local", "v6e_16"))
    chips = 16
    assert pod.model.width % chips == pod.model.sequences % chips == pod.model.width % pod.model.heads == 0
    # Ray refuses a number of workers that is not whole slices.
    scaling = trainer(pod).scaling_config
    assert scaling.num_workers == 4
    with pytest.raises(ValueError, match="must be a multiple of 4"):
        ScalingConfig(num_workers=3, use_tpu=True, topology=pod.hosts.topology, accelerator_type=pod.hosts.accelerator)
    differing = {name for name in vars(local) if getattr(local, name) != getattr(pod, name)}
    assert differing == {"storage", "hosts", "model", "steps", "save_steps", "report_steps"}


def test_the_runtime_env_brings_what_the_package_needs() -> None:
    from ray.runtime_env import RuntimeEnv

    found = yaml.safe_load((ROOT / "examples" / "runtime_env.yaml").read_text())
    RuntimeEnv(**found)
    project = (ROOT / "pyproject.toml").read_text()
    needed = re.findall(r'"(.+)"', project.split("\ndependencies = [")[1].split("\n]")[0])
    assert {need for need in needed if not need.startswith("ray")} <= set(found["pip"])

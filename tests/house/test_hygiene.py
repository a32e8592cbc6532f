"""Nothing executes what it reads: no unpickling, no evaluation of text, no unsafe YAML anywhere in the package."""

from __future__ import annotations

import ast

import pytest

from tests.house.test_style import sources

FORBIDDEN = {
    *("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"),
    *("eval", "exec", "compile", "__import__", "breakpoint"),
    *(
        "os.system",
        "os.popen",
        "yaml.load",
        "yaml.unsafe_load",
        "yaml.full_load",
        "numpy.load",
        "np.load",
        "torch.load",
    ),
}
_SHELL = "shell"


def executing(source: str, path: str) -> list[str]:
    """Imports and calls that run what they are given."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Call):
            names = [ast.unparse(node.func)]
            shell = [k.value for k in node.keywords if k.arg == _SHELL]
            names += ["os.system" for value in shell if ast.unparse(value) != "False"]
        found += [f"{path}:{node.lineno} {name}" for name in names if {name, name.partition(".")[0]} & FORBIDDEN]
    return found


def test_nothing_executes_what_it_reads() -> None:
    # Those who test stores send them to other processes themselves.
    read = [(path, text) for path, text in sources("ray_ckpt") if not path.startswith("ray_ckpt/testing/")]
    found = [v for path, text in read for v in executing(text, path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "def f(x):\n    return eval(x)",
        "exec('x')",
        "import yaml\nyaml.load(x)",
        "import numpy as np\nnp.load(x, allow_pickle=True)",
        "import subprocess\nsubprocess.run(x, shell=True)",
        "import os\nos.system(x)",
        "torch.load(x)",
        "__import__(x)",
    ],
)
def test_a_planted_execution_is_found(source: str) -> None:
    assert len(executing(source, "x")) >= 1


@pytest.mark.parametrize("source", ["import re\nre.compile(x)", "yaml.safe_load(x)", "subprocess.run(x, shell=False)"])
def test_what_is_harmless_passes(source: str) -> None:
    assert executing(source, "x") == []

"""What docs/tpu.md quotes is what the code says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import ray_ckpt.errors

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tpu.md").read_text()


def said() -> str:
    """All texts of the package, what is put into them left out."""
    found = []
    for path in (ROOT / "ray_ckpt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_messages_are_real() -> None:
    table = PAGE[PAGE.index("## 4.") : PAGE.index("## What has")]
    rows = re.findall(r"^\| (?:`(\w+)`|a warning): `([^`]+)` \|", table, re.MULTILINE)
    assert len(rows) > 15
    texts = said()
    for kind, text in rows:
        assert not kind or hasattr(ray_ckpt.errors, kind), kind
        assert text in texts, text


def test_what_it_names_is_there() -> None:
    for path in re.findall(r"`?((?:examples|deploy|tests)/[\w/.]+\w)", PAGE):
        assert (ROOT / path).exists(), path

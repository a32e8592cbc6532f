"""The documentation says what the code does, where that can be checked."""

from __future__ import annotations

import re
from pathlib import Path

from ray_ckpt.protocol.save_state import TRANSITIONS

ROOT = Path(__file__).parents[2]


def test_the_diagram_of_a_save_is_the_table() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    diagram = text[text.index("stateDiagram-v2") :]
    drawn = set(re.findall(r"^  (\w+) --> (\w+)$", diagram, re.MULTILINE))
    assert drawn == {(a, b) for a, following in TRANSITIONS.items() for b in following}


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_test_that_the_table_of_faults_names_is_there() -> None:
    text = (ROOT / "docs" / "faults.md").read_text()
    missing, file = [], None
    for path, name in re.findall(r"`(?:((?:\w+/)+test_\w+))?(?:::(test_\w+))?(?:\[\w+\])?`", text):
        if path:
            file = ROOT / "tests" / f"{path}.py"
            if not file.exists():
                missing.append(path)
                file = None
        if name and (file is None or f"def {name}(" not in file.read_text()):
            missing.append(f"{path}::{name}")
    assert not missing, missing

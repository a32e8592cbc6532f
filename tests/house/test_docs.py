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

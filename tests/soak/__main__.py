"""``python -m tests.soak``."""

from __future__ import annotations

from tests.soak.app import app

if __name__ == "__main__":
    app()

"""Entry of `make demo`: the package's modules are found from wherever this is called."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from examples.demo.app import app

    app()

"""The command ``ray-ckpt``: look at checkpoint directories, verify them, ask for a save, clean up."""

from ray_ckpt.cli.app import app, main

__all__ = ["app", "main"]

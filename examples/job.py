"""What each example does first: find the cluster that it was submitted to, and say what it does."""

from __future__ import annotations

import logging
import os

import ray


def join() -> None:
    """Connect to the cluster that runs this job. A script that was not submitted gets a Ray of its own later."""
    if "RAY_ADDRESS" in os.environ and not ray.is_initialized():
        ray.init()


def log_steps() -> logging.Logger:
    """The example's logger. It and ray_ckpt say what they do; of others only warnings are shown."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", force=True)
    for name in ("ray_ckpt", "examples"):
        logging.getLogger(name).setLevel(logging.INFO)
    return logging.getLogger("examples")

"""Hostile input for everything that reads files: mutated real ones, whose checksums are right again.

Each input must give a result or one of `ray_ckpt.errors`, in bounded time and memory, execute nothing and leave its
directory alone. Whatever else happens is a violation. ``python -m ray_ckpt.testing.fuzz --help``
"""

from ray_ckpt.testing.fuzz.run import Result, Violation, fuzz

__all__ = ["Result", "Violation", "fuzz"]

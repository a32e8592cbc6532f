"""Keras 3: callbacks for `fit` that save by a `Checkpointer`, and what they saved back into a model."""

from ray_ckpt.frontends.keras.state import load_variables

__all__ = ["load_variables"]

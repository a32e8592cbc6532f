"""The yardstick: ray_ckpt, its peers and the machine's own bounds, measured side by side."""

"""What ray_ckpt looks like in use."""

"""Reads a checkpoint with TensorFlow and nothing else: prints a JSON object with what it found.

Usage: python read_with_tensorflow.py DIRECTORY NAME...
"""

import hashlib
import json
import os
import sys

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["CUDA_VISIBLE_DEVICES"] = "-1"


def main(directory: str, names: list[str]) -> None:
    import tensorflow as tf

    prefix = tf.train.latest_checkpoint(directory)
    if prefix is None:
        sys.exit(f"TensorFlow finds no checkpoint in {directory}")
    reader = tf.train.load_checkpoint(prefix)
    shapes = reader.get_variable_to_shape_map()
    dtypes = reader.get_variable_to_dtype_map()
    tensors = {name: reader.get_tensor(name) for name in names}
    found = {
        "tensorflow": tf.__version__,
        "imported_ray_ckpt": "ray_ckpt" in sys.modules,
        "prefix": prefix,
        "tensors": len(shapes),
        "digests": {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in tensors.items()},
        "samples": [
            {
                "name": name,
                "dtype": dtypes[name].name,
                "shape": list(shapes[name]),
                "first": [round(float(x), 5) for x in value.reshape(-1)[:3]],
            }
            for name, value in tensors.items()
        ],
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

"""TensorFlow: sessions and their hooks, `tf.train.Checkpoint`, Keras."""

"""Pictures and captions, encoded once into a prepared set: the work of `train.prepare`."""

"""Architecture: the layers, linear layers, zeros and bias slots of a checkpoint, found without running it."""

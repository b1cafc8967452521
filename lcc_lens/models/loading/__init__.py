"""Loading: from a reference to a folder of weights, and from there to a plain or a hooked model."""

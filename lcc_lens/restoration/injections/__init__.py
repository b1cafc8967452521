"""Injections: small trainable modules that act on a hooked model and fold into the tensors of its checkpoint."""

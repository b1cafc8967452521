"""Training: the loop, its objectives, validation, resumable state and the activations that steps reuse."""

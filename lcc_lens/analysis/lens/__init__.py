"""Lens: what a lost component, or any vector in head-output space, says to the rest of the model."""

"""Baselines: methods of other authors, trained by the same loop on the same batches."""

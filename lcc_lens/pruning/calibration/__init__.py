"""Calibration: hidden states that stream through a model layer by layer, and what is recorded of them."""

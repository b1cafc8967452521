"""Probes: linear and kernel classifiers that tell right answers from wrong ones by a head output."""

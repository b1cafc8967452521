"""Errors, files, checkpoints on disk, settings, processes and progress, on which all other folders build."""

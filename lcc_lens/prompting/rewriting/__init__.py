"""Preferences between versions of a prompt, and the rewriter that is trained on them."""

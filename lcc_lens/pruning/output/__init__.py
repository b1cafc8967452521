"""Output: the pruned checkpoint on disk, its sliced form, and the record of how it was made."""

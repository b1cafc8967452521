"""What a command writes: held while it works, tried before the work, replaced only where this program wrote it."""

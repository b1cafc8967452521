"""Session: restore step by step in a notebook, with undo and a history that is code."""

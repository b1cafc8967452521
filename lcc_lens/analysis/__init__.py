"""Analysis: what pruning took from each head, and which heads matter most."""

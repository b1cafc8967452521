"""Scan: run the dense and the pruned model over the same tokens and summarise how their activations differ."""

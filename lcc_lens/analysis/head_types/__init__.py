"""Head types: known attention patterns and copying in the dense, the pruned and the restored model."""

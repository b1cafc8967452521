"""Methods: what each pruner decides for one layer, from scores and masks to the second-order updates."""

"""Restoration: train what the heads lost, by a method of one's choice, and freeze the result."""

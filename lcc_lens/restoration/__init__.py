"""Restoration: train an injection by a chosen method, and freeze the result."""

"""Merits and variants of prompts, how models react to them, and a rewriter trained on preferences."""

"""Data: named sets and files as examples, prompts, wrong answers, and batches of tokens."""

"""Exporters: a restoration folded into a plain Hugging Face checkpoint, a GGUF file, or kept beside the weights."""

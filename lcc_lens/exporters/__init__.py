"""Export restored models as Hugging Face directories or GGUF files, or load them without an export."""

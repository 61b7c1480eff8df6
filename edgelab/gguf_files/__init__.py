"""GGUF files: what layouts, tensors and tokenizers are called in them, for reading and for writing."""

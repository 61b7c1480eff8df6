"""What a causal language model is and how it is run: its blocks, its hidden states, its logits."""

"""Removing weights, heads, channels, layers, directions and tokens."""

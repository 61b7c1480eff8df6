"""Measuring: quality, latency and memory of a model, each defined in its own file."""

"""Benchmarks: must-hold numbers, measured beside each other in one run."""

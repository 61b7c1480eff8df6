"""A model cut into runs of layers, each on a device of its own: planned, simulated, run."""

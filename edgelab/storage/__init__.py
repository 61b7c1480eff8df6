"""How weights are stored: matrices, one format a file; the layers that hold them; variants on disk."""

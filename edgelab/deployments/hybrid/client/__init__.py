"""The edge's side of HTTP."""

"""Drafted at the edge, verified in the cloud."""

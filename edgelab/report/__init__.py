"""Rows for somebody without a notebook: one HTML file."""

from edgelab.report.page import ReportError, write

__all__ = ["ReportError", "write"]

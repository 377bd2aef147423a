"""The report of a chain as one HTML page, read from the registry alone."""

from align.report.page import write_report

__all__ = ["write_report"]

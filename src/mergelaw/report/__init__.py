"""The report of a study: tables, figures, and the HTML page that shows them."""

from mergelaw.report.page import write_report

__all__ = ["write_report"]

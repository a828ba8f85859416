"""Reports as one HTML page."""

from vmoe_torch.report.page import Figure, Report, Section, Table, write_report

__all__ = ["Figure", "Report", "Section", "Table", "write_report"]

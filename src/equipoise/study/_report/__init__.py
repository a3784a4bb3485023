"""Machinery of the report: reading a study folder, wording, theme, drawing, and the page's template, style and script."""

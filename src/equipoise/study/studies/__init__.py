"""Bundled studies, run by name."""

"""The command line: `main` and one verb per file."""

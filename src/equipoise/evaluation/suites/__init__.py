"""One suite per file; the folder is the registry."""

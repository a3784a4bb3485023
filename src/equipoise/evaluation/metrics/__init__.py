"""One metric per file; the folder is the registry."""

"""One data set or format per file; the folder is the registry."""

"""Records, files, settings, stages: what every room stands on."""

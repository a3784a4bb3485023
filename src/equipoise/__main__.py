"""`python -m equipoise`."""

from equipoise.cli.main import entry

entry()

"""Generators: prompts and sampling in, completions out."""

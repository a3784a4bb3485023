"""Generators (prompts in, completions out) and the `generate` stage."""

from equipoise.generation._stage import GenerateSettings, generate

__all__ = ["GenerateSettings", "generate"]

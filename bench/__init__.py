"""Measurements of the engine beside its rivals."""

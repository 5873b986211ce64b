"""Compares the engine with what the reference program computed: ``python -m tests.golden DIR``."""

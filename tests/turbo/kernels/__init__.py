"""Tests of the engine's parts that use the fused kernels."""

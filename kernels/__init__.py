"""Fused operations: one file each, kernel, launcher and PyTorch reference side by side."""

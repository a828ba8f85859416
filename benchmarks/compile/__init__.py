"""Kernels without a GPU."""

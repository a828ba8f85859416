"""Benchmarks and compile checks of vmoe_kernels; README.md has the protocol."""

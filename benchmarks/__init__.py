"""Benchmarks of mtj_loader against the hardware's limit and other loaders; see README.md."""

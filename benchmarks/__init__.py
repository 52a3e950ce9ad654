"""Measurements of mtj_loader against the hardware and against its peers; see README.md."""

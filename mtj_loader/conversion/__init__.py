"""Checkpoints written in another dtype, from files to files; no model and no device."""

"""Conversion of a checkpoint to another dtype, from files to files; no model and no device."""

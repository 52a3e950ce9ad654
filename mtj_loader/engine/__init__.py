"""Runs many requests on one model: a scheduler on the host, a few programs on the devices."""

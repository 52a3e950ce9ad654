"""Chooses tokens: the settings of a request, the samplers, and the random choice."""

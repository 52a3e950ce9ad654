"""Malformed input, made by changing sound files at random; `make fuzz` runs it.

Every variant must be refused with one of our errors, or load what its files say.
"""

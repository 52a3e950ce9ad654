"""Reads checkpoints: files become records of where each tensor lies, and bytes on request."""

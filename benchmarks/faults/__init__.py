"""Injected faults: what the user sees, how soon, and what is left behind."""

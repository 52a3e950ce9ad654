"""The load plan: what will be read, by which host, and where it will go."""

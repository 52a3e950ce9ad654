"""The Haiku modules that families consist of."""

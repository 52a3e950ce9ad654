"""The Haiku modules that families are composed of."""

"""The programs that generate text and are compared; each in a module of its own."""

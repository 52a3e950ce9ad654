"""The load plan: what is read, by which device, and where it goes; and how it is shown."""

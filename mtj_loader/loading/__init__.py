"""From a plan to parameters on devices: what is read, how it is put together, where it goes."""

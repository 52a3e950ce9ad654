"""Executes a load plan.

`schedule` lists what this host reads, `stream` reads it into `buffers`, `placement` transfers the
buffers to the devices, and `reshard` exchanges blocks between hosts. `load_params` runs all of it.
"""

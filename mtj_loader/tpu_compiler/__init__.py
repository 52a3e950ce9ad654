"""What the TPU compiler says about a model's programs, on any machine with libtpu."""

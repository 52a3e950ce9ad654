"""Converting checkpoints to another dtype, from files to files, without a model or device."""

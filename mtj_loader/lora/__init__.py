"""LoRA adapters: their files, their factors, and how they are added to weights."""

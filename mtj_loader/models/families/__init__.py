"""One module per model family, named after the `model_type` of config.json."""

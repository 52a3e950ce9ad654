"""Text from a loaded model: tokenizer, samplers, stopping, and the decode loop."""

"""From tensors to parameters: views, weight maps, transforms, and merging."""

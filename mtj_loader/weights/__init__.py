"""Weight maps and views: which elements of which tensors a parameter is made of."""

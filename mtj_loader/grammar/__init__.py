"""Text that follows a grammar or a JSON schema: which tokens may come next."""

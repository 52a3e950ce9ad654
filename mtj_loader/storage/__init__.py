"""Where bytes come from: local folders, Hugging Face repositories, object stores; new folders."""

"""From files and the Hugging Face Hub to state dicts."""

"""Prompts: the text encoders and the embeddings they make."""

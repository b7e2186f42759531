"""What a run is given: the picture as latents, the prompt as embeddings; and their spaces."""

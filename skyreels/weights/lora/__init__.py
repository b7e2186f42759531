"""LoRA: files of small changes to the transformer's weights, read in every dialect, and applied."""

"""The HunyuanVideo causal video VAE and its tiled decoding."""

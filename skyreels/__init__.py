"""SkyReels-V1 image-to-video: checkpoints, transformer, VAE, sampling. No ComfyUI in here."""

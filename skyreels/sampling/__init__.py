"""From noise to latents: schedule, guidance, what a step may skip, and resuming."""

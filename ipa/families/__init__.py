"""Frozen base models, one file per family: VAE, text encoders, denoiser, noise schedule, and the hosts for branches."""

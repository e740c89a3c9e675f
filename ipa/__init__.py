"""ipa: train, evaluate and export IP-Adapters (image prompts for text-to-image diffusion models; Ye et al. 2023)."""

__version__ = "0.1.0"

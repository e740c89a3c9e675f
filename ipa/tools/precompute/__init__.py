"""Precompute VAE latents and CLIP features: shards of pictures in, feature shards out."""

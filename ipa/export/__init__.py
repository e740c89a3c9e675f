"""Published file layouts: what diffusers, ComfyUI and the original code read."""

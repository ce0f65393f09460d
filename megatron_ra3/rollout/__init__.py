"""Sampling of latents: engines, the sampler, the fleet and weight sync."""

"""RA3 mid-training (Reasoning as Action Abstractions, arXiv 2509.25810) on Megatron-Core."""

__version__ = "0.1.0"

"""Fused log-likelihood kernels. `linear_logprob` is the only public name."""

from megatron_ra3.kernels.reference import linear_logprob

__all__ = ["linear_logprob"]

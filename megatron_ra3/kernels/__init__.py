"""Fused log-likelihood kernels. `linear_logprob` is the one function that the rest of the package calls."""

from megatron_ra3.kernels.linear_logprob import HeadCache, Precision, linear_logprob

__all__ = ["HeadCache", "Precision", "linear_logprob"]

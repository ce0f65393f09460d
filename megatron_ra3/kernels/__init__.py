"""Fused log-likelihood kernels (docs/kernels.md); `linear_logprob` is what the rest of the package calls."""

from megatron_ra3.kernels.fp8 import HeadCache
from megatron_ra3.kernels.linear_logprob import Precision, linear_logprob

__all__ = ["HeadCache", "Precision", "linear_logprob"]

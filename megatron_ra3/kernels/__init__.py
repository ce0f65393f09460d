"""Fused log-likelihood kernels (docs/kernels.md); the rest of the package calls the two functions named here."""

from megatron_ra3.kernels.fp8 import HeadCache
from megatron_ra3.kernels.linear_cross_entropy import linear_cross_entropy
from megatron_ra3.kernels.linear_logprob import linear_logprob
from megatron_ra3.kernels.problem import Precision

__all__ = ["HeadCache", "Precision", "linear_cross_entropy", "linear_logprob"]

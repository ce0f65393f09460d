"""How measured numbers grow: the exponents by which T2 and T3 compare a measurement with its bound."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mdp import Array


def exponent(x: Sequence[float], y: Array) -> Array:
    """Least-squares slope of log y against log x; `y` [..., len(x)], both positive."""
    centred = np.log(x) - np.mean(np.log(x))
    return np.log(y) @ centred / (centred @ centred)

"""How long a random action lasts before the first update.

Play that draws every action anew hardly leaves where it is: in Freeway it never crosses the road. A random action kept
up for a random number of steps does, and a heavy tail of that number serves games of any time scale (Dabney, Ostrovski
and Barreto 2021, arXiv 2006.01782: zeta-distributed durations).
"""

from __future__ import annotations

import numpy as np

from drama_jax import checks


def duration_table(exponent: float, longest: int) -> np.ndarray:
    """Cumulative probabilities [longest] float64 of durations 1..longest, each proportional to n^-exponent.

    Args:
      exponent: mu, 0 or more; the larger, the shorter.
      longest: the longest duration, in steps.
    """
    checks.numbers("exploration.duration_table", 0, exponent=exponent)
    checks.integers("exploration.duration_table", longest=longest)
    weights = np.arange(1, longest + 1, dtype=np.float64) ** -exponent
    return np.cumsum(weights) / weights.sum()

"""Amounts of relevance that were absorbed, by cause."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from jlrp.rules.base import Causes


def summed(causes: Sequence[Causes]) -> Causes:
    totals: Causes = {}
    for cause in causes:
        for name, amount in cause.items():
            amount = jnp.real(jnp.sum(amount))
            totals[name] = totals[name] + amount if name in totals else amount
    return totals

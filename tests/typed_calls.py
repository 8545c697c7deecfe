"""What type checkers see of the public functions: pyright reads this, nothing runs it.

An ignore that pyright has no use for is an error: what must be refused is refused.
"""
# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from typing import assert_type

import jax

import jlrp
from jlrp import reports


def fn(params: jax.Array, x: jax.Array) -> jax.Array:
    return x @ params


def calls(w: jax.Array, x: jax.Array) -> None:
    jlrp.relevance(fn, w, x)
    jlrp.relevance(fn, w, x, 3, composite="epsilon", wrt=("x", "params"))
    jlrp.relevance(fn=fn, params=w, x=x, target=3, memory_limit=10)
    jlrp.relevance(fn, w, x, composit="epsilon")  # pyright: ignore[reportCallIssue]
    jlrp.relevance(fn, w, x, seed=3)  # pyright: ignore[reportArgumentType]
    jlrp.relevance(fn, w, x, capture="a")  # pyright: ignore[reportCallIssue]
    jlrp.relevance(fn, w)  # pyright: ignore[reportCallIssue]

    explain = jlrp.explain(fn, capture="a/*", capture_steps=3)
    assert_type(explain, jlrp.Explainer)
    assert_type(explain(w, x), jlrp.Explanation)
    assert_type(explain.composite, jlrp.Composite)
    assert_type(explain.capture, tuple[str, ...])
    jlrp.explain(fn, "epsilon")  # pyright: ignore[reportCallIssue]
    jlrp.explain(fn, capture_steps="3")  # pyright: ignore[reportArgumentType]

    assert_type(jlrp.inspect(fn, w, x, residuals="sqrt"), reports.Inspection)
    assert_type(jlrp.audit(fn, w, x, seed="one"), reports.Ledger)
    jlrp.inspect(fn, w, x, seed="one")  # pyright: ignore[reportCallIssue]

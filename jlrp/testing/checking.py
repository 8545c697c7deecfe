"""``check_spellings``: a program beside its twins, under several composites."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jlrp import _jax
from jlrp import api
from jlrp.arguments import check_function, shown
from jlrp.composites import Composite, resolve
from jlrp.errors import InputError, JlrpError, JlrpWarning
from jlrp.reports import Table
from jlrp.testing import calls, dense, functions, movement, products, sums  # noqa: F401
from jlrp.testing.evaluating import leaves_of
from jlrp.testing.rewriting import REWRITINGS, Function, Rewriting, Rewritten

COMPOSITES = (
    "auto",
    "attnlrp",
    "cp_lrp",
    "dynamic_lrp",
    "epsilon",
    "epsilon_plus_flat",
    "excitation_backprop",
    "gradient_input",
)


class SpellingError(JlrpError, AssertionError):
    """Two spellings of one function have two explanations."""


@dataclass(frozen=True)
class Twin:
    """A program in other words: ``twin(params, x)`` is ``fn(params, x)``.

    Attributes:
      name: of the rewriting.
      family: of the rewriting.
      summary: what is written in other words.
      fn: the rewritten function.
      sites: where, as (primitive, place); empty if it is the function as a whole.
    """

    name: str
    family: str
    summary: str
    fn: Function
    sites: tuple[tuple[str, str], ...]

    def __call__(self, params: Any, x: Any) -> Any:
        return self.fn(params, x)


def chosen(kinds: str | Collection[str] | None) -> list[Rewriting]:
    """The rewritings of some names or families.

    Raises:
      InputError: for a name that is none.
    """
    if kinds is None:
        return list(REWRITINGS.values())
    asked = [kinds] if isinstance(kinds, str) else list(kinds)
    families = {r.family for r in REWRITINGS.values()}
    for kind in asked:
        if kind not in REWRITINGS and kind not in families:
            raise InputError(
                f"kinds names {shown(kind)}, which is no rewriting. Give names of "
                f"jlrp.testing.kinds(), or families: {sorted(families)}."
            )
    return [r for r in REWRITINGS.values() if {r.name, r.family} & set(asked)]


def twins(
    fn: Function, params: Any, x: Any, kinds: str | Collection[str] | None = None
) -> dict[str, Twin]:
    check_function(fn)
    found = {}
    for kind in chosen(kinds):
        if kind.whole is not None:
            function, sites = kind.whole(fn, params, x), ()
        else:
            function = Rewritten(fn, kind)
            sites = tuple(function.program(params, x)[2])
            function = function if sites else None
        if function is not None:
            found[kind.name] = Twin(
                kind.name, kind.family, kind.summary, function, sites
            )
    return found


@dataclass(frozen=True)
class SpellingRow:
    twin: str
    composite: str
    error: float
    status: str
    operation: str = ""
    where: str = ""


def relevance(fn, params, x, composite, target=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", JlrpWarning)
        return leaves_of(
            lambda params, x: api.relevance(fn, params, x, target, composite=composite),
            params,
            x,
        )


def difference(found, wanted) -> float:
    largest = max((float(np.max(np.abs(w), initial=0)) for w in wanted), default=0.0)
    off = max(
        float(np.max(np.abs(a - b), initial=0.0)) for a, b in zip(found, wanted, strict=True)
    )
    return off / largest if largest else off

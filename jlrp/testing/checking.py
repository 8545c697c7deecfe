"""``twins`` and ``check_spellings``: a program beside itself in other words."""

from __future__ import annotations

import textwrap
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from jlrp import api, arguments
from jlrp.arguments import check_function, shown, takes
from jlrp.composites import Composite, resolve
from jlrp.errors import InputError, JlrpWarning, SpellingError
from jlrp.ir import jax_compat
from jlrp.reports.inspection import OperationRow
from jlrp.reports.table import Table
from jlrp.testing.evaluating import leaves_of
from jlrp.testing.points import check_point
from jlrp.testing.rewriting import (
    REWRITINGS,
    Rewriting,
    Rewritten,
    equations,
    where,
)
from jlrp.typing import Function, PyTree, Target

COMPOSITES = (
    *("attnlrp", "auto", "cp_lrp", "dynamic_lrp", "epsilon", "epsilon_plus_flat"),
    *("excitation_backprop", "gradient_input"),
)
Composites = Iterable[str | Composite] | Mapping[str, str | Composite]
Kinds = str | Collection[str] | None
_NARROW = 1e-4  # the least tolerance for programs that compute in fewer than 64 bits
_SITES = 64  # of one rewriting that are tried alone, to find where it differs


@dataclass(frozen=True)
class Twin:
    """A program in other words: ``twin(params, x)`` is ``fn(params, x)``.

    Attributes:
      rewriting: what is written in other words.
      fn: the rewritten function.
      sites: where, as (primitive, place); none if it is the function as a whole.
    """

    rewriting: Rewriting
    fn: Function
    sites: tuple[tuple[str, str], ...] = ()

    def __call__(self, params: PyTree, x: PyTree) -> PyTree:
        return self.fn(params, x)

    @property
    def name(self) -> str:
        return self.rewriting.name

    @property
    def summary(self) -> str:
        """What is written in other words, in a line."""
        return self.rewriting.summary

    def documented(self, composite: str | Composite) -> str | None:
        """Why relevance may differ under a composite, by the documented list."""
        return self.rewriting.documented(resolve(composite))


def kinds() -> dict[str, Rewriting]:
    """The rewritings that there are, by name.

    Returns:
      A dict of ``Rewriting``, each with its ``family`` and a ``summary``.

    Example:
      >>> from jlrp import testing
      >>> testing.kinds()["logistic_spelt_out"].family
      'functions'
    """
    return dict(REWRITINGS)


def chosen(kinds: Kinds) -> list[Rewriting]:
    """The rewritings of some names or families.

    Raises:
      InputError: for a name that is neither.
    """
    if kinds is None:
        return list(REWRITINGS.values())
    asked = {kinds} if isinstance(kinds, str) else set(kinds)
    families = {r.family for r in REWRITINGS.values()}
    for kind in asked - families - set(REWRITINGS):
        raise InputError(
            f"kinds names {shown(kind)}, which is no rewriting. Give names of "
            f"jlrp.testing.kinds(), or of their families: {sorted(families)}."
        )
    return [r for r in REWRITINGS.values() if {r.name, r.family} & asked]


@takes()
def twins(
    fn: Function, params: PyTree, x: PyTree, *, kinds: Kinds = None
) -> dict[str, Twin]:
    """The same function in other words, once for each rewriting that applies.

    Every rewriting is used wherever it can be at once, in calls, loops and branches
    too. A twin is a function like any other: it runs under ``jit``, ``vmap`` and
    ``grad``, takes other values and shapes, and keeps the source lines of ``fn``.

    Args:
      fn: ``fn(params, x) -> scores``: any JAX function.
      params: pytree of arrays.
      x: pytree of arrays.
      kinds: names or families of rewritings, see ``jlrp.testing.kinds``; None: all.

    Returns:
      A dict of ``Twin`` by the name of the rewriting, without those that find nothing
      to write in other words.

    Raises:
      InputError: if ``fn`` is no function or raises, or a kind is unknown.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jlrp import testing
      >>> fn = lambda w, x: jax.nn.sigmoid(x @ w)
      >>> w, x = jnp.array([1.0, -2.0]), jnp.array([0.5, 0.25])
      >>> twin = testing.twins(fn, w, x)["logistic_spelt_out"]
      >>> print(jax.make_jaxpr(twin)(w, x).eqns[-1].primitive)
      div
      >>> bool(jnp.allclose(twin(w, x), fn(w, x)))
      True
    """
    check_function(fn)
    arguments.output_of(fn, params, x)
    found = (_twin(fn, params, x, rewriting) for rewriting in chosen(kinds))
    return {twin.name: twin for twin in found if twin is not None}


def _twin(
    fn: Function,
    params: PyTree,
    x: PyTree,
    rewriting: Rewriting,
    only: Sequence[int] | None = None,
) -> Twin | None:
    if rewriting.whole is not None:
        whole = rewriting.whole(fn, params, x)
        return None if whole is None else Twin(rewriting, whole)
    function = Rewritten(fn, rewriting, only)
    sites = function.program(params, x)[2]
    return Twin(rewriting, function, tuple(sites)) if sites else None


@dataclass(frozen=True)
class SpellingRow:
    """One twin under one composite.

    Attributes:
      twin: the name of the rewriting.
      composite: the name of the composite.
      status: ``equal``; ``differs``; ``raises``: jlrp explains the function, and not
        the twin; ``documented``: it differs, and may.
      error: the largest difference of relevance, as a share of the largest relevance;
        NaN if the twin's was not found.
      operation: what is read in another way, as ``inspect`` calls it.
      where: name scope and source line of the first equation whose other spelling
        alone makes the difference; empty if that takes several.
      why: what the twin raised, or the documented reason.
    """

    twin: str
    composite: str
    status: str
    error: float
    operation: str = ""
    where: str = ""
    why: str = ""


@dataclass(frozen=True, repr=False)
class Spellings(Table):
    """What ``check_spellings`` found: true if no spelling makes a difference.

    Attributes:
      rows: one for each twin and composite.
    """

    rows: tuple[SpellingRow, ...]

    @property
    def differences(self) -> tuple[SpellingRow, ...]:
        """The rows that differ, or raise, and are not documented."""
        return tuple(r for r in self.rows if r.status in ("differs", "raises"))

    @property
    def ok(self) -> bool:
        return not self.differences

    def __bool__(self) -> bool:
        return self.ok

    def raise_if_different(self) -> None:
        """For tests.

        Raises:
          SpellingError: with the table, if a spelling makes a difference.
        """
        if not self.ok:
            raise SpellingError(
                f"{self}\nA spelling of fn has another explanation. Keep to one of the "
                "two where you can, and report the table as a fault of jlrp."
            )

    def _title(self) -> str:
        counts = Counter(row.status for row in self.rows)
        names = [len({getattr(r, n) for r in self.rows}) for n in ("twin", "composite")]
        found = ", ".join(
            f"{counts[status]} {word}"
            for status, word in _STATUS.items()
            if counts[status] or status == "differs"
        )
        return f"{names[0]} twins, {names[1]} composites: {found}"

    def _cells(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        header = ("twin", "composite", "error", "operation", "where")
        return header, [
            (
                row.twin,
                row.composite,
                row.status if np.isnan(row.error) else f"{row.error:.1e}",
                row.operation or textwrap.shorten(row.why, 60),
                row.where if row.status != "documented" else f"[{row.why}]",
            )
            for row in self.rows
            if row.status != "equal"
        ]

    def __str__(self) -> str:
        return super().__str__() if self._cells()[1] else self._title()

    __repr__ = __str__


_STATUS = {"differs": "differ", "raises": "raise", "documented": "documented"}


@takes()
def check_spellings(
    fn: Function,
    params: PyTree,
    x: PyTree,
    target: Target = None,
    *,
    composites: Composites = COMPOSITES,
    kinds: Kinds = None,
    tolerance: float = 1e-9,
    margin: float = 1e-3,
    locate: bool = True,
) -> Spellings:
    """Whether relevance depends on how ``fn`` is written.

    Explains ``fn`` and each of its ``twins`` under some composites, in float64, and
    lists where they differ. Small models and inputs will do: what is read of a program
    does not depend on sizes.

    Args:
      fn: ``fn(params, x) -> scores``: any JAX function.
      params: pytree of arrays; float32 is widened.
      x: pytree of arrays; float32 is widened.
      target: what is explained, as in ``jlrp.relevance``.
      composites: names of presets or ``Composite`` values, or a dict of these by name.
      kinds: names or families of rewritings, see ``jlrp.testing.kinds``; None: all.
      tolerance: the largest difference, as a share of the largest relevance, that is
        equal. At least 1e-4 if fn itself casts to narrower floats.
      margin: how far x must be from kinks and zero denominators, where spellings may
        choose different sides; 0: anywhere.
      locate: whether to look for the equation that makes a difference, by trying each
        alone.

    Returns:
      A ``Spellings``: a table of what differs and where, true if nothing does.

    Raises:
      InputError: if ``x`` is near a kink, ``fn`` computes in narrower floats than the
        tolerance asks for, or an argument does not fit.
      JlrpError: what ``jlrp.relevance`` raises for ``fn`` itself.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jlrp import testing
      >>> fn = lambda w, x: jax.nn.relu(x @ w).sum(-1)
      >>> w, x = jnp.array([[1.0, -2.0], [0.5, 1.0]]), jnp.array([[3.0, 1.0]])
      >>> bool(testing.check_spellings(fn, w, x, kinds="calls", composites=["attnlrp"]))
      True
    """
    check_function(fn)
    arguments.number(0)("tolerance", tolerance)
    arguments.number(0)("margin", margin)
    named = _named(composites)
    with jax_compat.double_precision():
        params, x, target = jax.tree.map(_widened, (params, x, target))
        arguments.output_of(fn, params, x)
        _check_width(fn, params, x, tolerance)
        check_point(fn, params, x, margin)
        checker = _Checker(fn, params, x, target, named, tolerance, locate)
        rows = [row for kind in chosen(kinds) for row in checker.rows(kind)]
    return Spellings(tuple(rows))


def _named(composites: Composites) -> dict[str, Composite]:
    if isinstance(composites, str | Composite):
        composites = [composites]
    if isinstance(composites, Mapping):
        return {str(name): resolve(c) for name, c in composites.items()}
    named = enumerate(composites)
    return {c if isinstance(c, str) else f"composite {i}": resolve(c) for i, c in named}


def _widened(leaf: PyTree) -> PyTree:
    """A float32 array in float64; a function or a name as it is."""
    if not hasattr(leaf, "dtype") or not jax_compat.is_inexact(leaf):
        return leaf
    is_complex = jnp.issubdtype(leaf.dtype, np.complexfloating)
    return jnp.asarray(leaf, np.complex128 if is_complex else np.float64)


def _check_width(fn: Function, params: PyTree, x: PyTree, tolerance: float) -> None:
    if tolerance >= _NARROW:
        return
    for eqn in equations(jax.make_jaxpr(fn)(params, x)):
        for var in eqn.outvars:
            dtype = jax_compat.shape_of(var).dtype
            if jnp.issubdtype(dtype, np.inexact) and jnp.finfo(dtype).eps > 1e-15:
                raise InputError(
                    f"fn computes in {dtype} at {where(eqn)}, whatever it is "
                    f"given; spellings are then equal to its rounding at best. Pass "
                    f"tolerance={_NARROW:g} or more, or make fn follow the dtype of x."
                )


class _Checker:
    """The twins of one function at one point, beside the function."""

    def __init__(
        self,
        fn: Function,
        params: PyTree,
        x: PyTree,
        target: Target,
        composites: Mapping[str, Composite],
        tolerance: float,
        locate: bool,
    ):
        self.locate = locate
        self.fn, self.params, self.x, self.target = fn, params, x, target
        self.composites, self.tolerance = composites, tolerance
        self.value = leaves_of(fn, params, x)
        self.wanted = {name: self.explained(fn, name) for name in composites}

    def explained(self, fn: Function, name: str) -> list[np.ndarray]:
        composite = self.composites[name]

        def relevance(params: PyTree, x: PyTree) -> PyTree:
            return api.relevance(fn, params, x, self.target, composite=composite)

        with warnings.catch_warnings():  # of the function, where it is explained
            warnings.simplefilter("ignore", JlrpWarning)
            return leaves_of(relevance, self.params, self.x)

    def rows(self, kind: Rewriting) -> Iterator[SpellingRow]:
        twin = _twin(self.fn, self.params, self.x, kind)
        if twin is None:
            return
        self._check_value(twin)
        alone: Twin | None = None
        for name in self.composites:
            row = self._compared(twin, name)
            if row.status in ("differs", "raises") and self.locate:
                if alone is None or self._compared(alone, name).status == "equal":
                    alone = self._smallest(twin, name)
                place = alone.sites[0][1] if len(alone.sites) == 1 else ""
                operation = self._read_differently(alone, name)
                row = replace(row, operation=operation, where=place)
            yield row

    def _check_value(self, twin: Twin) -> None:
        found = leaves_of(twin, self.params, self.x)
        if not _distance(found, self.value) <= max(self.tolerance, 1e-10):
            raise SpellingError(
                f"The twin {twin.name!r} computes another value than fn: a fault of "
                "jlrp.testing, not of fn. Leave it out by kinds=, and report it."
            )

    def _compared(self, twin: Twin, name: str) -> SpellingRow:
        try:
            found = self.explained(twin, name)
        except Exception as error:  # whatever it raises, fn did not
            why = f"{type(error).__name__}: {arguments.first_lines(error)}"
            return SpellingRow(twin.name, name, "raises", np.nan, why=why)
        error = _distance(found, self.wanted[name])
        if error <= self.tolerance:
            return SpellingRow(twin.name, name, "equal", error)
        if reason := twin.documented(self.composites[name]):
            return SpellingRow(twin.name, name, "documented", error, why=reason)
        return SpellingRow(twin.name, name, "differs", error)

    def _smallest(self, twin: Twin, name: str) -> Twin:
        """The first site that alone makes the difference; all sites if none does."""
        for n, site in enumerate(twin.sites[:_SITES]):
            function = Rewritten(self.fn, twin.rewriting, [n])
            alone = Twin(twin.rewriting, function, (site,))
            if self._compared(alone, name).status != "equal":
                return alone
        return twin

    def _read_differently(self, twin: Twin, name: str) -> str:
        """The operations that ``inspect`` shows for one of the two only."""
        try:
            of_fn, of_twin = (self._operations(fn, name) for fn in (self.fn, twin))
        except Exception:  # where the twin raises, so may its inspection
            return ""
        lost, new = of_fn - of_twin, of_twin - of_fn
        if not lost and not new:
            return ""
        return f"{_listed(lost)} -> {_listed(new)}"

    def _operations(self, fn: Function, name: str) -> Counter[tuple[str, ...]]:
        report = api.inspect(
            fn, self.params, self.x, self.target, composite=self.composites[name]
        )
        return Counter(map(_reading, report.operations))


def _reading(row: OperationRow) -> tuple[str, ...]:
    return (row.kind, row.rule, *row.facts)


def _listed(readings: Counter[tuple[str, ...]]) -> str:
    kinds = [kind for kind, *_ in readings.elements() if kind != "movement"]
    return ", ".join(kinds) or "nothing"


def _distance(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
    """The largest difference, as a share of the largest number."""
    largest, off = 0.0, 0.0
    for a, b in zip(found, wanted, strict=True):
        same = (a == b) | (np.isnan(a) & np.isnan(b)) if _is_float(a) else a == b
        with np.errstate(invalid="ignore"):
            apart = np.where(same, 0.0, np.abs(a - b)) if _is_float(a) else ~same
        off = max(off, float(np.max(apart, initial=0.0)))
        finite = np.abs(b[np.isfinite(b)]) if _is_float(b) else np.ones(1)
        largest = max(largest, float(np.max(finite, initial=0.0)))
        if np.isnan(off):
            return np.inf
    return off / largest if largest else off


def _is_float(array: np.ndarray) -> bool:
    return np.issubdtype(array.dtype, np.inexact)

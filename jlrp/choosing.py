"""The composite that says most about a model of the user's own, measured on its data.

A choice by a measurement overfits to the examples that it is made on: they are split in
two, the best is chosen on one half, and compared with the default on the other.
"""

# JAX types its functions in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import contextlib
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jlrp import arguments, composites, references
from jlrp.api import inspect, relevance
from jlrp.arguments import shown, takes
from jlrp.composites import FALLBACKS, Composite, gamma_by_depth, resolve
from jlrp.errors import InputError, IntegrationError, RuleError, SelectorError
from jlrp.metrics.intervals import Interval, interval
from jlrp.metrics.parts import PARTS, POOLS, Parts, features, tokens
from jlrp.metrics.perturbation import curves
from jlrp.metrics.removal import REMOVAL, Constant, Inpaint, Removal
from jlrp.metrics.scoring import SCORES, Callee, Score, split_target
from jlrp.plan import targets
from jlrp.references import Baseline
from jlrp.reports.table import Table
from jlrp.typing import Array, Function, PyTree, Target

if TYPE_CHECKING:
    from jlrp.plotting.drawing import Picture

__all__ = ["Chosen", "Measured", "choose"]

Candidates = Mapping[str, str | Composite] | Sequence[str] | None


@dataclass(frozen=True, repr=False)
class Measured:
    """One composite on the half that the choice was made on.

    Attributes:
      name: of the composite.
      composite: what was measured.
      also: names of others that give every operation the same rule.
      abpc: its area between the curves, high is good.
      gap: what that is more than the default's, on the same examples.
    """

    name: str
    composite: Composite
    also: tuple[str, ...]
    abpc: Interval
    gap: Interval


@dataclass(frozen=True, repr=False)
class Chosen(Table):
    """What ``choose`` found: a table that prints.

    Attributes:
      composite: the best on one half of the examples, for ``composite=``.
      name: its name among the candidates.
      gap: what its ABPC is more than the default's, on the other half; None if it is
        the default.
      rows: what was measured on the first half, the best first.
      default: the name of what it is compared with.
      examples: how many each half has.
      left_out: candidates for which there was no time.
    """

    composite: Composite
    name: str
    gap: Interval | None
    rows: tuple[Measured, ...]
    default: str
    examples: int
    left_out: tuple[str, ...] = ()

    @property
    def is_within_noise(self) -> bool:
        """Whether the other half does not tell the best from the default."""
        return self.gap is None or self.gap.low <= 0 <= self.gap.high

    @property
    def verdict(self) -> str:
        """A sentence: whether the choice holds on the other half."""
        if self.gap is None:
            return f"{self.default} is the best of those measured."
        found = f"On {self.examples} other examples {self.name} has {self.gap} more"
        if self.is_within_noise:
            return f"{found} than {self.default}: within noise, {self.default} will do."
        if self.gap.high < 0:
            return f"{found} than {self.default}: the choice does not hold."
        return f"{found} than {self.default}: the choice holds."

    def plot(self) -> Picture:
        """The candidates with their intervals, as a picture.

        Raises:
          IntegrationError: when it is drawn, if matplotlib is missing.
        """
        from jlrp.plotting import intervals

        return intervals({row.name: row.abpc for row in self.rows}, axis="ABPC")

    def _title(self) -> str:
        return f"composites on {self.examples} examples, by ABPC"

    def _cells(self) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
        header = ("composite", "ABPC", f"more than {self.default}")
        rows = [(row.name, str(row.abpc), str(row.gap)) for row in self.rows]
        return header, rows

    def _footer(self) -> str:
        alike = [
            f"{row.name} is here what these are: {', '.join(row.also)}."
            for row in self.rows
            if row.also
        ]
        missing = f"Not measured, for lack of time: {', '.join(self.left_out)}."
        return "\n".join([*alike, *([missing] if self.left_out else []), self.verdict])


def _candidates(name: str, value: object) -> None:
    """Names of presets, or composites by name."""
    if value is None:
        return
    is_named = isinstance(value, Mapping)
    is_listed = isinstance(value, tuple | list)
    if not (is_named or is_listed) or not value:
        raise InputError(
            f"{name} is {shown(value)}; give names of presets, or a dict of composites "
            'by name, such as {"mine": jlrp.Composite(...)}.'
        )
    for key, composite in _by_name(value).items():
        arguments.text(name, key)
        resolve(composite, f"{name}[{key!r}]")


def _baseline(name: str, value: Baseline) -> None:
    references.check(name, value)


def _by_name(given: Any) -> dict[str, Any]:
    return dict(given) if isinstance(given, Mapping) else {n: n for n in given}


@takes(
    fn=arguments.function,
    params=arguments.tree,
    x=arguments.batch,
    target=targets.check_kind,
    parts=arguments.optional(PARTS),
    removal=REMOVAL,
    candidates=_candidates,
    baseline=_baseline,
    seconds=arguments.optional(arguments.number(0)),
    steps=arguments.whole(1),
    pool=arguments.choice(*POOLS),
    score=arguments.choice(*SCORES),
    batch=arguments.whole(1),
    seed=arguments.whole(0),
    fallback=arguments.optional(arguments.choice(*FALLBACKS)),
    progress=arguments.flag,
)
def choose(
    fn: Function,
    params: PyTree,
    x: PyTree,
    target: Target = None,
    *,
    parts: Parts | None = None,
    removal: Removal | Inpaint = Constant(0),  # noqa: B008  (a frozen value)
    candidates: Candidates = None,
    baseline: Baseline = None,
    seconds: float | None = None,
    steps: int = 16,
    pool: str = "sum",
    score: str = "probability",
    batch: int = 64,
    seed: int = 0,
    fallback: str | None = None,
    progress: bool = False,
) -> Chosen:
    """Measure composites on a model and its data, and say whether the best one is.

    Half of the examples are explained by each composite; its relevance is measured by
    the area between the perturbation curves (ABPC, see ``jlrp.metrics.curves``). The
    best one and the default, ``"auto"``, are compared on the other half, by a paired
    interval. All is refused before any work that does not fit.

    Args:
      fn, params: as in ``jlrp.relevance``. What belongs to single examples (a mask)
        cannot be divided with them here: choose on examples without.
      x: one array of shape (batch, ...), at least 4 examples; of an odd number one is
        left out. A hundred tell differences of a few hundredths.
      target: as in ``jlrp.relevance``; arrays of a number per example are divided.
      parts: what is removed together, as in ``jlrp.metrics.curves``. None: each element
        of x of shape (batch, features), each position of (batch, length, width).
      removal: what takes its place: the choice is for this removal.
      candidates: names of presets, or composites by name. None: the presets, and some
        with other parameters; those that are one on this program are measured once.
      baseline: as in ``jlrp.relevance``: composites are chosen for it. Often best where
        it is what the removal leaves: ``baseline=removal``.
      seconds: no other candidate is begun after so many; those left out are listed. The
        default is first, and the comparison is always made.
      steps: points of a curve, less one.
      pool, score: as in ``jlrp.metrics.curves``.
      batch: how many examples are explained at once, at most.
      seed: of the division in halves.
      fallback: as in ``jlrp.relevance``.
      progress: show a progress bar, by tqdm.

    Returns:
      A ``Chosen``: the best composite, a table, a picture.

    Raises:
      InputError, TargetError: for what does not fit, before any work.
      SelectorError, RuleError: for candidates that do not fit the program.
      IntegrationError: for a progress bar without tqdm.

    Example:
      >>> import jax, jax.numpy as jnp, jlrp
      >>> fn = lambda w, x: jax.nn.relu(x @ w) @ w.T
      >>> w = jax.random.normal(jax.random.key(0), (4, 3))
      >>> x = jax.random.normal(jax.random.key(1), (20, 4))
      >>> chosen = jlrp.choose(fn, w, x, candidates=["epsilon", "excitation_backprop"])
      >>> [row.name for row in chosen.rows][-1]
      'excitation_backprop'
    """
    count = _check_x(x)
    parts = _parts_of(x) if parts is None else parts
    parts.for_batch(np.shape(x))
    static, traced = split_target(target)
    Score(Callee(fn), score, static).check(params, x, traced)
    if not targets.is_static(target):
        target = targets.fitting(arguments.output_of(fn, params, x), target)
    measuring = _Measuring(
        (fn, params),
        _Examples(x, target, parts, baseline, count),
        {"steps": steps, "pool": pool, "score": score, "removal": removal},
        fallback,
        batch,
    )
    given = _presets(x) if candidates is None else _by_name(candidates)
    groups = measuring.apart(given, strict=candidates is not None)
    order = np.random.default_rng(seed).permutation(count)
    first, second = order[: count // 2], order[-(count // 2) :]
    with _bar(len(groups) + 2, progress) as bar:
        found = measuring.each(groups, first, seconds, bar)
        best = max(found, key=lambda name: found[name].mean())
        gap = None
        if best != _DEFAULT:
            pair = {name: groups[name] for name in (best, _DEFAULT)}
            again = measuring.each(pair, second, None, bar)
            gap = interval(again[best] - again[_DEFAULT])
    return Chosen(
        groups[best].composite,
        best,
        gap,
        _rows(found, groups),
        _DEFAULT,
        len(first),
        tuple(name for name in groups if name not in found),
    )


_DEFAULT = "auto"
_LEAST = 4  # examples
_GAMMAS = ((1.5, 0.1), (0.6, 0.3), (0.6, 0.03), (0.1, 0.1), (0.03, 0.003))  # by depth


def _check_x(x: PyTree) -> int:
    """How many examples there are.

    Raises:
      InputError: x is not one array of several examples.
    """
    if not isinstance(x, jax.Array | np.ndarray) or x.ndim < 2:
        raise InputError(
            "choose() removes parts of x, one array of shape (batch, ...); got "
            f"{arguments.shapes_of(x)}. What is not perturbed belongs to params."
        )
    arguments.concrete("x", x)
    if len(x) < _LEAST:
        raise InputError(
            f"x has {len(x)} examples: choose() divides them in halves, and needs "
            f"{_LEAST} at least; a hundred tell differences of a few hundredths."
        )
    return len(x)


def _parts_of(x: Array | np.ndarray) -> Parts:
    """The parts that the shape of x tells.

    Raises:
      InputError: it could be several things.
    """
    if x.ndim == 2:
        return features(x.shape[1:])
    if x.ndim == 3:
        return tokens(x.shape[1:])
    raise InputError(
        f"x has shape {x.shape}: say what is removed together, such as "
        f"parts=jlrp.metrics.patches({tuple(x.shape[1:])}, size=4, channel_axis=-1)."
    )


def _presets(x: Array | np.ndarray) -> dict[str, str | Composite]:
    """By name, in the order in which they are measured while there is time."""
    found: dict[str, str | Composite] = {n: n for n in ("attnlrp", "epsilon_plus")}
    for gammas in _GAMMAS:
        found[f"gamma_by_depth(0.0, {gammas})"] = gamma_by_depth(0.0, gammas)
    if jnp.issubdtype(x.dtype, jnp.floating):
        low, high = float(np.min(x)), float(np.max(x))
        name = f"epsilon_gamma_box({low:.3g}, {high:.3g})"
        found[name] = composites.epsilon_gamma_box(low, high)
    found["attnlrp(0.25, 0.05)"] = composites.attnlrp(0.25, 0.05)
    found["cp_lrp(0.25, 0.05)"] = composites.cp_lrp(0.25, 0.05)
    names = sorted(composites.PRESETS)
    return found | {n: n for n in names if n != "epsilon_gamma_box"}


@dataclass(frozen=True)
class _Group:
    """Composites that are one on a program."""

    composite: Composite
    also: tuple[str, ...] = ()


def _rows(
    found: Mapping[str, np.ndarray], groups: Mapping[str, _Group]
) -> tuple[Measured, ...]:
    """What was measured of each, the best first."""
    names = sorted(found, key=lambda name: -found[name].mean())
    return tuple(
        Measured(
            name,
            groups[name].composite,
            groups[name].also,
            interval(found[name]),
            interval(found[name] - found[_DEFAULT]),
        )
        for name in names
    )


@dataclass(frozen=True)
class _Examples:
    """What is divided with the examples."""

    x: Any
    target: Target
    parts: Parts
    baseline: Baseline
    count: int

    def at(self, which: np.ndarray) -> _Examples:
        labels = self.parts.labels
        if labels.ndim == np.ndim(self.x) and len(labels) == self.count:
            parts = Parts(labels[which])
        else:
            parts = self.parts
        target = self.target
        if not targets.is_static(target):
            target = jax.tree.map(lambda leaf: self._rows(leaf, which), target)
        baseline = self.baseline
        if len(getattr(baseline, "shape", ())) == np.ndim(self.x):
            baseline = self._rows(baseline, which)
        return _Examples(self.x[which], target, parts, baseline, len(which))

    def _rows(self, leaf: Any, which: np.ndarray) -> Any:
        """The rows of an array of one for each example."""
        if np.shape(leaf)[:1] != (self.count,):
            return leaf
        return jnp.asarray(leaf)[which]


@dataclass(frozen=True)
class _Measuring:
    """How a composite is measured.

    Attributes:
      called: ``fn`` and ``params``.
      curves: options of ``jlrp.metrics.curves``.
      batch: how many examples at once.
    """

    called: tuple[Function, PyTree]
    examples: _Examples
    curves: Mapping[str, Any]
    fallback: str | None
    batch: int

    def each(
        self,
        groups: Mapping[str, _Group],
        which: np.ndarray,
        seconds: float | None,
        bar: _Bar,
    ) -> dict[str, np.ndarray]:
        """The ABPC of each of these examples by the first, and by others in time."""
        found: dict[str, np.ndarray] = {}
        begun = time.monotonic()
        for name, group in groups.items():
            late = seconds is not None and time.monotonic() - begun > seconds
            if found and late:
                break
            parts = [
                self._abpc(group.composite, self.examples.at(which[i : i + self.batch]))
                for i in range(0, len(which), self.batch)
            ]
            found[name] = np.concatenate(parts)
            bar.update()
        return found

    def _abpc(self, composite: Composite, examples: _Examples) -> np.ndarray:
        x, target = examples.x, examples.target
        options = self._options(composite, examples)
        explained = relevance(*self.called, x, target, **options)
        called = *self.called, x, explained
        found = curves(*called, target=target, parts=examples.parts, **self.curves)
        return np.asarray(found.abpc, np.float64)

    def _options(self, composite: Composite, examples: _Examples) -> dict[str, Any]:
        given = {"composite": composite, "fallback": self.fallback}
        return {**given, "baseline": examples.baseline}

    def apart(
        self, given: Mapping[str, str | Composite], strict: bool
    ) -> dict[str, _Group]:
        """The default, then the candidates; those that are one on the program together.

        Raises:
          SelectorError, RuleError: one does not fit; if not ``strict`` it is left out.
        """
        one = self.examples.at(np.arange(1))
        names: dict[Hashable, str] = {}
        found: dict[str, _Group] = {}
        for name, value in {_DEFAULT: _DEFAULT, **given}.items():
            composite = resolve(value, name)
            options = self._options(composite, one)
            try:
                report = inspect(*self.called, one.x, one.target, **options)
            except (RuleError, SelectorError):
                if strict or name == _DEFAULT:
                    raise
                continue
            key = tuple((row.kind, row.rule) for row in report.operations)
            first = names.setdefault(key, name)
            if first == name:
                found[name] = _Group(composite)
            else:
                group = found[first]
                found[first] = _Group(group.composite, (*group.also, name))
        return found


class _Bar(Protocol):
    def update(self) -> object: ...


class _Silent:
    def update(self) -> None: ...


@contextlib.contextmanager
def _bar(total: int, progress: bool) -> Iterator[_Bar]:
    """tqdm's progress bar.

    Raises:
      IntegrationError: it is not installed.
    """
    if not progress:
        yield _Silent()
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise IntegrationError(
            "Progress bars need tqdm, which is not installed: pip install "
            "'jlrp[jobs]', or leave progress out."
        ) from error
    with tqdm(total=total, unit=" composites") as bar:
        yield bar

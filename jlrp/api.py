"""The public functions: relevance, explain, inspect, audit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlrp import _jax, reports, targets
from jlrp.composites import FALLBACKS, Composite, assign, resolve
from jlrp.errors import InputError, NoRelevanceError
from jlrp.facts.embedding import embeddings
from jlrp.families import NO_RELEVANCE
from jlrp.graph import Equation, Value, activate, trace
from jlrp.interpreter import Numbers, forward, reverse
from jlrp.operations import Operation, View, find_operations
from jlrp.planning import Plan, Step, make_plan
from jlrp.promise import Promise
from jlrp.rules import registered
from jlrp.rules.base import Propagation

Function = Callable[[Any, Any], Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Explanation:
    """What ``explain`` returns.

    Attributes:
      relevance: pytree like x: the relevance of each of its elements. float32 for
        low-precision x; boolean leaves have zeros, random keys ``()``.
      output: the output of the function.
    """

    relevance: Any
    output: Any


@dataclass(frozen=True)
class Explainer:
    """A function that explains ``fn``: ``explainer(params, x, target=None)``.

    Compiled and cached by itself; inside a user's ``jit``, ``vmap`` or ``grad`` it is
    just traced. Made by ``explain``.
    """

    fn: Function
    composite: Composite
    target: Any = None
    seed: str = "score"
    fallback: str | None = None

    def __call__(self, params: Any, x: Any, target: Any = None) -> Explanation:
        """Explain ``fn(params, x)``; ``target`` overrides the explainer's own."""
        _check_arrays(params, x)
        target = self.target if target is None else target
        static, traced = (target, None) if targets.is_static(target) else (None, target)
        if traced is not None and not _is_traced(traced):
            shapes = jax.eval_shape(self.fn, params, x)
            targets.check(shapes, traced, _batch_of(x))
        key = _Key(self.fn, self.composite, static, self.seed, self.fallback)
        return _explained(key, params, x, traced)


class _Key:
    """What a compiled explanation depends on, hashable even if ``fn`` is not.

    A bound method of an unhashable object (a Linen module with a list for a field)
    counts as the same while it is the same method of the same object, which the key
    keeps alive.
    """

    def __init__(self, fn: Function, *options: Any):
        self.fn, self.options = fn, options
        self.rules = tuple(registered().items())

    def _identity(self) -> tuple[Any, ...]:
        try:
            hash(self.fn)
            function: Any = self.fn
        except TypeError:
            owner = getattr(self.fn, "__self__", self.fn)
            function = (id(owner), getattr(self.fn, "__func__", None))
        return (function, self.options, self.rules)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())


@partial(jax.jit, static_argnums=0)
def _explained(key: _Key, params: Any, x: Any, traced_target: Any) -> Explanation:
    composite, static_target, seed, fallback = key.options
    target = static_target if traced_target is None else traced_target
    request = _Request(key.fn, params, x, target, seed)
    plan = request.plan(composite, fallback)
    outputs, residuals = forward(plan, request.arguments)
    seeds = request.seeds(residuals, outputs)
    promises = reverse(plan, residuals, seeds)
    relevance = request.relevance(promises, Numbers(residuals))
    output = jax.tree.unflatten(request.output_tree, outputs[request.n_scores :])
    return Explanation(relevance, output)


class _Request:
    """A traced function with its arguments and what of its output is explained."""

    def __init__(self, fn: Function, params: Any, x: Any, target: Any, seed: str):
        self.target, self.seed = target, seed
        scored = targets.scored(fn, target)
        self.program, (scores, output) = trace(scored, params, x)
        self.batch = _batch_of(x)
        targets.check(scores, target, self.batch)
        self.n_scores = len(jax.tree.leaves(scores))
        self.output_tree = jax.tree.structure(output)
        self.arguments = jax.tree.leaves((params, x))
        self.x_leaves, self.x_tree = jax.tree.flatten(x)
        n_params = len(self.arguments) - len(self.x_leaves)
        self.sources = self.program.inputs[n_params:]
        self.scores = self.program.outputs[: self.n_scores]

    def operations(self, view: View) -> list[Operation]:
        found = embeddings(self.program, self.sources)
        entries = {end: embedding.sources for end, embedding in found.items()}
        activate(self.program, self.sources, self.scores, _carries, entries)
        reached = self.program.active | self.program.entered
        if reached.isdisjoint(self.sources):
            raise NoRelevanceError(self._why_none())
        return find_operations(self.program, set(registered()), view, found)

    def plan(
        self,
        composite: Composite,
        fallback: str | None,
        strict: bool = True,
        keep_all: bool = False,
    ) -> Plan:
        operations = self.operations(composite.view)
        steps = assign(composite, operations, fallback, strict)
        return make_plan(self.program, steps, keep_all)

    def seeds(
        self, residuals: dict[Value, Any], outputs: Sequence[Any]
    ) -> dict[Value, Promise]:
        scores = [_widened(out) for out in outputs[: self.n_scores]]
        starts = targets.seeds(scores, self.target, self.batch, self.seed)
        seeds: dict[Value, Promise] = {}
        for atom, start in zip(self.scores, starts, strict=True):
            if self.program.is_active(atom):
                assert isinstance(atom, Value)
                seeds[atom] = start + seeds.get(atom)
        return seeds

    def relevance(self, promises: Sequence[Promise | None], numbers: Numbers) -> Any:
        leaves = []
        for source, promise in zip(self.sources, promises, strict=True):
            if _jax.is_key(source.dtype):
                leaves.append(())
            elif promise is None:
                floating = jnp.issubdtype(source.dtype, jnp.floating)
                dtype = numbers.shape_of(source).dtype if floating else jnp.float32
                leaves.append(jnp.zeros(source.shape, dtype))
            else:
                leaves.append(promise.resolve(numbers.read(source)))
        return jax.tree.unflatten(self.x_tree, leaves)

    def _why_none(self) -> str:
        reached = set(self.sources)
        for equation in self.program.equations:
            if not reached.isdisjoint(equation.inputs):
                reached.update(equation.outputs)
        stops = reports.blocked_by(self.program.equations, reached)
        why = f" Paths from x end at: {'; '.join(stops[:3])}." if stops else ""
        return (
            "The explained output does not depend on x through floating-point values."
            f"{why} Check the argument order, fn(params, x), and stop_gradient."
        )


def relevance(
    fn: Function,
    params: Any,
    x: Any,
    target: Any = None,
    *,
    composite: str | Composite = "auto",
    seed: str = "score",
    fallback: str | None = None,
) -> Any:
    """How much each element of ``x`` contributed to an output of ``fn(params, x)``.

    Compiles and caches by itself, per function, structure and options; inside a user's
    ``jit`` it is just traced.

    Args:
      fn: ``fn(params, x) -> scores``: any JAX function.
      params: pytree of arrays; constants of the explanation.
      x: pytree of arrays to explain, floating point.
      target: what is explained. None: the arg-max class of each row for scores of shape
        (batch, classes) or (classes,), the output itself for a scalar or (batch,). An
        int, or an int array of shape (batch,): that class. A float pytree like the
        output: the multiplier of each output. A function of the output that returns one
        number per example.
      composite: name of a preset of ``jlrp.composites``, or a ``Composite``.
      seed: ``"score"``: relevance starts at, and sums to, the explained score;
        ``"one"``: it starts at 1.
      fallback: for operations without a rule: None raises, ``"gradient"`` takes
        first-order Taylor, ``"stop"`` absorbs their relevance.

    Returns:
      Relevance: a pytree like ``x``, in float32 for low-precision x.

    Raises:
      JlrpError: for a target, selector or input that does not fit, a primitive without
      a
        rule, or an output that does not depend on ``x``.

    Example:
      >>> import jax.numpy as jnp, jlrp
      >>> w, x = jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])
      >>> r = jlrp.relevance(lambda w, x: x @ w, w, x)  # x * w
      >>> [round(float(share), 3) for share in r]
      [3.0, 8.0]

    Source: Bach et al. 2015; DynamicLRP (arXiv 2512.07010).
    """
    explainer = explain(fn, composite=composite, seed=seed, fallback=fallback)
    return explainer(params, x, target).relevance


def explain(
    fn: Function,
    *,
    composite: str | Composite = "auto",
    target: Any = None,
    seed: str = "score",
    fallback: str | None = None,
) -> Explainer:
    """An explainer of ``fn``: call it with ``(params, x, target=None)``.

    Args:
      fn, composite, target, seed, fallback: as in ``relevance``. An array as target is
        traced, so that labels may vary without recompiling; ints and functions are
        static.

    Returns:
      A function that returns an ``Explanation`` with ``relevance`` and ``output``.

    Raises:
      JlrpError: for an unknown composite, seed or fallback.

    Example:
      >>> import jax.numpy as jnp, jlrp
      >>> explain = jlrp.explain(lambda w, x: x @ w, composite="epsilon")
      >>> e = explain(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]))
      >>> float(e.output), round(float(e.relevance.sum()), 3)
      (11.0, 11.0)
    """
    if seed not in targets.SEEDS:
        raise InputError(f"seed must be one of {targets.SEEDS}; got {seed!r}.")
    if fallback is not None and fallback not in FALLBACKS:
        raise InputError(
            f"fallback must be None or one of {tuple(FALLBACKS)}; got {fallback!r}."
        )
    return Explainer(fn, resolve(composite), target, seed, fallback)


def inspect(
    fn: Function,
    params: Any,
    x: Any,
    target: Any = None,
    *,
    composite: str | Composite = "auto",
    fallback: str | None = None,
) -> reports.Inspection:
    """What jlrp sees in ``fn(params, x)``, and the rule of each operation; prints a
    table.

    Static: no number is computed. A missing rule is reported, not raised.

    Args:
      fn, target, composite, fallback: as in ``relevance``.
      params, x: pytrees of arrays or of ``jax.ShapeDtypeStruct``.

    Returns:
      An ``Inspection`` with ``operations`` and ``coverage``.

    Raises:
      JlrpError: for a target or selector that does not fit.

    Example:
      >>> import jax.numpy as jnp, jlrp
      >>> report = jlrp.inspect(lambda w, x: x @ w, jnp.ones((2, 3)), jnp.ones((1, 2)))
      >>> report.coverage.covered
      1
    """
    request = _Request(fn, params, x, target, "score")
    plan = request.plan(resolve(composite), fallback, strict=False)
    return reports.inspection(plan)


def audit(
    fn: Function,
    params: Any,
    x: Any,
    target: Any = None,
    *,
    composite: str | Composite = "auto",
    seed: str = "score",
    fallback: str | None = None,
) -> reports.Ledger:
    """Where relevance went: for each operation in, out, and what absorbed the rest.

    Each cause (bias, stabilizer, taylor, constants, blocked) comes from its own
    formula; what they leave over is ``unexplained``: rounding, or a rule that is wrong.

    Args:
      fn, params, x, target, composite, seed, fallback: as in ``relevance``.

    Returns:
      A ``Ledger`` with ``rows``, ``seed``, ``relevance``, ``unexplained`` and
      ``nonfinite``.

    Raises:
      JlrpError: as ``relevance``.

    Example:
      >>> import jax.numpy as jnp, jlrp
      >>> fn = lambda p, x: x @ p["w"] + p["b"]
      >>> p = {"w": jnp.array([1.0, 2.0]), "b": jnp.array(4.0)}
      >>> ledger = jlrp.audit(fn, p, jnp.array([3.0, 4.0]), composite="epsilon")
      >>> round(ledger.total("bias"), 3)
      4.0
    """
    _check_arrays(params, x)
    request = _Request(fn, params, x, target, seed)
    plan = request.plan(resolve(composite), fallback, keep_all=True)
    steps: list[Step] = []

    def run(arguments: Sequence[Any], target: Any) -> dict[str, Any]:
        if not targets.is_static(request.target):
            request.target = target
        auditor = _Auditor()  # holds tracers: it must not outlive the trace
        outputs, residuals = forward(plan, arguments)
        numbers = Numbers(residuals)
        seeds = request.seeds(residuals, outputs)
        promises = reverse(plan, residuals, seeds, auditor.observe)
        steps[:] = auditor.steps
        return {
            "seed": _total(seeds.items(), numbers),
            "relevance": _total(
                zip(plan.program.sources, promises, strict=True), numbers
            ),
            "rows": auditor.rows,
            "finite": [_finite(step, numbers) for step in plan.steps],
        }

    traced = None if targets.is_static(target) else target
    found = jax.device_get(jax.jit(run)(request.arguments, traced))
    rows = [
        _ledger_row(step, row) for step, row in zip(steps, found["rows"], strict=True)
    ]
    starts = [
        repr(step.operation)
        for step, (inputs, outputs) in zip(plan.steps, found["finite"], strict=True)
        if inputs and not outputs
    ]
    if not starts:  # the activations are finite: where relevance itself began not to be
        starts = [
            repr(step.operation)
            for step, row in zip(steps, rows, strict=True)
            if np.isfinite(row.arrived) and not np.isfinite(row.handed)
        ]
    return reports.Ledger(
        float(found["seed"]),
        float(found["relevance"]),
        tuple(rows),
        tuple(starts[::-1]),
    )


@dataclass
class _Auditor:
    """Collects the amounts of each step while the reverse pass is traced."""

    steps: list[Step] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)

    def observe(
        self,
        step: Step,
        arriving: Sequence[Promise | None],
        handed: Propagation,
        numbers: Numbers,
    ) -> None:
        op = step.operation
        self.steps.append(step)
        self.rows.append(
            {
                "arrived": _total(zip(op.outputs, arriving, strict=True), numbers),
                "handed": _total(zip(op.inputs, handed.promises, strict=True), numbers),
                "causes": handed.causes(),
            }
        )


def _ledger_row(step: Step, row: dict[str, Any]) -> reports.LedgerRow:
    arrived, handed = float(row["arrived"]), float(row["handed"])
    causes = {name: float(amount) for name, amount in row["causes"].items()}
    return reports.LedgerRow(
        step.operation.kind,
        step.operation.scope,
        repr(step.rule),
        arrived,
        handed,
        causes,
        arrived - handed - sum(causes.values()),
    )


def _total(pairs: Any, numbers: Numbers) -> Any:
    amounts = [
        jnp.sum(promise.resolve(numbers.read(value)))
        for value, promise in pairs
        if promise is not None
    ]
    return sum(amounts, start=0.0)


def _finite(step: Step, numbers: Numbers) -> tuple[Any, Any]:
    op = step.operation

    def all_finite(values: Sequence[Value]) -> Any:
        checks = [jnp.all(jnp.isfinite(numbers.read(v))) for v in values]
        return jnp.all(jnp.stack(checks)) if checks else jnp.asarray(True)

    return all_finite(op.inputs), all_finite(op.outputs)


def _carries(equation: Equation) -> bool:
    return equation.primitive in registered() or equation.primitive not in NO_RELEVANCE


def _check_arrays(params: Any, x: Any) -> None:
    for name, tree in (("params", params), ("x", x)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int):
                continue
            raise InputError(
                f"{name}{jax.tree_util.keystr(path)} is a {type(leaf).__name__}, not "
                "an array. Close over what is not an array, or split it from the model."
            )
    if not jax.tree.leaves(x):
        raise InputError("x has no arrays: there is nothing to explain.")
    for path, leaf in jax.tree_util.tree_leaves_with_path(x):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise InputError(
                f"x{jax.tree_util.keystr(path)} is complex; explain its real and "
                "imaginary parts as two real leaves."
            )


def _batch_of(x: Any) -> int | None:
    """The size of the leading axis of x, if all its leaves share one.

    A single vector is one example with features, not a batch of numbers.
    """
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(x)]
    if not shapes or any(not shape for shape in shapes):
        return None
    if all(len(shape) == 1 for shape in shapes):
        return None
    sizes = {shape[0] for shape in shapes}
    return sizes.pop() if len(sizes) == 1 else None


def _is_traced(tree: Any) -> bool:
    return any(map(_jax.is_tracer, jax.tree.leaves(tree)))


def _widened(array: Any) -> Any:
    low = str(array.dtype) in _jax.LOW_PRECISION
    return array.astype(jnp.float32) if low else array

"""The public functions: relevance, explain, inspect, audit."""

# JAX types its functions in part.
# pyright: reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np

from jlrp import caching, references, reports
from jlrp.arguments import check_function, takes
from jlrp.errors import InputError
from jlrp.fields import of_example, of_function
from jlrp.ir import jax_compat
from jlrp.notices import once, warn_of
from jlrp.ops import captures
from jlrp.options import (
    AuditOptions,
    Conditions,
    InspectOptions,
    Options,
    RelevanceOptions,
)
from jlrp.plan import budget, targets
from jlrp.reports.audit import audited
from jlrp.reports.inspection import inspection
from jlrp.request import Explained, Request, check_arrays
from jlrp.typing import Array, Function, PyTree, Target


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Explanation:
    """What ``explain`` returns: a pytree.

    Attributes:
      relevance: pytree like x: the relevance of each of its elements. float32 for
        low-precision x; integers have one number each, boolean leaves zeros, random
        keys ``()``.
      output: the output of the function.
      captured: by name, the relevance at the scopes and tags of ``capture``.
      params: pytree like params, if ``wrt`` asked for it, else None.
      loop_axes: static: by name, of each captured array, how many of its first axes are
        iterations of loops; names outside of loops are left out.
    """

    relevance: PyTree
    output: PyTree
    captured: Mapping[str, PyTree] = field(default_factory=dict[str, PyTree])
    params: PyTree = None
    loop_axes: tuple[tuple[str, tuple[int, ...]], ...] = field(
        default=(), metadata={"static": True}
    )


@dataclass(frozen=True)
class Explainer(Options):
    """A function that explains ``fn``: ``explainer(params, x, target=None)``.

    Compiled and cached by itself; inside a user's ``jit``, ``vmap`` or ``grad`` it is
    just traced. Made by ``explain``, whose options are its attributes.
    """

    fn: Function

    @takes()
    def __call__(
        self,
        params: PyTree,
        x: PyTree,
        target: Target = None,
        condition: Conditions = None,
    ) -> Explanation:
        """Explain ``fn(params, x)``.

        ``target`` and ``condition`` override the explainer's own.
        """
        check_arrays(params, x)
        target = self.target if target is None else targets.given(target)
        options = self if condition is None else replace(self, condition=condition)
        call = caching.call_of(self.fn, params, x, target, options)
        key = call.key
        if self.memory_limit is not None:
            leaves, tree = jax.tree.flatten(call.arrays)
            shapes = tuple(
                jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf))
                for leaf in leaves
            )
            key = _fitting(key, self.memory_limit, tree, shapes)
        found, counts = _explained(key, *call.arrays)
        _check_counts(counts, self.capture_steps)
        return found


@partial(jax.jit, static_argnums=0)
def _explained(
    key: caching.Key,
    params: PyTree,
    x: PyTree,
    traced: PyTree,
    masks: dict[str, Array],
    reference: list[Array] | None,
) -> tuple[Explanation, list[Array]]:
    """And how often while loops ran of which iterations are recorded."""
    request = key.request(params, x, traced, reference)
    plan = request.plan()
    warn_of(plan.stops)
    asks_for_params = "params" in key.options.asked

    def handed_out(found: Explained) -> tuple[Explanation, list[Array]]:
        explanation = Explanation(
            found.relevance(),
            found.output(),
            found.captured(),
            found.parameters() if asks_for_params else None,
            axes,
        )
        return explanation, found.counts()

    def explained(
        given: PyTree, masks: dict[str, Array]
    ) -> tuple[Explanation, list[Array]]:
        with request.at(given):
            rows, chunk = request.reference, request.background
            if rows is None or not chunk:
                return handed_out(request.run(plan, request.arguments, masks))
            at_x = request.forward(plan, request.arguments, masks)

            def of_one(row: Sequence[Array]) -> tuple[Explanation, list[Array]]:
                explanation, counts = handed_out(request.back(at_x, row))
                return replace(explanation, output=None), counts

            found, counts = references.mean_over(of_one, rows, chunk)
            return replace(found, output=request.output_of(at_x.outputs)), counts

    axes = captures.loop_axes(plan.captured)
    any_captured: PyTree = 0.0
    like = Explanation(
        x, request.output_like(), any_captured, params if asks_for_params else 0.0, axes
    )
    return jax_compat.untyped(explained, (like, 0), request.given, masks)


def _check_counts(counts: Sequence[Array], steps: int | None) -> None:
    """Refuse a while loop that ran more often than is recorded, where that is known.

    Inside of a user's ``jit`` it is not: what was captured is NaN there.
    """
    if steps is None or caching.is_traced(counts):
        return
    most = max((int(np.max(count, initial=0)) for count in counts), default=0)
    if most > steps:
        raise InputError(
            f"capture_steps is {steps}, but a while loop ran {most} times. Pass "
            f"capture_steps={most} or more to jlrp.explain."
        )


@lru_cache(maxsize=64)
def _fitting(
    key: caching.Key,
    limit: int,
    tree: Hashable,
    shapes: tuple[jax.ShapeDtypeStruct, ...],
) -> caching.Key:
    """The key with the cheapest residual policy, for some shapes, within a limit."""
    arguments = jax.tree.unflatten(tree, shapes)

    def with_policy(policy: budget.Choice) -> caching.Key:
        return replace(key, options=replace(key.options, residuals=policy))

    def bytes_of(policy: budget.Choice) -> int:
        lowered = _explained.lower(with_policy(policy), *arguments)
        if (found := lowered.compile().memory_analysis()) is None:
            raise InputError("This backend does not tell memory: no memory_limit here.")
        return found.temp_size_in_bytes

    with once():  # each policy makes a plan
        return with_policy(budget.fitting(bytes_of, limit))


@of_example(RelevanceOptions)
def relevance(
    fn: Function,
    params: PyTree,
    x: PyTree,
    target: Target = None,
    *,
    options: RelevanceOptions,
) -> PyTree:
    """How much each element of ``x`` contributed to an output of ``fn(params, x)``.

    Compiles and caches by itself, per function, structure and options; inside a user's
    ``jit`` it is just traced.

    Args:
      fn: ``fn(params, x) -> scores``: any JAX function.
      params: pytree of arrays; constants of the explanation.
      x: pytree of arrays to explain; integers, such as token ids, get one number each.
      target: what is explained. None: the arg-max class of each row for scores of shape
        (batch, classes) or (classes,), the output itself for a scalar or (batch,). An
        int, or an int array of shape (batch,): that class. A float pytree like the
        output: the multiplier of each output. A function of the output that returns one
        number per example.

    Returns:
      Relevance: a pytree like ``x`` (or like ``params``, or a tuple of both, as ``wrt``
      says), in float32 for low-precision leaves.

    Raises:
      JlrpError: for a target, selector or input that does not fit, a primitive without
        a rule, or an output that does not depend on ``x``.

    Example:
      >>> import jax.numpy as jnp, jlrp
      >>> w, x = jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])
      >>> r = jlrp.relevance(lambda w, x: x @ w, w, x)  # x * w
      >>> [round(float(share), 3) for share in r]
      [3.0, 8.0]

    Source: Bach et al. 2015; DynamicLRP (arXiv 2512.07010).
    """
    found = _explainer(fn, options)(params, x, target)
    shares = tuple(
        found.relevance if of == "x" else found.params for of in options.asked
    )
    return shares[0] if isinstance(options.wrt, str) else shares


def _explainer(fn: Function, options: RelevanceOptions) -> Explainer:
    check_function(fn)
    return Explainer(fn, **vars(options))


@of_function(Options)
def explain(fn: Function, *, options: Options) -> Explainer:
    """An explainer of ``fn``: call it with ``(params, x, target=None)``.

    Args:
      fn: as in ``relevance``.

    Returns:
      A function that returns an ``Explanation`` with ``relevance``, ``output``,
      ``captured`` and ``params``.

    Raises:
      JlrpError: for an unknown composite, seed or fallback. Calls of the explainer
        raise ``MemoryLimitError`` if no choice of residuals keeps the limit, and
        ``InputError`` if a loop runs more often than ``capture_steps``.

    Example:
      >>> import jax.numpy as jnp, jlrp
      >>> explain = jlrp.explain(lambda w, x: x @ w, composite="epsilon")
      >>> e = explain(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]))
      >>> float(e.output), round(float(e.relevance.sum()), 3)
      (11.0, 11.0)
    """
    return _explainer(fn, options)


@of_example(InspectOptions)
def inspect(
    fn: Function,
    params: PyTree,
    x: PyTree,
    target: Target = None,
    *,
    options: InspectOptions,
) -> reports.Inspection:
    """What jlrp sees in ``fn(params, x)``, and the rule of each operation; prints a
    table.

    Static: no number is computed. A missing rule is reported, not raised.

    Args:
      fn, target: as in ``relevance``.
      params, x: pytrees of arrays or of ``jax.ShapeDtypeStruct``.

    Returns:
      An ``Inspection`` with ``operations``, ``coverage`` and ``activations``: which of
      them are kept for the reverse pass, and which made again. ``why`` says what
      ``auto`` took, and why.

    Raises:
      JlrpError: for a target or selector that does not fit.

    Example:
      >>> import jax.numpy as jnp, jlrp
      >>> report = jlrp.inspect(lambda w, x: x @ w, jnp.ones((2, 3)), jnp.ones((1, 2)))
      >>> report.coverage.covered
      1
    """
    check_function(fn)
    check_arrays(params, x, abstract=True)
    complete = caching.all_options(options)
    request = Request(fn, params, x, complete, targets.given(target))
    plan = request.plan(strict=False)
    why = request.options.composite.why([step.operation for step in plan.steps])
    return inspection(plan, why)


@of_example(AuditOptions)
def audit(
    fn: Function,
    params: PyTree,
    x: PyTree,
    target: Target = None,
    *,
    options: AuditOptions,
) -> reports.Ledger:
    """Where relevance went: for each operation in, out, and what absorbed the rest.

    Each cause (bias, stabilizer, taylor, constants, blocked) comes from its own
    formula; what they leave over is ``unexplained``: rounding, or a rule that is wrong.

    Args:
      fn, params, x, target: as in ``relevance``.

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
    check_function(fn)
    check_arrays(params, x)
    return audited(caching.call_of(fn, params, x, targets.given(target), options))

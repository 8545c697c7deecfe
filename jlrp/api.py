"""The public functions: relevance, explain, inspect, audit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlrp import _jax, budget, reports, targets
from jlrp import residuals as policies
from jlrp.composites import FALLBACKS, Composite, resolve
from jlrp.errors import InputError
from jlrp.graph import Value
from jlrp.interpreter import Numbers
from jlrp.planning import Step, is_float
from jlrp.promise import Promise
from jlrp.request import Options, Request, batch_of, check_arrays
from jlrp.rules import registered
from jlrp.rules.base import Propagation

Function = Callable[[Any, Any], Any]
Conditions = Mapping[str, Any] | None


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
    """

    relevance: Any
    output: Any
    captured: Any = field(default_factory=dict)
    params: Any = None


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
    wrt: tuple[str, ...] = ("x",)
    capture: tuple[str, ...] = ()
    condition: Conditions = None
    residuals: Any = "keep"
    memory_limit: int | None = None

    def __call__(
        self, params: Any, x: Any, target: Any = None, condition: Conditions = None
    ) -> Explanation:
        """Explain ``fn(params, x)``.

        ``target`` and ``condition`` override the explainer's own.
        """
        check_arrays(params, x)
        target = self.target if target is None else target
        masks = _masks(self.condition if condition is None else condition)
        static, traced = (target, None) if targets.is_static(target) else (None, target)
        if traced is not None and not _is_traced(traced):
            shapes = jax.eval_shape(self.fn, params, x)
            targets.check(shapes, traced, batch_of(x))
        options = Options(
            self.composite,
            static,
            self.seed,
            self.fallback,
            self.wrt,
            self.capture,
            tuple(masks),
            self.residuals,
        )
        key = _Key(self.fn, options)
        if self.memory_limit is not None:
            leaves, tree = jax.tree.flatten((params, x, traced, masks))
            shapes = tuple(
                jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf))
                for leaf in leaves
            )
            policy = _fitting(key, self.memory_limit, tree, shapes)
            key = _Key(self.fn, replace(options, residuals=policy))
        return _explained(key, params, x, traced, masks)


class _Key:
    """What a compiled explanation depends on, hashable even if ``fn`` is not.

    A bound method of an unhashable object (a Linen module with a list for a field)
    counts as the same while it is the same method of the same object, which the key
    keeps alive.
    """

    def __init__(self, fn: Function, options: Options):
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
def _explained(
    key: _Key, params: Any, x: Any, traced_target: Any, masks: dict[str, Any]
) -> Explanation:
    request = Request(key.fn, params, x, key.options, traced_target)
    plan = request.plan()
    asks_for_params = "params" in key.options.wrt

    def explained(given: Any, masks: Any) -> Explanation:
        with request.at(given):
            found = request.run(plan, request.arguments, masks)
            return Explanation(
                found.relevance(),
                found.output(),
                found.captured(),
                found.parameters() if asks_for_params else None,
            )

    like = Explanation(
        x, request.output_like(), 0.0, params if asks_for_params else 0.0
    )
    return _jax.untyped(explained, like, request.given, masks)


@lru_cache(maxsize=64)
def _fitting(key: _Key, limit: int, tree: Any, shapes: tuple[Any, ...]) -> Any:
    """The cheapest residual policy for some shapes under a limit of memory."""
    arguments = jax.tree.unflatten(tree, shapes)

    def bytes_of(policy: Any) -> int:
        options = replace(key.options, residuals=policy)
        lowered = _explained.lower(_Key(key.fn, options), *arguments)
        if (found := lowered.compile().memory_analysis()) is None:
            raise InputError("This backend does not tell memory: no memory_limit here.")
        return found.temp_size_in_bytes

    return budget.fitting(bytes_of, limit)


def relevance(
    fn: Function,
    params: Any,
    x: Any,
    target: Any = None,
    *,
    composite: str | Composite = "auto",
    seed: str = "score",
    fallback: str | None = None,
    wrt: str | Sequence[str] = "x",
    condition: Conditions = None,
    residuals: Any = "keep",
    memory_limit: int | None = None,
) -> Any:
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
      composite: name of a preset of ``jlrp.composites``, or a ``Composite``.
      seed: ``"score"``: relevance starts at, and sums to, the explained score;
        ``"one"``: it starts at 1.
      fallback: for operations without a rule: None raises, ``"gradient"`` takes
        first-order Taylor, ``"stop"`` absorbs their relevance.
      wrt: ``"x"``; ``"params"``: the relevance of parameters, each times its
        multiplier, for pruning; or both, ``("x", "params")``. Parameters are side
        outputs: asking for them does not change the relevance of x.
      condition: masks by the name of a scope or tag; relevance is multiplied by them
        there, then goes on (CRP). Arrays that broadcast to the value named.
      residuals, memory_limit: which activations are kept, as in ``explain``.

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
    explainer = explain(
        fn,
        composite=composite,
        seed=seed,
        fallback=fallback,
        wrt=wrt,
        condition=condition,
        residuals=residuals,
        memory_limit=memory_limit,
    )
    found = explainer(params, x, target)
    if isinstance(wrt, str):
        return found.relevance if wrt == "x" else found.params
    return tuple(found.relevance if of == "x" else found.params for of in wrt)


def explain(
    fn: Function,
    *,
    composite: str | Composite = "auto",
    target: Any = None,
    seed: str = "score",
    fallback: str | None = None,
    wrt: str | Sequence[str] = "x",
    capture: str | Iterable[str] = (),
    condition: Conditions = None,
    residuals: Any = "keep",
    memory_limit: int | None = None,
) -> Explainer:
    """An explainer of ``fn``: call it with ``(params, x, target=None)``.

    Args:
      fn, composite, target, seed, fallback, wrt, condition: as in ``relevance``. An
        array as target is traced, so that labels may vary without recompiling; ints and
        functions are static.
      capture: globs of name scopes and tags, ``*`` within one component of a path,
        ``**`` any number: what relevance their outputs have is returned. A value inside
        an operation (between a convolution and its batch norm) is reported at the
        operation's output: naming never changes an explanation.
      residuals: which activations the reverse pass gets from the forward pass:
        ``"keep"``: those that rules read; ``"promise"``: those of them that cheap
        operations cannot make from others again; ``"sqrt"``: what is alive at about
        sqrt(n) places of a program of n operations, all else is run again, once;
        ``"offload"``: all in the memory of the host until then;
        ``jlrp.KeepWhere(...)``: by operation; or a policy of
        ``jax.checkpoint_policies``. Relevance is the same, to rounding.
      memory_limit: bytes of temporary memory that the compiled explanation may take, on
        each device: the residuals are chosen that run least again and keep it. Some
        programs are compiled for this at the first call with new shapes.

    Returns:
      A function that returns an ``Explanation`` with ``relevance``, ``output``,
      ``captured`` and ``params``.

    Raises:
      JlrpError: for an unknown composite, seed or fallback. Calls of the explainer
        raise ``MemoryLimitError`` if no choice of residuals keeps the limit.

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
    wrt = (wrt,) if isinstance(wrt, str) else tuple(wrt)
    if not wrt or not set(wrt) <= {"x", "params"}:
        raise InputError(f'wrt is "x", "params" or both; got {wrt!r}.')
    capture = (capture,) if isinstance(capture, str) else tuple(capture)
    _masks(condition)
    policies.resolve(residuals)
    _check_limit(memory_limit, residuals)
    return Explainer(
        fn,
        resolve(composite),
        target,
        seed,
        fallback,
        wrt,
        capture,
        condition,
        residuals,
        memory_limit,
    )


def _check_limit(limit: Any, residuals: Any) -> None:
    if limit is None:
        return
    if not isinstance(limit, int) or isinstance(limit, bool) or limit < 1:
        raise InputError(
            f"memory_limit is a number of bytes, at least 1; got {limit!r}."
        )
    if residuals != "keep":
        raise InputError(
            "memory_limit chooses the residuals itself: leave residuals out, or the "
            "limit."
        )


def _masks(condition: Conditions) -> dict[str, Any]:
    if condition is None:
        return {}
    if not isinstance(condition, Mapping):
        raise InputError(
            f"condition maps names of scopes or tags to masks; got {condition!r}."
        )
    return {name: jnp.asarray(mask) for name, mask in condition.items()}


def inspect(
    fn: Function,
    params: Any,
    x: Any,
    target: Any = None,
    *,
    composite: str | Composite = "auto",
    fallback: str | None = None,
    residuals: Any = "keep",
) -> reports.Inspection:
    """What jlrp sees in ``fn(params, x)``, and the rule of each operation; prints a
    table.

    Static: no number is computed. A missing rule is reported, not raised.

    Args:
      fn, target, composite, fallback, residuals: as in ``relevance``.
      params, x: pytrees of arrays or of ``jax.ShapeDtypeStruct``.

    Returns:
      An ``Inspection`` with ``operations``, ``coverage`` and ``activations``: which of
      them are kept for the reverse pass, and which made again. ``choice`` says what
      ``auto`` took, and why.

    Raises:
      JlrpError: for a target or selector that does not fit.

    Example:
      >>> import jax.numpy as jnp, jlrp
      >>> report = jlrp.inspect(lambda w, x: x @ w, jnp.ones((2, 3)), jnp.ones((1, 2)))
      >>> report.coverage.covered
      1
    """
    options = Options(resolve(composite), fallback=fallback, residuals=residuals)
    request = Request(fn, params, x, options, target)
    plan = request.plan(strict=False)
    why = options.composite.why([step.operation for step in plan.steps])
    return reports.inspection(plan, why)


def audit(
    fn: Function,
    params: Any,
    x: Any,
    target: Any = None,
    *,
    composite: str | Composite = "auto",
    seed: str = "score",
    fallback: str | None = None,
    condition: Conditions = None,
) -> reports.Ledger:
    """Where relevance went: for each operation in, out, and what absorbed the rest.

    Each cause (bias, stabilizer, taylor, constants, blocked) comes from its own
    formula; what they leave over is ``unexplained``: rounding, or a rule that is wrong.

    Args:
      fn, params, x, target, composite, seed, fallback, condition: as in
        ``relevance``.

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
    check_arrays(params, x)
    masks = _masks(condition)
    options = Options(
        resolve(composite), seed=seed, fallback=fallback, conditions=tuple(masks)
    )
    request = Request(fn, params, x, options, target)
    plan = request.plan(for_ledger=True)
    steps: list[Step] = []

    def run(given: Any) -> dict[str, Any]:
        with request.at(given):
            auditor = _Auditor()  # holds tracers: it must not outlive the trace
            explained = request.run(plan, request.arguments, masks, auditor.observe)
            numbers, sources = explained.numbers, explained.delivered.sources
            steps[:] = auditor.steps
            return {
                "seed": _total(explained.seeds.items(), numbers),
                "relevance": _total(
                    zip(request.sources, sources, strict=True), numbers
                ),
                "rows": auditor.rows,
                "finite": [_finite(step, numbers) for step in plan.steps],
            }

    static = targets.is_static(target)

    def untyped(arguments: Sequence[Any], traced: Any) -> dict[str, Any]:
        _, _, constants = request.given
        given = (arguments, target if static else traced, constants)
        return _jax.untyped(run, 0.0, given)

    traced = None if static else target
    found = jax.device_get(jax.jit(untyped)(request.arguments, traced))
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
    """Whether the inputs, and the outputs, are numbers.

    -inf is one where a constant put it, or it was there before: a mask's. So is what a
    cast makes of a mask that is as low as its own dtype goes.
    """
    op = step.operation

    def all_are(values: Sequence[Value], masked: Any) -> Any:
        checks = [jnp.asarray(True)]
        for v in values:
            number = numbers.read(v)
            allowed = masked & jnp.isneginf(jnp.real(number))
            checks.append(jnp.all(jnp.isfinite(number) | allowed))
        return jnp.all(jnp.stack(checks))

    values = [numbers.read(v) for v in op.inputs if is_float(v)]
    was_masked = [jnp.any(jnp.real(v) < jnp.finfo(v.dtype).min / 2) for v in values]
    masked = jnp.any(jnp.stack([jnp.asarray(op.has_offset), *was_masked]))
    inputs = all_are([v for v in op.inputs if is_float(v)], jnp.asarray(True))
    return inputs, all_are(op.outputs, masked)


def _is_traced(tree: Any) -> bool:
    return any(map(_jax.is_tracer, jax.tree.leaves(tree)))

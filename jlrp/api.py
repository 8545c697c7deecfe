"""The public functions: relevance, explain, inspect, audit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlrp import _jax, budget, captures, reports, targets
from jlrp import residuals as policies
from jlrp.closures import arrays_of, state_of
from jlrp.composites import FALLBACKS, Composite, resolve
from jlrp.errors import InputError
from jlrp.graph import Value
from jlrp.interpreter import Numbers
from jlrp.notices import once, warn_of
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
      loop_axes: static: by name, of each captured array, how many of its first axes are
        iterations of loops; names outside of loops are left out.
    """

    relevance: Any
    output: Any
    captured: Any = field(default_factory=dict)
    params: Any = None
    loop_axes: tuple[tuple[str, tuple[int, ...]], ...] = field(
        default=(), metadata={"static": True}
    )


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
    capture_steps: int | None = None

    def __call__(
        self, params: Any, x: Any, target: Any = None, condition: Conditions = None
    ) -> Explanation:
        """Explain ``fn(params, x)``.

        ``target`` and ``condition`` override the explainer's own.
        """
        check_arrays(params, x)
        target = self.target if target is None else target
        masks = _masks(self.condition if condition is None else condition)
        function = _Function(self.fn)
        static, traced = _apart(function, params, x, target)
        options = Options(
            self.composite,
            static,
            self.seed,
            self.fallback,
            self.wrt,
            self.capture,
            tuple(masks),
            self.residuals,
            self.capture_steps,
        )
        key = _Key(function, options)
        if self.memory_limit is not None:
            leaves, tree = jax.tree.flatten((params, x, traced, masks))
            shapes = tuple(
                jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf))
                for leaf in leaves
            )
            policy = _fitting(key, self.memory_limit, tree, shapes)
            key = _Key(function, replace(options, residuals=policy))
        found, counts = _explained(key, params, x, traced, masks)
        _check_counts(counts, self.capture_steps)
        return found


class _Function:
    """A function as part of a key: hashable, and another one with other arrays.

    Equal are equal functions that hold the same arrays (see ``closures``), which the
    key keeps alive. A bound method of an unhashable object (a Linen module with a list
    for a field) counts as the same while it is the same method of the same object.
    """

    def __init__(self, call: Callable[..., Any]):
        self.call, self.held = call, arrays_of(call)
        try:
            hash(call)
            function: Any = call
        except TypeError:
            owner = getattr(call, "__self__", call)
            function = (id(owner), getattr(call, "__func__", None))
        self._identity = (function, tuple(map(id, self.held)))

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Function) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)


class _Key:
    """What a compiled explanation depends on, besides shapes."""

    def __init__(self, fn: _Function, options: Options):
        self.fn, self.options = fn, options
        self.rules = tuple(registered().items())

    def _identity(self) -> tuple[Any, ...]:
        return (self.fn, self.options, self.rules)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())


def _apart(fn: _Function, params: Any, x: Any, target: Any) -> tuple[Any, Any]:
    """What of a target is part of the compiled program, and what comes with each call.

    A function is traced anew, so that it explains what it reads now. Where types say
    how arrays are spread, it is part of the program, with the arrays that it holds.
    """
    if callable(target):
        if _jax.is_typed((params, x)):
            return _Function(target), None
        return _traced(target, _output_of(fn, params, x))
    if targets.is_static(target):
        return target, None
    if not _is_traced(target):
        targets.check(_output_of(fn, params, x), target, batch_of(x))
    return None, target


def _traced(target: Any, output: Any) -> tuple[targets.Traced, list[Any]]:
    """A target function as it is now; traced before, if all that it reads is known."""
    state = state_of(target)
    if state is None:
        return targets.traced(target, output)
    leaves, tree = jax.tree.flatten(output)
    kinds = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    key = (state[0], tree, kinds, _mode())
    if key not in _targets:
        _targets[key] = (targets.traced(target, output), state[1])
        _oldest_out(_targets)
    return _targets[key][0]


def _oldest_out(cache: dict[Any, Any]) -> None:
    while len(cache) > 256:
        del cache[next(iter(cache))]


def _output_of(fn: _Function, params: Any, x: Any) -> Any:
    """The shapes of the output, traced once for a function and shapes."""
    leaves, tree = jax.tree.flatten((params, x))
    kinds = tuple((np.shape(v), getattr(v, "dtype", type(v))) for v in leaves)
    key = (fn, tree, kinds, _mode())
    if key not in _outputs:
        _outputs[key] = jax.eval_shape(fn.call, params, x)
        _oldest_out(_outputs)
    return _outputs[key]


_outputs: dict[Any, Any] = {}
_targets: dict[Any, Any] = {}


def _mode() -> Any:
    """The settings of JAX that dtypes depend on."""
    return jax.config.jax_enable_x64, jax.config.jax_numpy_dtype_promotion  # type: ignore


@partial(jax.jit, static_argnums=0)
def _explained(
    key: _Key, params: Any, x: Any, traced_target: Any, masks: dict[str, Any]
) -> tuple[Explanation, list[Any]]:
    """And how often while loops ran of which iterations are recorded."""
    target, static = traced_target, key.options.target
    if isinstance(static, targets.Traced):
        target = static.at(traced_target)
    request = Request(key.fn.call, params, x, key.options, target)
    plan = request.plan()
    warn_of(plan.stops)
    asks_for_params = "params" in key.options.wrt

    def explained(given: Any, masks: Any) -> tuple[Explanation, list[Any]]:
        with request.at(given):
            found = request.run(plan, request.arguments, masks)
            explanation = Explanation(
                found.relevance(),
                found.output(),
                found.captured(),
                found.parameters() if asks_for_params else None,
                axes,
            )
            return explanation, found.counts()

    axes = captures.loop_axes(plan.captured)
    like = Explanation(
        x, request.output_like(), 0.0, params if asks_for_params else 0.0, axes
    )
    return _jax.untyped(explained, (like, 0), request.given, masks)


def _check_counts(counts: Sequence[Any], steps: int | None) -> None:
    """Refuse a while loop that ran more often than is recorded, where that is known.

    Inside of a user's ``jit`` it is not: what was captured is NaN there.
    """
    if steps is None or _is_traced(counts):
        return
    most = max((int(np.max(count, initial=0)) for count in counts), default=0)
    if most > steps:
        raise InputError(
            f"capture_steps is {steps}, but a while loop ran {most} times. Pass "
            f"capture_steps={most} or more to jlrp.explain."
        )


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

    with once():  # each policy makes a plan
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
    capture_steps: int | None = None,
) -> Explainer:
    """An explainer of ``fn``: call it with ``(params, x, target=None)``.

    Args:
      fn, composite, target, seed, fallback, wrt, condition: as in ``relevance``. An
        array as target is traced, so that labels may vary without recompiling; ints and
        functions are static.
      capture: globs of name scopes and tags, ``*`` within one component of a path,
        ``**`` any number: what relevance their outputs have is returned. A value inside
        an operation (between a convolution and its batch norm) is reported at the
        operation's output: naming never changes an explanation. One in the body of a
        loop has a first axis of iterations, in the order of the loop's stacked arrays;
        one in a branch is zeros where another ran.
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
      capture_steps: how many iterations of a ``while_loop`` are recorded, for names in
        its body: rows behind the last are zeros. More iterations are an error, or NaN
        where the call is traced, as in a user's ``jit``.

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
    _check_steps(capture_steps)
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
        capture_steps,
    )


def _check_steps(steps: Any) -> None:
    if steps is None:
        return
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise InputError(
            f"capture_steps is a number of iterations, at least 1; got {steps!r}."
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
    warn_of(plan.stops)
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

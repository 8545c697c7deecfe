"""The public functions: relevance, explain, inspect, audit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlrp import auditing, references, reports
from jlrp.arguments import (
    check_array,
    check_choice,
    check_function,
    output_of,
    shown,
    takes,
)
from jlrp.composites import FALLBACKS, Composite, resolve
from jlrp.errors import InputError
from jlrp.ir import jax_compat
from jlrp.ir.closures import arrays_of, state_of
from jlrp.notices import once, warn_of
from jlrp.ops import captures
from jlrp.plan import budget, targets
from jlrp.plan import residuals as policies
from jlrp.request import Explained, Options, Request, batch_of, check_arrays
from jlrp.rules import registered

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
    baseline: Any = None

    @takes()
    def __call__(
        self, params: Any, x: Any, target: Any = None, condition: Conditions = None
    ) -> Explanation:
        """Explain ``fn(params, x)``.

        ``target`` and ``condition`` override the explainer's own.
        """
        check_arrays(params, x)
        target = self.target if target is None else targets.given(target)
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
            self.baseline is not None,
            getattr(self.baseline, "chunk", 0),
        )
        reference = references.resolved(self.baseline, x)
        key = _Key(function, options)
        if self.memory_limit is not None:
            leaves, tree = jax.tree.flatten((params, x, traced, masks, reference))
            shapes = tuple(
                jax.ShapeDtypeStruct(np.shape(leaf), jnp.result_type(leaf))
                for leaf in leaves
            )
            policy = _fitting(key, self.memory_limit, tree, shapes)
            key = _Key(function, replace(options, residuals=policy))
        found, counts = _explained(key, params, x, traced, masks, reference)
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
        if jax_compat.is_typed((params, x)):
            return _Function(target), None
        return _traced(target, _output_of(fn, params, x))
    if targets.is_static(target):
        return target, None
    if not _is_traced(target):
        output = _output_of(fn, params, x)
        targets.check(output, targets.fitting(output, target), batch_of(x))
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
        _outputs[key] = output_of(fn.call, params, x)
        _oldest_out(_outputs)
    return _outputs[key]


_outputs: dict[Any, Any] = {}
_targets: dict[Any, Any] = {}


def _mode() -> Any:
    """The settings of JAX that dtypes depend on."""
    return jax.config.jax_enable_x64, jax.config.jax_numpy_dtype_promotion  # type: ignore


@partial(jax.jit, static_argnums=0)
def _explained(
    key: _Key,
    params: Any,
    x: Any,
    traced_target: Any,
    masks: dict[str, Any],
    reference: Any = None,
) -> tuple[Explanation, list[Any]]:
    """And how often while loops ran of which iterations are recorded."""
    target = targets.joined(key.options.target, traced_target)
    request = Request(key.fn.call, params, x, key.options, target, reference)
    plan = request.plan()
    warn_of(plan.stops)
    asks_for_params = "params" in key.options.wrt

    def handed_out(found: Explained) -> tuple[Explanation, list[Any]]:
        explanation = Explanation(
            found.relevance(),
            found.output(),
            found.captured(),
            found.parameters() if asks_for_params else None,
            axes,
        )
        return explanation, found.counts()

    def explained(given: Any, masks: Any) -> tuple[Explanation, list[Any]]:
        with request.at(given):
            if not request.options.background:
                return handed_out(request.run(plan, request.arguments, masks))
            at_x = request.forward(plan, request.arguments, masks)

            def of_one(row: list[Any]) -> Any:
                explanation, counts = handed_out(request.back(at_x, row))
                return replace(explanation, output=None), counts

            found, counts = references.mean_over(
                of_one, request.reference, request.options.background
            )
            return replace(found, output=request.output_of(at_x.outputs)), counts

    axes = captures.loop_axes(plan.captured)
    like = Explanation(
        x, request.output_like(), 0.0, params if asks_for_params else 0.0, axes
    )
    return jax_compat.untyped(explained, (like, 0), request.given, masks)


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


@takes()
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
    baseline: Any = None,
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
      baseline: what relevance is relative to; it then sums to ``fn(params, x) -
        fn(params, baseline)``. None: to nothing, as LRP is. A number, an array or a
        pytree that broadcasts to x; a function of x, such as ``metrics.Blur(...)``; of
        token ids, ids; or ``jlrp.Background(data)``, the mean over its rows. ``auto``
        is ``deep_lift`` then.

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
        baseline=baseline,
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
    baseline: Any = None,
) -> Explainer:
    """An explainer of ``fn``: call it with ``(params, x, target=None)``.

    Args:
      fn, composite, target, seed, fallback, wrt, condition, baseline: as in
        ``relevance``. An
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
    check_function(fn)
    check_choice("seed", seed, targets.SEEDS)
    if fallback is not None:
        check_choice("fallback", fallback, FALLBACKS)
    wrt = _words("wrt", wrt, 'it is "x", "params" or both')
    if not wrt or not set(wrt) <= {"x", "params"}:
        raise InputError(f'wrt is "x", "params" or both; got {wrt!r}.')
    capture = _words("capture", capture, "globs of name scopes and tags")
    target = targets.given(target)
    _masks(condition)
    policies.resolve(residuals)
    _check_limit(memory_limit, residuals)
    _check_steps(capture_steps)
    composite = resolve(composite)
    references.check(baseline)
    _check_relative(composite, baseline, seed)
    return Explainer(
        fn,
        composite,
        target,
        seed,
        fallback,
        wrt,
        capture,
        condition,
        residuals,
        memory_limit,
        capture_steps,
        baseline,
    )


def _check_relative(composite: Composite, baseline: Any, seed: str) -> None:
    if baseline is None and composite.view.relative:
        raise InputError(
            "This composite, deep_lift or made of it, is of differences: say from "
            "what, with baseline=0.0, an array like x, a function of x, or "
            "jlrp.Background(data)."
        )
    if baseline is not None and seed != "score":
        raise InputError(
            "With a baseline, relevance starts at a difference of scores: "
            f'seed="score", not {seed!r}.'
        )


def _check_steps(steps: Any) -> None:
    if steps is None:
        return
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise InputError(
            f"capture_steps is a number of iterations, at least 1; got {steps!r}."
        )


def _words(name: str, given: Any, meaning: str) -> tuple[str, ...]:
    words = (given,) if isinstance(given, str) else given
    is_list = isinstance(words, Iterable) and not hasattr(words, "dtype")
    if not is_list or isinstance(words, bytes | Mapping):
        raise InputError(f"{name} is {shown(given)}; give strings: {meaning}.")
    words = tuple(words)
    if not all(isinstance(word, str) for word in words):
        raise InputError(f"{name} has {shown(given)}; give strings: {meaning}.")
    return words


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
            f"condition maps names of scopes or tags to masks; got {shown(condition)}."
        )
    for name, mask in condition.items():
        check_array(f"condition[{name!r}]", mask)
        if not isinstance(name, str):
            raise InputError(f"condition has the key {name!r}; names are strings.")
    return {name: jnp.asarray(mask) for name, mask in condition.items()}


@takes()
def inspect(
    fn: Function,
    params: Any,
    x: Any,
    target: Any = None,
    *,
    composite: str | Composite = "auto",
    fallback: str | None = None,
    residuals: Any = "keep",
    baseline: Any = None,
) -> reports.Inspection:
    """What jlrp sees in ``fn(params, x)``, and the rule of each operation; prints a
    table.

    Static: no number is computed. A missing rule is reported, not raised.

    Args:
      fn, target, composite, fallback, residuals, baseline: as in ``relevance``.
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
    check_function(fn)
    check_arrays(params, x, abstract=True)
    if fallback is not None:
        check_choice("fallback", fallback, FALLBACKS)
    policies.resolve(residuals)
    composite = resolve(composite)
    references.check(baseline)
    _check_relative(composite, baseline, "score")
    options = Options(
        composite,
        fallback=fallback,
        residuals=residuals,
        relative=baseline is not None,
    )
    request = Request(fn, params, x, options, targets.given(target))
    plan = request.plan(strict=False)
    why = request.options.composite.why([step.operation for step in plan.steps])
    return reports.inspection(plan, why)


@takes()
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
    baseline: Any = None,
) -> reports.Ledger:
    """Where relevance went: for each operation in, out, and what absorbed the rest.

    Each cause (bias, stabilizer, taylor, constants, blocked) comes from its own
    formula; what they leave over is ``unexplained``: rounding, or a rule that is wrong.

    Args:
      fn, params, x, target, composite, seed, fallback, condition, baseline: as in
        ``relevance``. Of a ``jlrp.Background``, amounts are means.

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
    check_choice("seed", seed, targets.SEEDS)
    if fallback is not None:
        check_choice("fallback", fallback, FALLBACKS)
    masks = _masks(condition)
    function = _Function(fn)
    static, traced = _apart(function, params, x, targets.given(target))
    composite = resolve(composite)
    references.check(baseline)
    _check_relative(composite, baseline, seed)
    options = Options(
        composite,
        static,
        seed,
        fallback,
        conditions=tuple(masks),
        relative=baseline is not None,
        background=getattr(baseline, "chunk", 0),
    )
    reference = references.resolved(baseline, x)
    key = _Key(function, options)
    return auditing.ledger(key, params, x, traced, masks, reference)


def _is_traced(tree: Any) -> bool:
    return any(map(jax_compat.is_tracer, jax.tree.leaves(tree)))

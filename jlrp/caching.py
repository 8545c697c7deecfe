"""What a compiled program depends on, and what comes with each call of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jlrp import references, tactics
from jlrp.arguments import output_of
from jlrp.fields import options_of
from jlrp.ir import jax_compat
from jlrp.ir.closures import arrays_of, state_of
from jlrp.options import AuditOptions, Options, RuleOptions, masks_of
from jlrp.plan import targets
from jlrp.request import Request, batch_of
from jlrp.rules import registered
from jlrp.typing import Array, Function, PyTree, Target


class HeldFunction:
    """A function as part of a key: hashable, and another one with other arrays.

    Equal are equal functions that hold the same arrays (see ``closures``), which the
    key keeps alive. A bound method of an unhashable object (a Linen module with a list
    for a field) counts as the same while it is the same method of the same object.
    """

    def __init__(self, call: Callable[..., PyTree]):
        self.call, self.held = call, arrays_of(call)
        try:
            hash(call)
            function: object = call
        except TypeError:
            owner = getattr(call, "__self__", call)
            function = (id(owner), getattr(call, "__func__", None))
        self._identity = (function, tuple(map(id, self.held)))

    def __call__(self, *args: PyTree) -> PyTree:
        return self.call(*args)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HeldFunction) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)


StaticTarget = int | HeldFunction | targets.Traced | None


@dataclass(frozen=True)
class Key:
    """What a compiled program depends on, besides shapes.

    Attributes:
      options: but for what is apart, and the arrays of each call.
      target: the static part of it.
      masked: the names that have masks.
      rules: those of registered primitives.
      tactics: whether they are used.
    """

    fn: HeldFunction
    options: Options
    target: StaticTarget
    masked: tuple[str, ...]
    rules: tuple[object, ...]
    tactics: bool

    def request(
        self, params: PyTree, x: PyTree, traced: PyTree, reference: list[Array] | None
    ) -> Request:
        """The explanation, with the traced part of the target."""
        target = targets.joined(self.target, traced)
        return Request(
            self.fn.call, params, x, self.options, target, self.masked, reference
        )


@dataclass(frozen=True)
class Call:
    """A key, and what comes with the call; ``traced`` is of the target.

    ``reference`` are the leaves of a baseline, rows of them of a background.
    """

    key: Key
    params: PyTree
    x: PyTree
    traced: PyTree
    masks: dict[str, Array]
    reference: list[Array] | None

    @property
    def arrays(
        self,
    ) -> tuple[PyTree, PyTree, PyTree, dict[str, Array], list[Array] | None]:
        return self.params, self.x, self.traced, self.masks, self.reference


def call_of(
    fn: Function, params: PyTree, x: PyTree, target: Target, options: AuditOptions
) -> Call:
    """A call, its options apart from the arrays that come with it."""
    function = HeldFunction(fn)
    masks = masks_of(options.condition)
    static, traced = _apart(function, params, x, target)
    rules = tuple(registered().items())
    reference = references.resolved(options.baseline, x)
    baseline = references.given(options.baseline)
    kept = all_options(
        options, target=None, condition=None, memory_limit=None, baseline=baseline
    )
    key = Key(function, kept, static, tuple(masks), rules, tactics.enabled())
    return Call(key, params, x, traced, masks, reference)


def all_options(options: RuleOptions, **changes: references.Given | None) -> Options:
    """Those options, those of others at their defaults."""
    given = {name: getattr(options, name) for name in options_of(type(options))}
    return Options(**{**given, **changes})


def is_traced(tree: PyTree) -> bool:
    return any(map(jax_compat.is_tracer, jax.tree.leaves(tree)))


def _apart(
    fn: HeldFunction, params: PyTree, x: PyTree, target: Target
) -> tuple[StaticTarget, PyTree]:
    """What of a target is part of the compiled program, and what comes with each call.

    A function is traced anew, so that it explains what it reads now. Where types say
    how arrays are spread, it is part of the program, with the arrays that it holds.
    """
    if callable(target):
        if jax_compat.is_typed((params, x)):
            return HeldFunction(target), None
        return _traced(target, _output_of(fn, params, x))
    if target is None or isinstance(target, int):
        return target, None
    if not is_traced(target):
        output = _output_of(fn, params, x)
        targets.check(output, targets.fitting(output, target), batch_of(x))
    return None, target


def _traced(
    target: Callable[[PyTree], PyTree], output: PyTree
) -> tuple[targets.Traced, list[Array]]:
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


def _output_of(fn: HeldFunction, params: PyTree, x: PyTree) -> PyTree:
    """The shapes of the output, traced once for a function and shapes."""
    leaves, tree = jax.tree.flatten((params, x))
    kinds = tuple((np.shape(v), getattr(v, "dtype", type(v))) for v in leaves)
    key = (fn, tree, kinds, _mode())
    if key not in _outputs:
        _outputs[key] = output_of(fn.call, params, x)
        _oldest_out(_outputs)
    return _outputs[key]


_outputs: dict[Hashable, PyTree] = {}
# With what the key's identities are of, which must not be freed.
_targets: dict[
    Hashable, tuple[tuple[targets.Traced, list[Array]], Sequence[object]]
] = {}


def _oldest_out(cache: dict[Hashable, PyTree]) -> None:
    while len(cache) > 256:
        del cache[next(iter(cache))]


def _mode() -> tuple[object, ...]:
    """The settings of JAX that dtypes depend on."""
    return jax.config.jax_enable_x64, jax.config.jax_numpy_dtype_promotion  # type: ignore

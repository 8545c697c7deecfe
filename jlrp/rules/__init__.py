"""Propagation rules, one file a family, and the rule that each operation has by
default.

A rule is a frozen, hashable, printable value. Composites assign rules to operations;
``register_rule`` gives one to a primitive of one's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.extend.core import Primitive

from jlrp.arguments import shown
from jlrp.errors import InputError
from jlrp.ir.own_primitives import custom_relevance_p
from jlrp.ir.program import Value
from jlrp.ops.base import Operation
from jlrp.promise import Promise
from jlrp.rules.base import Array as Array
from jlrp.rules.base import Context, Propagation
from jlrp.rules.base import Rule as Rule
from jlrp.rules.elementwise import NativeGradient as NativeGradient
from jlrp.rules.elementwise import Pass as Pass
from jlrp.rules.embedding import SumFeatures as SumFeatures
from jlrp.rules.gradient import Gradient as Gradient
from jlrp.rules.gradient import Stop as Stop
from jlrp.rules.kernel import AlphaBeta as AlphaBeta
from jlrp.rules.kernel import Gamma as Gamma
from jlrp.rules.kernel import GammaMontavon as GammaMontavon
from jlrp.rules.kernel import WSquare as WSquare
from jlrp.rules.kernel import ZBox as ZBox
from jlrp.rules.kernel import ZPlus as ZPlus
from jlrp.rules.linalg import Euler as Euler
from jlrp.rules.linear import Epsilon as Epsilon
from jlrp.rules.linear import Flat as Flat
from jlrp.rules.linear import Zero as Zero
from jlrp.rules.movement import Follow as Follow
from jlrp.rules.product import Absolute as Absolute
from jlrp.rules.product import Gate as Gate
from jlrp.rules.product import Selective as Selective
from jlrp.rules.product import Uniform as Uniform
from jlrp.rules.reference import Difference as Difference
from jlrp.rules.rounding import StraightThrough as StraightThrough

RelevanceFunction = Callable[..., Any]


@dataclass(frozen=True, repr=False)
class Custom(Rule):
    """A user's function ``(r, x, y, **params) -> relevance of each operand``.

    ``r`` and ``y`` are lists of relevances and outputs, ``x`` the list of operands; the
    function returns one relevance an operand, None for none.
    """

    function: RelevanceFunction

    def __repr__(self) -> str:
        name = getattr(self.function, "__qualname__", repr(self.function))
        return f"Custom({name})"

    def needs(self, op: Operation) -> tuple[Value, ...]:
        return op.inputs + op.equations[0].outputs

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        (equation,) = op.equations
        y = [ctx.read(v) for v in equation.outputs]
        arriving = dict(zip(op.outputs, r, strict=True))
        relevance = []
        for out, number in zip(equation.outputs, y, strict=True):
            promise = arriving.get(out) or Promise()
            relevance.append(promise.resolve(number))
        x = [ctx.read(a) for a in equation.inputs]
        handed = self.function(relevance, x, y, **equation.params)
        if len(handed) != len(x):
            raise InputError(
                f"The rule of {equation.primitive.name} returned {len(handed)} "
                f"relevances for {len(x)} operands; return one each, None for none."
            )
        by_operand = dict(zip(equation.inputs, handed, strict=True))
        promises = []
        for v in op.inputs:
            share = by_operand.get(v)
            if share is not None:
                share = jnp.asarray(share, ctx.read(v).dtype)
            promises.append(None if share is None else Promise(value=share))
        return Propagation(promises)


@dataclass(frozen=True)
class ByItself(Rule):
    """The rule that ``jlrp.custom_relevance`` gave to a function."""

    name: str = ""

    def needs(self, op: Operation) -> tuple[Value, ...]:
        return op.inputs + op.equations[0].outputs

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        function = op.equations[0].params["rule"]
        return Custom(lambda r, x, y, **_: function(r, x, y)).propagate(op, r, ctx)


_registered: dict[Any, Rule] = {custom_relevance_p: ByItself()}


def register_rule(primitive: Any, rule: Rule | RelevanceFunction) -> None:
    """Give a primitive a rule; it is then an operation by itself.

    Args:
      primitive: a ``jax.extend.core.Primitive``.
      rule: a rule value, such as ``Gradient()`` or ``Pass()``, or a function
        ``(r, x, y, **params)`` of the lists of output relevances, operands and outputs
        that returns the relevance of each operand (None for none).

    Raises:
      InputError: if ``rule`` is neither.

    Example:
      >>> import jlrp
      >>> from jax.extend.core.primitives import tanh_p
      >>> jlrp.register_rule(tanh_p, jlrp.rules.Pass())
      >>> jlrp.unregister_rule(tanh_p)
    """
    if not isinstance(primitive, Primitive):
        raise InputError(
            f"primitive is {shown(primitive)}; give a jax.extend.core.Primitive."
        )
    if not isinstance(rule, Rule):
        if not callable(rule) or isinstance(rule, type):
            raise InputError(
                f"A rule is a value of jlrp.rules or a function; got {shown(rule)}."
            )
        rule = Custom(rule)
    _registered[primitive] = rule


def unregister_rule(primitive: Any) -> None:
    """Take back ``register_rule``; without such a rule, nothing happens."""
    _registered.pop(primitive, None)


def registered() -> dict[Any, Rule]:
    """The primitives with a rule of their own, and these rules."""
    return dict(_registered)


def default_rule(op: Operation) -> Rule | None:
    """The rule of an operation's kind, where no composite says otherwise."""
    if (rule := _registered.get(op.primitive)) is not None and op.affine is None:
        own = isinstance(rule, ByItself)
        return ByItself(op.equations[0].params["name"]) if own else rule
    if op.region is not None:
        passes = op.region.zero_at_zero or op.region.homogeneous
        return _PASS if passes else _BY_NATURE["function"]
    return _UNIFORM if op.product is not None else _BY_NATURE.get(op.nature)


# Made once: the parameters of a rule are checked when it is made.
_PASS, _UNIFORM = Pass(), Uniform()
_BY_NATURE: dict[str, Rule] = {
    "linear": Zero(),
    "movement": Follow(),
    "selection": Follow(),
    "function": Gradient(),
    "homogeneous": Euler(),
    "embedding": SumFeatures(),
    "rounding": StraightThrough(),
}

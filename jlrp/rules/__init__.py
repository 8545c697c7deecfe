"""Propagation rules, one file a family, and the rule that each operation has by
default.

A rule is a frozen, hashable, printable value. Composites assign rules to operations;
``register_rule`` gives one to a primitive of one's own.
"""

# pyright: reportUnknownMemberType=false, reportUnnecessaryIsInstance=false
# (JAX types its functions in part; what users give is checked whatever its type says)

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax.extend.core import Primitive

from jlrp.arguments import shown
from jlrp.errors import InputError
from jlrp.ir.own_primitives import custom_relevance_p
from jlrp.ir.program import Value
from jlrp.ops.base import Operation
from jlrp.ops.context import Context
from jlrp.ops.kinds.activation import ActivationOp
from jlrp.ops.kinds.affine import AffineOp
from jlrp.ops.kinds.embedding import EmbeddingOp
from jlrp.ops.kinds.generic import FunctionOp, HomogeneousOp, RoundingOp, SelectionOp
from jlrp.ops.kinds.linear import LinearOp, MovementOp
from jlrp.ops.kinds.product import ProductOp
from jlrp.ops.kinds.softmax import SoftmaxOp
from jlrp.promise import Parts, Promise
from jlrp.rules.base import Propagation, Rule
from jlrp.rules.elementwise import NativeGradient, Pass
from jlrp.rules.embedding import SumFeatures
from jlrp.rules.gradient import Gradient, Stop
from jlrp.rules.kernel import AlphaBeta, Gamma, GammaMontavon, WSquare, ZBox, ZPlus
from jlrp.rules.linalg import Euler
from jlrp.rules.linear import Epsilon, Flat, Zero
from jlrp.rules.movement import Follow
from jlrp.rules.product import Absolute, Gate, Selective, Uniform
from jlrp.rules.reference import Difference
from jlrp.rules.rounding import StraightThrough
from jlrp.typing import Array, ArrayLike

__all__ = [
    "Absolute",
    "AlphaBeta",
    "Context",
    "Difference",
    "Epsilon",
    "Euler",
    "Flat",
    "Follow",
    "Gamma",
    "GammaMontavon",
    "Gate",
    "Gradient",
    "NativeGradient",
    "Operation",
    "Parts",
    "Pass",
    "Promise",
    "Propagation",
    "Rule",
    "Selective",
    "Stop",
    "StraightThrough",
    "SumFeatures",
    "Uniform",
    "WSquare",
    "ZBox",
    "ZPlus",
    "Zero",
    "register_rule",
    "unregister_rule",
]

RelevanceFunction = Callable[..., Sequence[ArrayLike | None]]


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

    def parts(self, op: Operation, r: Sequence[Parts]) -> Sequence[Parts]:
        return [Parts.VALUE] * len(op.inputs)

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        (equation,) = op.equations
        y = [ctx.read(v) for v in equation.outputs]
        r_out = dict(zip(op.outputs, r, strict=True))
        relevance: list[Array] = []
        for out, number in zip(equation.outputs, y, strict=True):
            promise = r_out.get(out) or Promise()
            relevance.append(promise.resolve(number))
        x = [ctx.read(a) for a in equation.inputs]
        r_in = self.function(relevance, x, y, **equation.params)
        if len(r_in) != len(x):
            raise InputError(
                f"The rule of {equation.primitive.name} returned {len(r_in)} "
                f"relevances for {len(x)} operands; return one each, None for none."
            )
        by_operand = dict(zip(equation.inputs, r_in, strict=True))
        promises: list[Promise | None] = []
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

    def parts(self, op: Operation, r: Sequence[Parts]) -> Sequence[Parts]:
        return [Parts.VALUE] * len(op.inputs)

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        function: RelevanceFunction = op.equations[0].params["rule"]

        def rule(
            r: list[Array], x: list[Array], y: list[Array], **_: object
        ) -> Sequence[ArrayLike | None]:
            return function(r, x, y)

        return Custom(rule).propagate(op, r, ctx)


_registered: dict[Primitive, Rule] = {custom_relevance_p: ByItself()}


def register_rule(primitive: Primitive, rule: Rule | RelevanceFunction) -> None:
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


def unregister_rule(primitive: Primitive) -> None:
    """Take back ``register_rule``; without such a rule, nothing happens."""
    _registered.pop(primitive, None)


def registered() -> dict[Primitive, Rule]:
    """The primitives with a rule of their own, and these rules."""
    return dict(_registered)


def default_rule(op: Operation) -> Rule | None:
    """The rule of an operation's kind, where no composite says otherwise."""
    rule = None if isinstance(op, AffineOp) else _registered.get(op.primitive)
    if rule is not None:
        own = isinstance(rule, ByItself)
        return ByItself(op.equations[0].params["name"]) if own else rule
    if isinstance(op, ActivationOp) and not op.passes:
        return _DEFAULTS[FunctionOp]
    return next((_DEFAULTS[c] for c in type(op).mro() if c in _DEFAULTS), None)


# Made once: the parameters of a rule are checked when it is made.
_DEFAULTS: dict[type, Rule] = {
    ActivationOp: Pass(),
    EmbeddingOp: SumFeatures(),
    FunctionOp: Gradient(),
    HomogeneousOp: Euler(),
    LinearOp: Zero(),
    MovementOp: Follow(),
    ProductOp: Uniform(),
    RoundingOp: StraightThrough(),
    SelectionOp: Follow(),
    SoftmaxOp: Gradient(),
}

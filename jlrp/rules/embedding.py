"""Embeddings: integers get one number each, the sum over what they fetched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as p

from jlrp.ir import jax_compat
from jlrp.ir.homogeneity import is_inexact
from jlrp.ir.primitives import traits
from jlrp.ir.program import Atom, Equation, Value
from jlrp.ops.base import Operation
from jlrp.ops.context import Context, widened
from jlrp.ops.embedding import Embedding
from jlrp.ops.kinds.embedding import EmbeddingOp
from jlrp.promise import Parts, Promise
from jlrp.rules.base import Causes, Propagation, Rule, refuse
from jlrp.rules.reference import constants_of, multipliers_of
from jlrp.typing import Array, ArrayLike, DTypeLike


@dataclass(frozen=True)
class SumFeatures(Rule):
    """The relevance of an integer is the sum over the features that it fetched.

    An output made of several integers is shared equally among them.
    """

    def needs(self, op: Operation) -> tuple[Value, ...]:
        return op.inputs + op.outputs

    def parts(self, op: Operation, r: Sequence[Parts]) -> Sequence[Parts]:
        return [Parts.VALUE] * len(op.inputs)

    def check(self, op: Operation) -> None:
        if not isinstance(op, EmbeddingOp):
            refuse(self, op, "it turns no integer input into floats")

    def from_reference(self, op: Operation) -> Rule:
        return self

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        (promise,) = r
        assert promise is not None and isinstance(op, EmbeddingOp)
        relevance = promise.resolve(ctx.difference(op.outputs[0]))
        integers = {v: ctx.read(v) for v in op.inputs}
        numbers = ctx.run(op.equations, op.constants, integers)
        spread = _Spread(op.embedding, numbers, relevance.dtype)
        ones = [jnp.ones(v.shape, relevance.dtype) for v in op.inputs]
        carriers, pull = jax.vjp(spread, *ones)
        reached = lax.gt(carriers, jnp.zeros_like(carriers))
        share = relevance / jnp.where(reached, carriers, 1)
        r_in = pull(jnp.where(reached, share, 0))

        def causes() -> Causes:
            return {"constants": jnp.sum(jnp.where(reached, 0, relevance))}

        values = [
            value.astype(widened(v).dtype) if is_inexact(v) else value
            for v, value in zip(op.inputs, r_in, strict=True)
        ]
        promises = [Promise(value=value) for value in values]
        if ctx.reference is None:
            return Propagation(promises, causes)
        constants = constants_of(op, multipliers_of(op, r, ctx), ctx)
        return Propagation(promises, causes, constants=constants)


class _Spread:
    """Spreads one number an integer over the floats that the integer became.

    The embedding's own equations, run on numbers in place of the integers: movement
    moves them, arithmetic passes them on, a gather hands each row its index's number.
    """

    def __init__(
        self, embedding: Embedding, numbers: Mapping[Value, Array], dtype: DTypeLike
    ):
        self.embedding, self.numbers, self.dtype = embedding, numbers, dtype

    def __call__(self, *carried: Array) -> Array:
        env = dict(zip(self.embedding.sources, carried, strict=True))
        for equation in self.embedding.equations:
            (out,) = equation.outputs
            if out in self.embedding.carried or out is self.embedding.end:
                env[out] = self._passed(equation, env)
        return env[self.embedding.end]

    def _passed(self, equation: Equation, env: Mapping[Value, Array]) -> Array:
        prim, shape = equation.primitive, equation.outputs[0].shape
        row = traits(equation)
        carried = [env[a] for a in equation.inputs if a in env]  # type: ignore[operator]
        if row.fetches and equation.inputs[0] not in env:
            return self._fetched(equation, env)
        if prim is p.convert_element_type_p:
            return carried[0]
        if (
            prim is p.dot_general_p
        ):  # of a one-hot code: each row is that of its integer
            return _taken(equation, env)
        chooses = prim is p.select_n_p and equation.inputs[0] not in env
        if prim is p.eq_p or (row.codes == "computes" and not chooses):
            return sum(jnp.broadcast_to(t, shape) for t in carried)  # type: ignore
        args = [
            self._stand_in(a, i, equation, env) for i, a in enumerate(equation.inputs)
        ]
        return jax_compat.bind(prim, equation.params, args)[0]

    def _stand_in(
        self, atom: Atom, index: int, equation: Equation, env: Mapping[Value, Array]
    ) -> ArrayLike:
        """The number carried by an operand; indices and predicates as they are."""
        if isinstance(atom, Value) and atom in env:
            return env[atom]
        number = atom.number if not isinstance(atom, Value) else self.numbers[atom]
        steers = index in traits(equation).steering
        return number if steers else jnp.zeros(jnp.shape(number), self.dtype)

    def _fetched(self, equation: Equation, env: Mapping[Value, Array]) -> Array:
        shape = equation.outputs[0].shape
        if equation.primitive is p.dynamic_slice_p:
            indices = [env[a] for a in equation.inputs[1:] if a in env]  # type: ignore
            return jnp.broadcast_to(sum(indices), shape)
        numbers = equation.params["dimension_numbers"]
        rows = tuple(i for i in range(len(shape)) if i not in numbers.offset_dims)
        carried = jnp.sum(env[equation.inputs[1]], -1)  # type: ignore[index]
        return lax.broadcast_in_dim(carried, shape, rows)


def _taken(dot: Equation, env: Mapping[Value, Array]) -> Array:
    """What a one-hot code carries, over the rows of a table that it takes."""
    contracting, _ = dot.params["dimension_numbers"]
    i = int(dot.inputs[1] in env)
    code = env[dot.inputs[i]]  # type: ignore[index]
    count = math.prod(code.shape[k] for k in contracting[i])
    table = jnp.full(dot.inputs[1 - i].shape, 1 / count, code.dtype)
    operands = (table, code) if i else (code, table)
    return jax_compat.bind(dot.primitive, dot.params, operands)[0]

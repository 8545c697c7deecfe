"""What one device computes of its shards, its collectives as sums and movements.

Where devices add partial results (``psum(x @ w)`` with a contraction that is sharded),
the sum goes into the contraction: only the whole ``z`` is a value of the one-device
program, and the rules that look at ``z`` must see no other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Primitive
from jax.extend.core import primitives as p

from jlrp.errors import UnsupportedPrimitiveError
from jlrp.ir import jax_compat
from jlrp.ir.declared import Declared
from jlrp.ir.jax_compat import JaxAtom, Jaxpr, JaxprEqn, Mesh, Params
from jlrp.ir.own_primitives import custom_relevance_p
from jlrp.ir.primitives import traits
from jlrp.ir.sharding.axes import (
    Array,
    gathered_p,
    joined,
    moved,
    own_p,
    permuted,
    split,
)
from jlrp.ir.sharding.variation import (
    NOWHERE,
    Axes,
    mesh_axes,
    named,
    of_scan,
    variation,
)
from jlrp.typing import PyTree

Nested = Callable[[JaxprEqn], tuple[Jaxpr, Sequence[Array]] | None]


@dataclass(eq=False, slots=True)
class Shard:
    """A value of the body, as one device has it.

    Attributes:
      varies: the mesh axes along which devices may have different ones.
      equation: what made it, of these operands, in this scope; None for inputs.
    """

    number: Any  # an array of JAX; of literals, of NumPy
    varies: Axes = NOWHERE
    equation: JaxprEqn | None = None
    operands: Sequence[Shard] = ()
    scope: str = ""


class Device:
    """Runs a body as one device of a mesh does.

    Args:
      declared: derivatives that stand for a call's body.
      nested: the body of a ``shard_map`` inside, as a jaxpr.
    """

    def __init__(self, mesh: Mesh, declared: Declared, nested: Nested):
        self.mesh, self.declared, self.nested = mesh, declared, nested
        self.sizes = dict(mesh.shape)
        self._sums: dict[tuple[Shard, Axes], Array] = {}
        self._partial: dict[tuple[Shard, Axes], bool] = {}

    def run(
        self,
        jaxpr: Jaxpr,
        consts: Sequence[Array],
        arguments: Sequence[Shard],
        scope: str = "",
    ) -> list[Shard]:
        env: dict[JaxAtom, Shard] = dict(
            zip(jaxpr.constvars, map(Shard, consts), strict=True)
        )
        env.update(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: JaxAtom) -> Shard:
            if jax_compat.is_literal(atom):
                return Shard(jax_compat.literal_value(atom))
            return env[atom]

        for eqn in jaxpr.eqns:
            path = "/".join(
                filter(None, [scope, jax_compat.scope_path(eqn.source_info)])
            )
            operands = [read(a) for a in eqn.invars]
            call = jax_compat.call_body(eqn)
            if call is not None and not self.declared.keeps(eqn):
                outs = self.run(*call, operands, path)
            else:
                with jax_compat.naming(eqn.source_info, path):
                    outs = self.shards(eqn, operands, path)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(a) for a in jaxpr.outvars]

    def shards(
        self, eqn: JaxprEqn, operands: Sequence[Shard], scope: str
    ) -> list[Shard]:
        if eqn.primitive.name in _UNCHANGED:
            return list(operands)
        numbers = self.numbers(eqn, operands)
        varies = variation(eqn, [o.varies for o in operands])
        return [
            Shard(number, axes, eqn, operands, scope)
            for number, axes in zip(numbers, varies, strict=True)
        ]

    def numbers(self, eqn: JaxprEqn, operands: Sequence[Shard]) -> Sequence[Array]:
        params, x = eqn.params, [o.number for o in operands]
        inner = self.nested(eqn)
        if inner is not None:
            return jax.core.eval_jaxpr(*inner, *x)  # type: ignore[attr]
        collective = _COLLECTIVES.get(eqn.primitive.name)
        if collective is not None:
            if params.get("axis_index_groups") is not None:
                raise UnsupportedPrimitiveError(_refused(eqn, "of groups of devices"))
            if any(isinstance(axis, int) for axis in named(params)):
                why = "over axes of the mesh and of vmap together"
                raise UnsupportedPrimitiveError(_refused(eqn, why))
            return [collective(self, eqn, *operands)]
        if any(isinstance(name, str) for name in named(params)):
            raise UnsupportedPrimitiveError(_refused(eqn, "between devices"))
        rebuild = _LOOPS.get(eqn.primitive)
        if rebuild is not None:
            return rebuild(self, eqn, operands)
        if eqn.primitive.name == _RAGGED:  # mapped over the leading axis alone
            over = sorted(frozenset[str]().union(*(o.varies for o in operands)))
            x = [self._leading(o.number, over) for o in operands]
        if eqn.primitive is p.sharding_constraint_p:
            return [jax_compat.constrained_again(x[0], params, self.mesh)]
        if eqn.primitive is custom_relevance_p:
            params = {**params, "body": self.retraced(params["body"])}
        return jax_compat.bind(eqn.primitive, jax_compat.unplaced(params), x)

    def retraced(self, closed: ClosedJaxpr) -> ClosedJaxpr:
        """A body whose values do not say along which axes they vary."""
        jaxpr, consts = jax_compat.open_jaxpr(closed)
        shapes = [jax_compat.shape_of(v) for v in jaxpr.invars]

        def body(*x: Array) -> list[Array]:
            return [s.number for s in self.run(jaxpr, consts, list(map(Shard, x)))]

        return jax.make_jaxpr(body)(*shapes)

    def gathered(self, x: Array, names: Iterable[str]) -> Array:
        """The values of all devices of some axes, along one new leading axis."""
        names = tuple(names)
        for name in reversed(names):
            x = gathered_p.bind(x, axis=name, size=self.sizes[name])
        n = len(names)
        if n == 1:
            return x
        return lax.reshape(x, (math.prod(x.shape[:n]), *x.shape[n:]))

    def own(self, x: Array, names: Sequence[str]) -> Array:
        """The slice of the leading axis that is this device's."""
        sizes = [self.sizes[name] for name in names]
        if len(names) > 1:
            x = lax.reshape(x, (*sizes, *x.shape[1:]))
        for name in names:
            x = own_p.bind(x, axis=name)
        return x

    def _leading(self, x: Array, names: Iterable[str]) -> Array:
        """A value with its axes over devices in front."""
        for name in names:
            x = self.own(self.gathered(x, [name]), [name])
        return x

    def _ragged(
        self, eqn: JaxprEqn, operands: Sequence[Shard], names: Sequence[str]
    ) -> Array:
        """With the features of all devices; JAX maps it in full or not at all."""
        numbers = eqn.params["ragged_dot_dimension_numbers"]
        (summed, _) = numbers.dot_dimension_numbers
        both = []
        for shard, (axis, *_) in zip(operands, summed, strict=False):
            whole = self.gathered(shard.number, names)
            both.append(joined(moved(whole, 0, axis), axis))
        x = [self._leading(v, names) for v in (*both, operands[2].number)]
        (out,) = jax_compat.bind(eqn.primitive, jax_compat.unplaced(eqn.params), x)
        return lax.index_in_dim(self.gathered(out, names), 0, 0, keepdims=False)

    def count(self, names: Iterable[str]) -> int:
        return math.prod(self.sizes[name] for name in names)

    # Sums over devices, put where the one-device program has them.

    def summed(self, shard: Shard, axes: Axes) -> Array:
        """The sum over all devices of some axes."""
        key = (shard, axes)
        if key not in self._sums:
            self._sums[key] = self._summed(shard, axes)
        return self._sums[key]

    def _summed(self, shard: Shard, axes: Axes) -> Array:
        among, alike = axes & shard.varies, axes - shard.varies
        if alike:  # so many times the same
            total = self.summed(shard, among) if among else shard.number
            return lax.mul(total, np.asarray(self.count(alike), total.dtype))
        eqn, operands = shard.equation, shard.operands
        if eqn is not None and self.is_partial(shard, axes):
            with jax_compat.naming(eqn.source_info, shard.scope):
                contract = _CONTRACTIONS.get(eqn.primitive)
                if contract is not None:
                    whole = [self.gathered(o.number, sorted(axes)) for o in operands]
                    return contract(jax_compat.unplaced(eqn.params), *whole)
                if eqn.primitive.name == _RAGGED:
                    return self._ragged(eqn, operands, sorted(axes))
                scales = traits(eqn).scaling
                totals = [
                    o.number if scales and not axes & o.varies else self.summed(o, axes)
                    for o in operands
                ]
                params = jax_compat.unplaced(eqn.params)
                (total,) = jax_compat.bind(eqn.primitive, params, totals)
                return total
        whole = self.gathered(shard.number, sorted(axes))
        if _is_masked(shard, axes):
            return lax.reduce(whole, np.asarray(0, whole.dtype), _one_of, (0,))
        return lax.reduce_sum(whole, (0,))

    def is_partial(self, shard: Shard, axes: Axes) -> bool:
        """Whether it is a part of contractions over devices, up to linear steps."""
        key = (shard, axes)
        if key not in self._partial:
            self._partial[key] = self._is_partial(shard, axes)
        return self._partial[key]

    def _is_partial(self, shard: Shard, axes: Axes) -> bool:
        if shard.equation is None or not axes <= shard.varies:
            return False
        prim, operands = shard.equation.primitive, shard.operands
        if prim is p.reduce_sum_p:
            return True
        if prim in (p.dot_general_p, p.conv_general_dilated_p):
            return all(axes <= o.varies for o in operands)
        if prim.name == _RAGGED:  # in groups of the same sizes everywhere
            *both, sizes = operands
            sums = all(axes <= o.varies for o in both) and not axes & sizes.varies
            return sums and _sums_no_groups(shard.equation.params)
        if traits(shard.equation).addition:
            return any(self.is_partial(o, axes) for o in operands)
        if traits(shard.equation).scaling:
            of = [o for o in operands if axes & o.varies]
            divides = prim is p.div_p and of != [operands[0]]
            return len(of) == 1 and not divides and self.is_partial(of[0], axes)
        return _moves_linearly(shard.equation) and self.is_partial(operands[0], axes)

    # Collectives.

    def psum(self, eqn: JaxprEqn, x: Shard) -> Array:
        return self.summed(x, frozenset(mesh_axes(eqn.params)))

    def selected(self, eqn: JaxprEqn, x: Shard) -> Array:
        """``pmax`` and ``pmin``; of a local maximum, the maximum of all."""
        largest = eqn.primitive is p.pmax_p
        local, select = (
            (p.reduce_max_p, lax.reduce_max)
            if largest
            else (p.reduce_min_p, lax.reduce_min)
        )
        names, made = mesh_axes(eqn.params), x.equation
        if made is not None and made.primitive is local:
            (operand,) = x.operands
            axes = (0, *(a + 1 for a in made.params["axes"]))
            return select(self.gathered(operand.number, names), axes)
        return select(self.gathered(x.number, names), (0,))

    def all_gather(self, eqn: JaxprEqn, x: Shard) -> Array:
        names, axis = mesh_axes(eqn.params), eqn.params["all_gather_dimension"]
        whole = self.gathered(x.number, names)
        if not eqn.params["tiled"]:
            return moved(whole, 0, axis)
        return joined(moved(whole, 0, axis), axis)

    def ppermute(self, eqn: JaxprEqn, x: Shard) -> Array:
        names = mesh_axes(eqn.params)
        whole = self.gathered(x.number, names)
        return self.own(permuted(whole, eqn.params["perm"]), names)

    def reduce_scatter(self, eqn: JaxprEqn, x: Shard) -> Array:
        names, axis = mesh_axes(eqn.params), eqn.params["scatter_dimension"]
        total = self.summed(x, frozenset(names))
        if eqn.params["tiled"]:
            total = split(total, axis, self.count(names))
        return self.own(moved(total, axis, 0), names)

    def all_to_all(self, eqn: JaxprEqn, x: Shard) -> Array:
        params, names = eqn.params, mesh_axes(eqn.params)
        cut, concat = params["split_axis"], params["concat_axis"]
        whole = self.gathered(x.number, names)  # by sender
        if params["tiled"]:
            whole = split(whole, cut + 1, self.count(names))
        received = self.own(moved(whole, cut + 1, 0), names)
        received = moved(received, 0, concat)
        return joined(received, concat) if params["tiled"] else received

    def pbroadcast(self, eqn: JaxprEqn, x: Shard) -> Array:
        whole = self.gathered(x.number, mesh_axes(eqn.params))
        return lax.index_in_dim(whole, eqn.params["source"], 0, keepdims=False)

    def axis_index(self, eqn: JaxprEqn) -> Array:
        names = mesh_axes(eqn.params)
        return self.own(lax.iota(np.int32, self.count(names)), names)

    # Loops and branches, with the collectives in their bodies.

    def scan(self, eqn: JaxprEqn, operands: Sequence[Shard]) -> Sequence[Array]:
        ((body, consts),) = jax_compat.bodies(eqn)
        c, n = jax_compat.scan_counts(eqn.params)
        varies = [o.varies for o in operands]
        varies[c : c + n] = of_scan(eqn, varies)[:n]
        x = [o.number for o in operands]

        def step(carry: PyTree, slices: PyTree) -> PyTree:
            numbers = [*x[:c], *carry, *slices]
            outs = self._body(body, consts, numbers, varies)
            return outs[:n], outs[n:]

        carry, ys = lax.scan(
            step,
            x[c : c + n],
            x[c + n :],
            length=eqn.params["length"],
            reverse=eqn.params["reverse"],
            unroll=eqn.params["unroll"],
        )
        return [*carry, *ys]

    def cond(self, eqn: JaxprEqn, operands: Sequence[Shard]) -> Sequence[Array]:
        index, *x = (o.number for o in operands)
        varies = [o.varies for o in operands[1:]]

        def branch(jaxpr: Jaxpr, consts: Sequence[Array]) -> Callable[..., list[Array]]:
            return lambda *x: self._body(jaxpr, consts, x, varies)

        branches = [branch(*body) for body in jax_compat.bodies(eqn)]
        return lax.switch(index, branches, *x)

    def loop(self, eqn: JaxprEqn, operands: Sequence[Shard]) -> Sequence[Array]:
        condition, body = jax_compat.bodies(eqn)
        n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        varies = [o.varies for o in operands]
        varies[n + m :] = variation(eqn, varies)
        x = [o.number for o in operands]

        def goes_on(carry: PyTree) -> Array:
            numbers = [*x[:n], *carry]
            (out,) = self._body(*condition, numbers, varies[:n] + varies[n + m :])
            return out

        def step(carry: PyTree) -> PyTree:
            return self._body(*body, [*x[n : n + m], *carry], varies[n:])

        return lax.while_loop(goes_on, step, x[n + m :])

    def _body(
        self,
        jaxpr: Jaxpr,
        consts: Sequence[Array],
        numbers: Sequence[Array],
        varies: Sequence[Axes],
    ) -> list[Array]:
        # Of its own, since sums are numbers of the trace in which they were made.
        inside = Device(self.mesh, self.declared, self.nested)
        shards = [Shard(x, axes) for x, axes in zip(numbers, varies, strict=True)]
        return [out.number for out in inside.run(jaxpr, consts, shards)]


# Contractions of what all devices have, along a new leading axis of each operand.


def _dot(params: Params, a: Array, b: Array) -> Array:
    contracting, batch = params["dimension_numbers"]
    (a_summed, b_summed), (a_batch, b_batch) = (
        [[i + 1 for i in axes] for axes in pair] for pair in (contracting, batch)
    )
    numbers = (((0, *a_summed), (0, *b_summed)), (tuple(a_batch), tuple(b_batch)))
    (out,) = jax_compat.bind(
        p.dot_general_p, {**params, "dimension_numbers": numbers}, [a, b]
    )
    return out


def _convolution(params: Params, x: Array, kernel: Array) -> Array:
    """With the channels of all devices: group by group, if there are groups."""
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    channels, of_kernel = numbers.lhs_spec[1], numbers.rhs_spec[1]
    x = moved(split(x, channels + 1, groups), 0, channels + 1)
    x = joined(joined(x, channels + 1), channels)
    kernel = joined(moved(kernel, 0, of_kernel), of_kernel)
    (out,) = jax_compat.bind(p.conv_general_dilated_p, params, [x, kernel])
    return out


_RAGGED = "ragged_dot_general"


def _sums_no_groups(params: Params) -> bool:
    """Whether the groups are of rows, not of the features that are summed over."""
    numbers = params["ragged_dot_dimension_numbers"]
    (summed, _), _ = numbers.dot_dimension_numbers
    return len(summed) > 0 and not {*summed} & {*numbers.lhs_ragged_dimensions}


def _sum(params: Params, x: Array) -> Array:
    return lax.reduce_sum(x, (0, *(a + 1 for a in params["axes"])))


_CONTRACTIONS: dict[Primitive, Callable[..., Array]] = {
    p.dot_general_p: _dot,
    p.conv_general_dilated_p: _convolution,
    p.reduce_sum_p: _sum,
}


def _moves_linearly(eqn: JaxprEqn) -> bool:
    """Whether a sum over devices may be taken before it instead of behind it."""
    return traits(eqn).view or eqn.primitive is p.neg_p


def _is_masked(shard: Shard, axes: Axes) -> bool:
    """Whether each device has zeros but where it is the one that knows the number.

    A table that is spread by its rows is read like this. On one device it is no sum.
    """
    eqn = shard.equation
    if eqn is None or eqn.primitive is not p.select_n_p:
        return False
    which, *cases = shard.operands
    return axes <= which.varies and any(map(_is_zero, cases))


def _is_zero(shard: Shard) -> bool:
    while shard.equation is not None:
        if not _moves_linearly(shard.equation):
            return False
        (shard,) = shard.operands
    return not jax_compat.is_tracer(shard.number) and not np.any(
        np.asarray(shard.number)
    )


def _one_of(a: Array, b: Array) -> Array:
    """What a reduction adds that rules for sums need not stabilise."""
    return lax.add(a, b)


_UNCHANGED = ("pvary", "pcast")
_COLLECTIVES: dict[str, Callable[..., Array]] = {
    "all_gather": Device.all_gather,
    "all_gather_invariant": Device.all_gather,
    "all_to_all": Device.all_to_all,
    "axis_index": Device.axis_index,
    "pbroadcast": Device.pbroadcast,
    "pmax": Device.selected,
    "pmin": Device.selected,
    "ppermute": Device.ppermute,
    "psum": Device.psum,
    "psum_invariant": Device.psum,
    "reduce_scatter": Device.reduce_scatter,
}
_LOOPS: dict[Primitive, Callable[..., Sequence[Array]]] = {
    p.scan_p: Device.scan,
    p.cond_p: Device.cond,
    p.while_p: Device.loop,
}


def _refused(eqn: JaxprEqn, why: str) -> str:
    where = jax_compat.source_line(eqn.source_info)
    return (
        f"`{eqn.primitive.name}` {why}, inside a shard_map, at "
        f"{jax_compat.scope_path(eqn.source_info) or 'top level'} ({where}), has no "
        "form in one program of all devices. Give the shard_map as a whole a rule with "
        "@jlrp.custom_relevance, or spell it with other collectives."
    )

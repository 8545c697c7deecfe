"""A ``shard_map`` as the one-device program that it spreads over devices.

The relevance of a program must not depend on where it runs. So the body of a
``shard_map``, which says what each device computes of its shard, is written as what all
devices compute together: its values get an axis for each mesh axis along which they
vary, and its collectives become sums, slices and transposes along these axes. The facts
and rules then see an ordinary program. Its arrays keep their sharding, from which XLA
makes local work and collectives again.

Where devices add partial results (``psum(x @ w)`` with a contraction that is sharded),
the sum goes into the contraction: only the whole ``z`` is a value of the one-device
program, and the rules that look at ``z`` must see no other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.extend.core import primitives as p

from jlrp import _jax
from jlrp.errors import UnsupportedPrimitiveError
from jlrp.primitives import custom_relevance_p

Array = Any
Axes = frozenset[str]
NOWHERE: Axes = frozenset()

# Two primitives that say how the values of all devices relate to those of one. They
# exist while a body is traced for one device: laid out for all, nothing of them is
# left.

gathered_p = Primitive("gathered")
own_p = Primitive("own")


@gathered_p.def_abstract_eval
def _gathered_shape(x: Any, *, axis: str, size: int) -> Any:
    return jax.core.ShapedArray((size, *x.shape), x.dtype)  # type: ignore[attr]


@own_p.def_abstract_eval
def _own_shape(x: Any, *, axis: str) -> Any:
    return jax.core.ShapedArray(x.shape[1:], x.dtype)  # type: ignore[attr]


def _lay_out_gathered(mapped: Any, args: Any, dims: Any, *, axis: str, size: int):
    (x,), (dim,) = args, dims
    if mapped.name != axis:
        out = gathered_p.bind(x, axis=axis, size=size)
        return out, None if dim is None else dim + 1
    if dim is None:
        return jnp.broadcast_to(x, (size, *x.shape)), None
    return (x if dim == 0 else jnp.moveaxis(x, dim, 0)), None


def _lay_out_own(mapped: Any, args: Any, dims: Any, *, axis: str):
    (x,), (dim,) = args, dims
    if mapped.name == axis:
        if dim is None:
            return x, 0
        return jnp.moveaxis(jnp.diagonal(x, 0, dim, 0 if dim else 1), -1, 0), 0
    if dim is None:
        return own_p.bind(x, axis=axis), None
    if dim == 0:
        x, dim = jnp.moveaxis(x, 0, 1), 1
    return own_p.bind(x, axis=axis), dim - 1


_jax.define_layout(gathered_p, _lay_out_gathered)
_jax.define_layout(own_p, _lay_out_own)


def one_program(eqn: Any, mesh: Any = None) -> tuple[Any, Sequence[Any]] | None:
    """What all devices of a ``shard_map`` compute: a jaxpr; of other equations, None.

    Also of a collective over an axis of ``vmap``, which JAX leaves as a reduction under
    the collective's name. ``mesh`` is that of a ``shard_map`` around this one.

    Raises:
      UnsupportedPrimitiveError: for a collective that has no such form.
    """
    sharded = _jax.sharded_body(eqn)
    shapes = [jax.ShapeDtypeStruct(a.aval.shape, a.aval.dtype) for a in eqn.invars]
    if sharded is not None:
        if mesh is not None:
            sharded = sharded._replace(mesh=mesh)
        return _laid_out(sharded, tuple(shapes))
    reduction = _OF_VMAP.get(eqn.primitive)
    if reduction is None or not all(isinstance(a, int) for a in _named(eqn.params)):
        return None
    return _jax.open_jaxpr(
        jax.make_jaxpr(lambda *x: [reduction(v, _named(eqn.params)) for v in x])(
            *shapes
        )
    )


_OF_VMAP = {
    p.psum_p: lax.reduce_sum,
    p.pmax_p: lax.reduce_max,
    p.pmin_p: lax.reduce_min,
}


@functools.lru_cache(maxsize=256)
def _laid_out(sharded: _jax.Sharded, shapes: tuple[Any, ...]) -> tuple[Any, Any]:
    sizes = {name: sharded.mesh.shape[name] for name in sharded.axes}
    kept = [_Layout(spec, sizes) for spec in sharded.in_specs]
    made = [_Layout(spec, sizes) for spec in sharded.out_specs]

    def on_one_device(*shards: Array) -> list[Array]:
        arguments = [
            Shard(number, layout.axes)
            for number, layout in zip(shards, kept, strict=True)
        ]
        outs = _Device(sizes, sharded.mesh).run(sharded.jaxpr, (), arguments)
        return [
            _first(out, out.varies - layout.axes, sizes)
            for out, layout in zip(outs, made, strict=True)
        ]

    function: Callable[..., list[Array]] = on_one_device
    ranks = [len(v.aval.shape) for v in sharded.jaxpr.invars]
    out_ranks = [len(a.aval.shape) for a in sharded.jaxpr.outvars]
    names = list(sizes)
    for i in reversed(range(len(names))):  # the innermost maps the last axis
        inside = names[i:]
        function = jax.vmap(
            function,
            [layout.position(inside, rank) for layout, rank in zip(kept, ranks)],  # noqa: B905
            [layout.position(inside, rank) for layout, rank in zip(made, out_ranks)],  # noqa: B905
            axis_name=names[i],
            axis_size=sizes[names[i]],
        )

    def on_all_devices(*arrays: Array) -> list[Array]:
        split = [
            _constrained(layout.split(x), layout, sharded)
            for x, layout in zip(arrays, kept, strict=True)
        ]
        outs = function(*split)
        return [
            layout.merged(_constrained(y, layout, sharded))
            for y, layout in zip(outs, made, strict=True)
        ]

    with _jax.automatically():
        return _jax.open_jaxpr(jax.make_jaxpr(on_all_devices)(*shapes))


class _Layout:
    """How an array is spread: its axes over the devices of some mesh axes each.

    Split, it has an axis for each of these mesh axes, before the axis that it shards.
    """

    def __init__(self, spec: Any, sizes: dict[str, int]):
        parts = [() if part is None else part for part in spec]
        parts = [(part,) if isinstance(part, str) else tuple(part) for part in parts]
        self.by_axis = [[name for name in part if name in sizes] for part in parts]
        self.sizes = sizes

    @property
    def axes(self) -> Axes:
        return frozenset(name for part in self.by_axis for name in part)

    def labels(self, rank: int) -> list[str | None]:
        """The axes of the split array: names of mesh axes, None for its own."""
        found: list[str | None] = []
        for i in range(rank):
            found += self.by_axis[i] if i < len(self.by_axis) else []
            found.append(None)
        return found

    def position(self, inside: Sequence[str], rank: int) -> int | None:
        """Where the first of some mesh axes is, the others of them present."""
        labels = [n for n in self.labels(rank) if n is None or n in inside]
        return labels.index(inside[0]) if inside[0] in labels else None

    def split(self, x: Array) -> Array:
        if not self.axes:
            return x
        shape: list[int] = []
        for i, size in enumerate(x.shape):
            names = self.by_axis[i] if i < len(self.by_axis) else []
            over = [self.sizes[name] for name in names]
            shape += [*over, size // math.prod(over)]
        return lax.reshape(x, shape)

    def merged(self, x: Array) -> Array:
        if not self.axes:
            return x
        shape: list[int] = []
        size = 1
        for label, n in zip(self.labels(x.ndim - len(self.axes)), x.shape, strict=True):
            size *= n
            if label is None:
                shape.append(size)
                size = 1
        return lax.reshape(x, shape)


def _constrained(x: Array, layout: _Layout, sharded: _jax.Sharded) -> Array:
    """The split array, each of its mesh axes spread over the devices of that axis."""
    if not layout.axes:
        return x
    labels = layout.labels(x.ndim - len(layout.axes))
    return _jax.spread(x, sharded.mesh, labels)


def _first(shard: Shard, axes: Iterable[str], sizes: dict[str, int]) -> Array:
    """A value that is the same on all devices of some axes, though nothing shows it."""
    number = shard.number
    for axis in sorted(axes):
        number = gathered_p.bind(number, axis=axis, size=sizes[axis])
        number = lax.index_in_dim(number, 0, 0, keepdims=False)
    return number


@dataclass(eq=False, slots=True)
class Shard:
    """A value of the body, as one device has it.

    Attributes:
      varies: the mesh axes along which devices may have different ones.
      equation: what made it, of these operands, in this scope; None for inputs.
    """

    number: Array
    varies: Axes = NOWHERE
    equation: Any = None
    operands: Sequence[Shard] = ()
    scope: str = ""


# What of a value's axes its equation's outputs vary along, without any number.

_AGREED = ("psum", "psum_invariant", "pmax", "pmin", "all_gather")
_AGREED += ("all_gather_invariant", "pbroadcast")


def _named(params: dict[str, Any]) -> tuple[str, ...]:
    """The mesh axes that a collective names."""
    names = params.get("axes", params.get("axis_name", ()))
    return tuple(names) if isinstance(names, tuple | list) else (names,)


def _variation(eqn: Any, operands: Sequence[Axes]) -> list[Axes]:
    """The axes along which the outputs vary, from those of the operands."""
    params, everywhere = eqn.params, NOWHERE.union(*operands)
    name = eqn.primitive.name
    if name == "axis_index":
        everywhere = frozenset(_named(params))
    elif name in _AGREED:
        everywhere -= frozenset(_named(params))
    elif (call := _jax.call_body(eqn)) is not None:
        return _variations(call[0], operands)
    elif eqn.primitive is p.scan_p:
        return _of_scan(eqn, operands)
    elif eqn.primitive is p.cond_p:
        bodies = [_variations(b, operands[1:]) for b, _ in _jax.bodies(eqn)]
        columns = zip(*bodies, strict=True)
        return [operands[0].union(*column) for column in columns]
    elif eqn.primitive is p.while_p:
        (condition, _), (body, _) = _jax.bodies(eqn)
        n, m = params["cond_nconsts"], params["body_nconsts"]
        first, constants, carry = operands[:n], operands[n : n + m], operands[n + m :]

        def again(carry: Sequence[Axes]) -> list[Axes]:
            (goes_on,) = _variations(condition, [*first, *carry])
            return [a | goes_on for a in _variations(body, [*constants, *carry])]

        return _settled(again, carry)
    return [everywhere] * len(eqn.outvars)


def _of_scan(eqn: Any, operands: Sequence[Axes]) -> list[Axes]:
    ((body, _),) = _jax.bodies(eqn)
    c, n = _jax.scan_counts(eqn.params)
    constants, carry, slices = operands[:c], operands[c : c + n], operands[c + n :]
    carry = _settled(
        lambda carry: _variations(body, [*constants, *carry, *slices])[:n], carry
    )
    return [*carry, *_variations(body, [*constants, *carry, *slices])[n:]]


def _settled(
    again: Callable[[Sequence[Axes]], list[Axes]], carry: Sequence[Axes]
) -> list[Axes]:
    carry = list(carry)
    while True:
        grown = [a | b for a, b in zip(carry, again(carry), strict=True)]
        if grown == carry:
            return carry
        carry = grown


def _variations(jaxpr: Any, inputs: Sequence[Axes]) -> list[Axes]:
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def of(atom: Any) -> Axes:
        return NOWHERE if _jax.is_literal(atom) else known.get(atom, NOWHERE)

    for eqn in jaxpr.eqns:
        outs = _variation(eqn, [of(a) for a in eqn.invars])
        known.update(zip(eqn.outvars, outs, strict=True))
    return [of(a) for a in jaxpr.outvars]


class _Device:
    """Runs a body as one device does, with collectives of the two primitives above."""

    def __init__(self, sizes: dict[str, int], mesh: Any):
        self.sizes, self.mesh = sizes, mesh
        self._sums: dict[tuple[Shard, Axes], Array] = {}
        self._partial: dict[tuple[Shard, Axes], bool] = {}

    def run(
        self,
        jaxpr: Any,
        consts: Sequence[Any],
        arguments: Sequence[Shard],
        scope: str = "",
    ) -> list[Shard]:
        env = dict(zip(jaxpr.constvars, map(Shard, consts), strict=True))
        env.update(zip(jaxpr.invars, arguments, strict=True))

        def read(atom: Any) -> Shard:
            literal = _jax.is_literal(atom)
            return Shard(_jax.literal_value(atom)) if literal else env[atom]

        for eqn in jaxpr.eqns:
            path = "/".join(filter(None, [scope, _jax.scope_path(eqn.source_info)]))
            operands = [read(a) for a in eqn.invars]
            call = _jax.call_body(eqn)
            if call is not None:
                outs = self.run(*call, operands, path)
            else:
                with _jax.naming(eqn.source_info, path):
                    outs = self.shards(eqn, operands, path)
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(a) for a in jaxpr.outvars]

    def shards(self, eqn: Any, operands: Sequence[Shard], scope: str) -> list[Shard]:
        if eqn.primitive.name in _UNCHANGED:
            return list(operands)
        numbers = self.numbers(eqn, operands)
        varies = _variation(eqn, [o.varies for o in operands])
        return [
            Shard(number, axes, eqn, operands, scope)
            for number, axes in zip(numbers, varies, strict=True)
        ]

    def numbers(self, eqn: Any, operands: Sequence[Shard]) -> Sequence[Array]:
        params, x = eqn.params, [o.number for o in operands]
        inner = one_program(eqn, self.mesh)
        if inner is not None:
            return jax.core.eval_jaxpr(*inner, *x)  # type: ignore[attr]
        collective = _COLLECTIVES.get(eqn.primitive.name)
        if collective is not None:
            if params.get("axis_index_groups") is not None:
                raise UnsupportedPrimitiveError(_refused(eqn, "of groups of devices"))
            return [collective(self, eqn, *operands)]
        if eqn.primitive.name in _WITHOUT_FORM:
            raise UnsupportedPrimitiveError(_refused(eqn, _WITHOUT_FORM_WHY))
        rebuild = _LOOPS.get(eqn.primitive)
        if rebuild is not None:
            return rebuild(self, eqn, operands)
        if eqn.primitive is p.sharding_constraint_p:
            return [_jax.constrained_again(x[0], params, self.mesh)]
        if eqn.primitive is custom_relevance_p:
            params = {**params, "body": self.retraced(params["body"])}
        return _jax.bind(eqn.primitive, _jax.unplaced(params), x)

    def retraced(self, closed: Any) -> Any:
        """A body whose values do not say along which axes they vary."""
        jaxpr, consts = _jax.open_jaxpr(closed)
        shapes = [
            jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in jaxpr.invars
        ]

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
        if self.is_partial(shard, axes):
            with _jax.naming(eqn.source_info, shard.scope):
                contract = _CONTRACTIONS.get(eqn.primitive)
                if contract is not None:
                    whole = [self.gathered(o.number, sorted(axes)) for o in operands]
                    return contract(_jax.unplaced(eqn.params), *whole)
                scales = eqn.primitive in _SCALES
                totals = [
                    o.number if scales and not axes & o.varies else self.summed(o, axes)
                    for o in operands
                ]
                params = _jax.unplaced(eqn.params)
                (total,) = _jax.bind(eqn.primitive, params, totals)
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
        if prim in _TERMS:
            return any(self.is_partial(o, axes) for o in operands)
        if prim in _SCALES:
            of = [o for o in operands if axes & o.varies]
            divides = prim is p.div_p and of != [operands[0]]
            return len(of) == 1 and not divides and self.is_partial(of[0], axes)
        return prim in _LINEAR_MOVES and self.is_partial(operands[0], axes)

    # Collectives.

    def psum(self, eqn: Any, x: Shard) -> Array:
        return self.summed(x, frozenset(_named(eqn.params)))

    def selected(self, eqn: Any, x: Shard) -> Array:
        """``pmax`` and ``pmin``; of a local maximum, the maximum of all."""
        largest = eqn.primitive is p.pmax_p
        local, select = (
            (p.reduce_max_p, lax.reduce_max)
            if largest
            else (p.reduce_min_p, lax.reduce_min)
        )
        names, made = _named(eqn.params), x.equation
        if made is not None and made.primitive is local:
            (operand,) = x.operands
            axes = (0, *(a + 1 for a in made.params["axes"]))
            return select(self.gathered(operand.number, names), axes)
        return select(self.gathered(x.number, names), (0,))

    def all_gather(self, eqn: Any, x: Shard) -> Array:
        names, axis = _named(eqn.params), eqn.params["all_gather_dimension"]
        whole = self.gathered(x.number, names)
        if not eqn.params["tiled"]:
            return _moved(whole, 0, axis)
        return _joined(_moved(whole, 0, axis), axis)

    def ppermute(self, eqn: Any, x: Shard) -> Array:
        names = _named(eqn.params)
        whole = self.gathered(x.number, names)
        return self.own(_permuted(whole, eqn.params["perm"]), names)

    def reduce_scatter(self, eqn: Any, x: Shard) -> Array:
        names, axis = _named(eqn.params), eqn.params["scatter_dimension"]
        total = self.summed(x, frozenset(names))
        if eqn.params["tiled"]:
            total = _split(total, axis, self.count(names))
        return self.own(_moved(total, axis, 0), names)

    def all_to_all(self, eqn: Any, x: Shard) -> Array:
        params, names = eqn.params, _named(eqn.params)
        split, concat = params["split_axis"], params["concat_axis"]
        whole = self.gathered(x.number, names)  # by sender
        if params["tiled"]:
            whole = _split(whole, split + 1, self.count(names))
        received = self.own(_moved(whole, split + 1, 0), names)
        received = _moved(received, 0, concat)
        return _joined(received, concat) if params["tiled"] else received

    def pbroadcast(self, eqn: Any, x: Shard) -> Array:
        whole = self.gathered(x.number, _named(eqn.params))
        return lax.index_in_dim(whole, eqn.params["source"], 0, keepdims=False)

    def axis_index(self, eqn: Any) -> Array:
        names = _named(eqn.params)
        return self.own(lax.iota(np.int32, self.count(names)), names)

    # Loops and branches, with the collectives in their bodies.

    def scan(self, eqn: Any, operands: Sequence[Shard]) -> Sequence[Array]:
        ((body, consts),) = _jax.bodies(eqn)
        c, n = _jax.scan_counts(eqn.params)
        varies = [o.varies for o in operands]
        varies[c : c + n] = _of_scan(eqn, varies)[:n]
        x = [o.number for o in operands]

        def step(carry: Any, slices: Any) -> Any:
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

    def cond(self, eqn: Any, operands: Sequence[Shard]) -> Sequence[Array]:
        index, *x = (o.number for o in operands)
        varies = [o.varies for o in operands[1:]]
        branches = [
            functools.partial(lambda body, *x: self._body(*body, x, varies), body)
            for body in _jax.bodies(eqn)
        ]
        return lax.switch(index, branches, *x)

    def loop(self, eqn: Any, operands: Sequence[Shard]) -> Sequence[Array]:
        condition, body = _jax.bodies(eqn)
        n, m = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        varies = [o.varies for o in operands]
        varies[n + m :] = _variation(eqn, varies)
        x = [o.number for o in operands]

        def goes_on(carry: Any) -> Array:
            numbers = [*x[:n], *carry]
            (out,) = self._body(*condition, numbers, varies[:n] + varies[n + m :])
            return out

        def step(carry: Any) -> Any:
            return self._body(*body, [*x[n : n + m], *carry], varies[n:])

        return lax.while_loop(goes_on, step, x[n + m :])

    def _body(
        self,
        jaxpr: Any,
        consts: Sequence[Any],
        numbers: Sequence[Array],
        varies: Sequence[Axes],
    ) -> list[Array]:
        inside = _Device(self.sizes, self.mesh)  # sums of an outer trace end there
        shards = [Shard(x, axes) for x, axes in zip(numbers, varies, strict=True)]
        return [out.number for out in inside.run(jaxpr, consts, shards)]


# Contractions of what all devices have, along a new leading axis of each operand.


def _dot(params: dict[str, Any], a: Array, b: Array) -> Array:
    contracting, batch = params["dimension_numbers"]
    (a_summed, b_summed), (a_batch, b_batch) = (
        [[i + 1 for i in axes] for axes in pair] for pair in (contracting, batch)
    )
    numbers = (((0, *a_summed), (0, *b_summed)), (tuple(a_batch), tuple(b_batch)))
    (out,) = _jax.bind(
        p.dot_general_p, {**params, "dimension_numbers": numbers}, [a, b]
    )
    return out


def _convolution(params: dict[str, Any], x: Array, kernel: Array) -> Array:
    """With the channels of all devices: group by group, if there are groups."""
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    channels, of_kernel = numbers.lhs_spec[1], numbers.rhs_spec[1]
    x = _moved(_split(x, channels + 1, groups), 0, channels + 1)
    x = _joined(_joined(x, channels + 1), channels)
    kernel = _joined(_moved(kernel, 0, of_kernel), of_kernel)
    (out,) = _jax.bind(p.conv_general_dilated_p, params, [x, kernel])
    return out


def _sum(params: dict[str, Any], x: Array) -> Array:
    return lax.reduce_sum(x, (0, *(a + 1 for a in params["axes"])))


_CONTRACTIONS: dict[Any, Callable[..., Array]] = {
    p.dot_general_p: _dot,
    p.conv_general_dilated_p: _convolution,
    p.reduce_sum_p: _sum,
}
# A sum over devices may be taken before each of these instead of behind it.
_TERMS = (p.add_p, p.add_jaxvals_p, p.sub_p)
_SCALES = (p.mul_p, p.div_p)
_LINEAR_MOVES = (
    p.broadcast_in_dim_p,
    p.convert_element_type_p,
    p.copy_p,
    p.neg_p,
    p.reduce_precision_p,
    p.reshape_p,
    p.squeeze_p,
    p.transpose_p,
)


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
        if shard.equation.primitive not in _LINEAR_MOVES:
            return False
        (shard,) = shard.operands
    return not _jax.is_tracer(shard.number) and not np.any(np.asarray(shard.number))


def _one_of(a: Array, b: Array) -> Array:
    """What a reduction adds that rules for sums need not stabilise."""
    return lax.add(a, b)


# Axes of arrays.


def _moved(x: Array, source: int, destination: int) -> Array:
    return x if source == destination else jnp.moveaxis(x, source, destination)


def _joined(x: Array, axis: int) -> Array:
    """An axis and the one behind it as one."""
    size = x.shape[axis] * x.shape[axis + 1]
    return lax.reshape(x, (*x.shape[:axis], size, *x.shape[axis + 2 :]))


def _split(x: Array, axis: int, count: int) -> Array:
    """An axis as two, the first of a given size."""
    sizes = (count, x.shape[axis] // count)
    return lax.reshape(x, (*x.shape[:axis], *sizes, *x.shape[axis + 1 :]))


def _permuted(whole: Array, pairs: Iterable[tuple[int, int]]) -> Array:
    """Slices of the leading axis in another order; zeros where nothing is sent.

    In runs: of a ring there are two, which XLA makes one exchange of.
    """
    senders: list[int | None] = [None] * whole.shape[0]
    for source, destination in pairs:
        senders[destination] = source
    runs: list[tuple[int | None, int]] = []  # first sender, and how many follow
    for sender in senders:
        first, count = runs[-1] if runs else (None, 0)
        follows = sender is None if first is None else sender == first + count
        if count and follows:
            runs[-1] = (first, count + 1)
        else:
            runs.append((sender, 1))
    parts = [
        jnp.zeros((count, *whole.shape[1:]), whole.dtype)
        if first is None
        else lax.slice_in_dim(whole, first, first + count)
        for first, count in runs
    ]
    return parts[0] if len(parts) == 1 else lax.concatenate(parts, 0)


_UNCHANGED = ("pvary", "pcast")
_COLLECTIVES: dict[str, Callable[..., Array]] = {
    "all_gather": _Device.all_gather,
    "all_gather_invariant": _Device.all_gather,
    "all_to_all": _Device.all_to_all,
    "axis_index": _Device.axis_index,
    "pbroadcast": _Device.pbroadcast,
    "pmax": _Device.selected,
    "pmin": _Device.selected,
    "ppermute": _Device.ppermute,
    "psum": _Device.psum,
    "psum_invariant": _Device.psum,
    "reduce_scatter": _Device.reduce_scatter,
}
_LOOPS: dict[Any, Callable[..., Sequence[Array]]] = {
    p.scan_p: _Device.scan,
    p.cond_p: _Device.cond,
    p.while_p: _Device.loop,
}
_WITHOUT_FORM = ("ragged_all_to_all", "psend", "precv")
_WITHOUT_FORM_WHY = "whose sizes depend on the values"


def _refused(eqn: Any, why: str) -> str:
    where = _jax.source_line(eqn.source_info)
    return (
        f"`{eqn.primitive.name}` {why}, inside a shard_map, at "
        f"{_jax.scope_path(eqn.source_info) or 'top level'} ({where}), has no form in "
        "one program of all devices. Give the function around it a rule with "
        "@jlrp.custom_relevance, or call jlrp.relevance inside of the shard_map."
    )

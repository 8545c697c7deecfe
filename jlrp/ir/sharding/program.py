"""A ``shard_map`` as the one-device program that it spreads over devices.

The relevance of a program must not depend on where it runs. So the body of a
``shard_map``, which says what each device computes of its shard, is written as what all
devices compute together: its values get an axis for each mesh axis along which they
vary, and its collectives become sums, slices and transposes along these axes. What
recognises and explains operations then sees an ordinary program. Its arrays keep their
sharding, from which XLA makes local work and collectives again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence

import jax
from jax import lax
from jax.extend.core import primitives as p
from jax.sharding import PartitionSpec

from jlrp.ir import jax_compat
from jlrp.ir.declared import LOOKED_INTO, Declared
from jlrp.ir.jax_compat import Jaxpr, JaxprEqn, Mesh
from jlrp.ir.sharding.axes import Array, gathered_p
from jlrp.ir.sharding.device import Device, Shard
from jlrp.ir.sharding.variation import NOWHERE, Axes, named


def one_program(
    eqn: JaxprEqn,
    declared: Declared = LOOKED_INTO,
    mesh: Mesh | None = None,
    outer: Axes = NOWHERE,
) -> tuple[Jaxpr, Sequence[Array]] | None:
    """What all devices of a ``shard_map`` compute: a jaxpr; of other equations, None.

    Also of a collective over an axis of ``vmap``, which JAX leaves as a reduction under
    the collective's name.

    Args:
      declared: derivatives that stand for a call's body.
      mesh: that of a ``shard_map`` around this one, and ``outer`` its axes.

    Raises:
      UnsupportedPrimitiveError: for a collective that has no such form.
    """
    sharded, reduction = jax_compat.sharded_body(eqn), _OF_VMAP.get(eqn.primitive)
    if sharded is None and reduction is None:
        return None
    shapes = [jax_compat.shape_of(a) for a in eqn.invars]
    if sharded is not None:
        if mesh is not None:
            sharded = sharded._replace(mesh=mesh)
        # The types of a kept call's body say on which devices of the mesh it runs.
        return _laid_out(sharded, tuple(shapes), declared.of_kernels(), outer)
    axes = [axis for axis in named(eqn.params) if isinstance(axis, int)]
    if reduction is None or len(axes) < len(named(eqn.params)):
        return None
    reduced = jax.make_jaxpr(lambda *x: [reduction(v, axes) for v in x])(*shapes)
    return jax_compat.open_jaxpr(reduced)


_OF_VMAP = {
    p.psum_p: lax.reduce_sum,
    p.pmax_p: lax.reduce_max,
    p.pmin_p: lax.reduce_min,
}


@functools.lru_cache(maxsize=256)
def _laid_out(
    sharded: jax_compat.Sharded,
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    declared: Declared,
    outer: Axes,
) -> tuple[Jaxpr, Sequence[Array]]:
    sizes = {name: sharded.mesh.shape[name] for name in sharded.axes}
    kept = [_Layout(spec, sizes) for spec in sharded.in_specs]
    made = [_Layout(spec, sizes) for spec in sharded.out_specs]

    def on_one_device(*shards: Array) -> list[Array]:
        arguments = [
            Shard(number, layout.axes | outer)
            for number, layout in zip(shards, kept, strict=True)
        ]
        nested = functools.partial(
            one_program,
            declared=declared,
            mesh=sharded.mesh,
            outer=outer.union(sizes),
        )
        device = Device(sharded.mesh, declared, nested)
        outs = device.run(sharded.jaxpr, (), arguments)
        return [
            _first(out, out.varies.intersection(sizes) - layout.axes, sizes)
            for out, layout in zip(outs, made, strict=True)
        ]

    function: Callable[..., list[Array]] = on_one_device
    ranks = [len(jax_compat.shape_of(v).shape) for v in sharded.jaxpr.invars]
    out_ranks = [len(jax_compat.shape_of(a).shape) for a in sharded.jaxpr.outvars]
    names = list(sizes)
    for i in reversed(range(len(names))):  # the innermost maps the last axis
        inside = names[i:]
        function = jax.vmap(
            function,
            _positions(kept, inside, ranks),
            _positions(made, inside, out_ranks),
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

    with jax_compat.automatically():
        return jax_compat.open_jaxpr(jax.make_jaxpr(on_all_devices)(*shapes))


class _Layout:
    """How an array is spread: its axes over the devices of some mesh axes each.

    Split, it has an axis for each of these mesh axes, before the axis that it shards.
    """

    def __init__(self, spec: PartitionSpec, sizes: dict[str, int]):
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


def _positions(
    layouts: Sequence[_Layout], inside: Sequence[str], ranks: Sequence[int]
) -> list[int | None]:
    pairs = zip(layouts, ranks, strict=True)
    return [layout.position(inside, rank) for layout, rank in pairs]


def _constrained(x: Array, layout: _Layout, sharded: jax_compat.Sharded) -> Array:
    """The split array, each of its mesh axes spread over the devices of that axis."""
    if not layout.axes:
        return x
    labels = layout.labels(x.ndim - len(layout.axes))
    return jax_compat.spread(x, sharded.mesh, labels)


def _first(shard: Shard, axes: Iterable[str], sizes: dict[str, int]) -> Array:
    """A value that is the same on all devices of some axes, though nothing shows it."""
    number = shard.number
    for axis in sorted(axes):
        number = gathered_p.bind(number, axis=axis, size=sizes[axis])
        number = lax.index_in_dim(number, 0, 0, keepdims=False)
    return number

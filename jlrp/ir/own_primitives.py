"""Primitives of jlrp's own: a name for a value, a function with a rule of its own, a
rounded number with the derivative of what was rounded.

All are real JAX primitives: ``jit``, ``vmap``, ``grad``, ``scan``, ``remat`` and
``jax.export`` go through them, and outside of jlrp they change nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import jax
from jax.core import AbstractValue
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from jlrp.arguments import check_array, check_function, leaves_of, shown, takes
from jlrp.errors import InputError
from jlrp.typing import Array, PyTree

T = TypeVar("T", bound=Callable[..., PyTree])

Tagged = TypeVar("Tagged")
Arrays = list[Array]
FlatRule = Callable[[Arrays, Arrays, Arrays], list[Array | None]]
RelevanceRule = Callable[[PyTree, tuple[PyTree, ...], PyTree], Sequence[PyTree]]

tag_p = Primitive("tag")
tag_p.def_impl(lambda y, *, name: y)
tag_p.def_abstract_eval(lambda y, *, name: y)
mlir.register_lowering(tag_p, lambda ctx, y, *, name: [y])
batching.defvectorized(tag_p)
ad.deflinear2(tag_p, lambda ct, y, *, name: [ct])


@takes()
def tag(y: Tagged, name: str) -> Tagged:
    """Name a value, to ``capture`` its relevance or set a ``condition`` on it.

    Args:
      y: an array, or a pytree of arrays, which all get the name.
      name: how ``capture=`` and ``condition=`` find it; globs match it as they match
        scopes.

    Returns:
      ``y``, unchanged.

    Raises:
      InputError: if the name is empty or no string.

    Example:
      >>> import jax.numpy as jnp, jlrp
      >>> def fn(w, x):
      ...     return jlrp.tag(x * w, "products").sum()
      >>> explain = jlrp.explain(fn, capture="products")
      >>> e = explain(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]))
      >>> [round(float(r), 3) for r in e.captured["products"]]
      [3.0, 8.0]
    """
    if not isinstance(name, str) or not name:
        raise InputError(f"The name of a tag is a non-empty string; got {shown(name)}.")
    for where, leaf in leaves_of("y", y):
        check_array(where, leaf, abstract=True)
    return jax.tree.map(lambda leaf: tag_p.bind(leaf, name=name), y)


straight_through_p = Primitive("straight_through")
"""``(carrier, rounded, inside)``: the rounded numbers, with the derivative of the
carrier where it is inside of what can be represented. Explained programs hold it in
place of a quantiser."""
straight_through_p.def_impl(lambda carrier, rounded, inside: rounded)
straight_through_p.def_abstract_eval(lambda carrier, rounded, inside: rounded)
mlir.register_lowering(
    straight_through_p, lambda ctx, carrier, rounded, inside: [rounded]
)
batching.defbroadcasting(straight_through_p)


def _straight_jvp(
    primals: Sequence[Array], tangents: Sequence[Array]
) -> tuple[Array, Array]:
    _, rounded, inside = primals
    tangent = ad.instantiate_zeros(tangents[0])
    passed = jax.lax.select(inside, tangent, jax.lax.full_like(tangent, 0))
    return straight_through_p.bind(*primals), passed


ad.primitive_jvps[straight_through_p] = _straight_jvp

custom_relevance_p = Primitive("custom_relevance")
custom_relevance_p.multiple_results = True


def _as_function(body: ClosedJaxpr) -> Callable[..., list[Array]]:
    return lambda *args: list(jaxpr_as_fun(body)(*args))


@custom_relevance_p.def_impl
def _run(*args: Array, body: ClosedJaxpr, rule: object, name: str) -> list[Array]:
    return jax.jit(_as_function(body))(*args)


@custom_relevance_p.def_abstract_eval
def _shapes(
    *args: object, body: ClosedJaxpr, rule: object, name: str
) -> list[AbstractValue]:
    return list(body.out_avals)


mlir.register_lowering(
    custom_relevance_p,
    mlir.lower_fun(
        lambda *args, body, rule, name: _as_function(body)(*args), multiple_results=True
    ),
)


def _differentiated(
    primals: Sequence[Array],
    tangents: Sequence[Array],
    *,
    body: ClosedJaxpr,
    **params: object,
) -> tuple[list[Array], list[Array]]:
    """The function keeps its rule; its derivative is that of its body."""
    tangents = [ad.instantiate_zeros(t) for t in tangents]
    _, out = jax.jvp(_as_function(body), list(primals), tangents)
    return custom_relevance_p.bind(*primals, body=body, **params), out


ad.primitive_jvps[custom_relevance_p] = _differentiated


def _batched(
    args: Sequence[Array],
    axes: Sequence[int | None],
    *,
    body: ClosedJaxpr,
    rule: FlatRule,
    name: str,
) -> tuple[list[Array], list[int]]:
    """A batch of calls is one call, whose rule is the batch of rules."""
    axes = [axis if isinstance(axis, int) else None for axis in axes]
    function = jax.vmap(_as_function(body), in_axes=axes)
    batched = jax.make_jaxpr(function)(*args)
    out = custom_relevance_p.bind(
        *args, body=batched, rule=_BatchedRule(rule, tuple(axes)), name=name
    )
    return out, [0] * len(out)


batching.primitive_batchers[custom_relevance_p] = _batched


class _BatchedRule:
    """The rule of a batch: relevance of an operand that all share is their sum."""

    def __init__(self, rule: FlatRule, axes: tuple[int | None, ...]):
        self.rule, self.axes = rule, axes

    def __call__(self, r: Arrays, x: Arrays, y: Arrays) -> list[Array | None]:
        given: list[bool] = []

        def one(r: Arrays, x: Arrays, y: Arrays) -> list[Array]:
            handed = self.rule(r, x, y)
            given[:] = [h is not None for h in handed]
            return [h for h in handed if h is not None]

        found = iter(jax.vmap(one, in_axes=(0, list(self.axes), 0))(r, x, y))
        handed: list[Array | None] = []
        for has, axis in zip(given, self.axes, strict=True):
            if not has:
                handed.append(None)
            elif axis is None:
                handed.append(next(found).sum(0))
            else:
                handed.append(jax.numpy.moveaxis(next(found), 0, axis))
        return handed


class custom_relevance(Generic[T]):  # noqa: N801  (a decorator, like jax.custom_vjp)
    """Give a function a relevance rule of its own: a decorator, like ``custom_vjp``.

    Outside of jlrp the function is as it was, derivatives included. Inside, it is one
    operation, whatever it is made of: the way to explain a fused kernel.

    Args:
      fun: any JAX function of positional arguments.

    Example:
      >>> import jax.numpy as jnp, jlrp
      >>> @jlrp.custom_relevance
      ... def signed_root(x):
      ...     return jnp.sign(x) * jnp.sqrt(jnp.abs(x))
      >>> @signed_root.def_relevance
      ... def passes(r, x, y):
      ...     return (r,)
      >>> x = jnp.array([4.0, 9.0])
      >>> r = jlrp.relevance(lambda p, x: signed_root(x).sum(), (), x)
      >>> [round(float(share), 3) for share in r]
      [2.0, 3.0]
    """

    def __init__(self, fun: T):
        check_function(fun, "fun")
        functools.update_wrapper(self, fun)
        self.fun = fun
        self.rule: RelevanceRule | None = None

    def def_relevance(self, rule: RelevanceRule) -> RelevanceRule:
        """Define the rule: ``rule(r, x, y) -> relevance of each argument``.

        Args:
          rule: called with the relevance of the output (like the output), the tuple of
            arguments, and the output; returns a sequence with one relevance an
            argument, like it, or None for none.

        Returns:
          ``rule``, so that this can be a decorator.
        """
        check_function(rule, "rule")
        self.rule = rule
        return rule

    def __get__(self, owner: object, kind: type | None = None) -> Callable[..., PyTree]:
        return self if owner is None else functools.partial(self, owner)

    def __call__(self, *args: PyTree) -> PyTree:
        """Call the function."""
        if self.rule is None:
            raise InputError(
                f"{getattr(self.fun, '__qualname__', self.fun)} has no relevance rule "
                "yet: define one with its def_relevance."
            )
        leaves, tree = jax.tree.flatten(args)

        def flat(*leaves: Array) -> PyTree:
            return self.fun(*jax.tree.unflatten(tree, leaves))

        # What the function closes over, tracers too, become operands.
        body, shapes = jax.make_jaxpr(flat, return_shape=True)(*leaves)
        closed = list(body.consts)
        body = _closed_over_nothing(body)
        out_tree = jax.tree.structure(shapes)
        rule = _FlatRule(self.rule, len(closed), tree, out_tree, _name_of(self.fun))
        out = custom_relevance_p.bind(
            *closed, *leaves, body=body, rule=rule, name=_name_of(self.fun)
        )
        return jax.tree.unflatten(out_tree, out)


def _closed_over_nothing(body: ClosedJaxpr) -> ClosedJaxpr:
    """The jaxpr with its constants as leading operands."""
    consts = list(body.consts)

    def function(*args: Array) -> list[Array]:
        inner = getattr(body, "jaxpr", body)
        return jax.core.eval_jaxpr(inner, args[: len(consts)], *args[len(consts) :])  # type: ignore[attr]

    if not consts:
        return body
    avals = [jax.typeof(c) for c in consts] + list(body.in_avals)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
    return jax.make_jaxpr(function)(*shapes)


def _name_of(fun: object) -> str:
    return getattr(fun, "__name__", type(fun).__name__)


class _FlatRule:
    """A user's rule over pytrees as one over the primitive's flat operands."""

    def __init__(
        self,
        rule: RelevanceRule,
        closed: int,
        in_tree: object,
        out_tree: object,
        name: str,
    ):
        self.rule, self.closed, self.name = rule, closed, name
        self.in_tree, self.out_tree = in_tree, out_tree

    def __call__(self, r: Arrays, x: Arrays, y: Arrays) -> list[Array | None]:
        args = jax.tree.unflatten(self.in_tree, x[self.closed :])
        handed = self.rule(
            jax.tree.unflatten(self.out_tree, r),
            args,
            jax.tree.unflatten(self.out_tree, y),
        )
        if not isinstance(handed, list | tuple) or len(handed) != len(args):
            raise InputError(
                f"The relevance rule of {self.name} must return a sequence of "
                f"{len(args)} relevances, one an argument, None for none."
            )
        flat: list[Array | None] = [None] * self.closed
        for share, arg in zip(handed, args, strict=True):
            leaves = jax.tree.leaves(arg)
            given = [None] * len(leaves) if share is None else jax.tree.leaves(share)
            shapes = [None if v is None else jax.numpy.shape(v) for v in given]
            if shapes != [None if share is None else v.shape for v in leaves]:
                raise InputError(
                    f"The relevance rule of {self.name} returned a relevance that is "
                    "not like its argument: the same pytree and shapes are needed."
                )
            flat += given
        return flat

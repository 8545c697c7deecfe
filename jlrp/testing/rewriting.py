"""Writing a program again: the traced equations run, some of them in other words.

A *rewriting* knows another spelling of some equations, or of the whole function. The
rewritten program computes the same function; only its equations are others. Each new
equation keeps the name scope and the source line of the one that it stands for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core import primitives as p

from jlrp.ir import jax_compat

Function = Callable[[Any, Any], Any]


class Origin(NamedTuple):
    """What a value was computed from; from neither: a constant made inside."""

    x: bool = False
    params: bool = False

    def __or__(self, other: Any) -> Origin:
        return Origin(self.x or other.x, self.params or other.params)


@dataclass(frozen=True)
class Rewriting:
    """Another spelling, by name.

    Attributes:
      name: what it does, in a word.
      family: ``movement``, ``sums``, ``products``, ``functions``, ``dense`` or
        ``calls``.
      summary: a line about it.
      equation: of a ``Site``, the outputs in other words, or None where it has none.
      whole: of ``fn, params, x``, the function in other words, or None.
      primitives: those of the equations that it is tried on; empty: all.
      documented: of a composite, why relevance may differ there, or None.
    """

    name: str
    family: str
    summary: str
    equation: Callable[[Site], Any] | None = None
    whole: Callable[[Function, Any, Any], Function | None] | None = None
    primitives: frozenset[Any] = frozenset()
    documented: Callable[[Any], str | None] = lambda composite: None


REWRITINGS: dict[str, Rewriting] = {}


def rewriting(
    family: str,
    *primitives: core.Primitive,
    whole: bool = False,
    documented: Callable[[Any], str | None] = lambda composite: None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the rewriting of its name."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        summary = (function.__doc__ or "").strip().split("\n")[0]
        REWRITINGS[function.__name__] = Rewriting(
            function.__name__,
            family,
            summary,
            equation=None if whole else function,
            whole=function if whole else None,
            primitives=frozenset(primitives),
            documented=documented,
        )
        return function

    return register


@dataclass
class Body:
    """A jaxpr while it runs: the values so far, and where they come from."""

    jaxpr: Any
    env: dict[Any, Any]
    origins: dict[Any, Origin]

    @cached_property
    def producers(self) -> dict[Any, Any]:
        return {v: eqn for eqn in self.jaxpr.eqns for v in eqn.outvars}

    @cached_property
    def uses(self) -> Counter[Any]:
        atoms = [a for eqn in self.jaxpr.eqns for a in eqn.invars]
        atoms += self.jaxpr.outvars
        return Counter(a for a in atoms if not jax_compat.is_literal(a))

    def read(self, atom: Any) -> Any:
        return (
            jax_compat.literal_value(atom)
            if jax_compat.is_literal(atom)
            else self.env[atom]
        )

    def origin(self, atom: Any) -> Origin:
        return Origin() if jax_compat.is_literal(atom) else self.origins[atom]


@dataclass
class Site:
    """One equation, where a rewriting may stand in for it."""

    eqn: Any
    body: Body

    @property
    def primitive(self) -> core.Primitive:
        return self.eqn.primitive

    @property
    def params(self) -> dict[str, Any]:
        return self.eqn.params

    @cached_property
    def inputs(self) -> list[Any]:
        return [self.body.read(a) for a in self.eqn.invars]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first output."""
        return self.eqn.outvars[0].aval.shape

    @property
    def dtype(self) -> Any:
        return self.eqn.outvars[0].aval.dtype

    @property
    def is_float(self) -> bool:
        """Whether the first output holds real numbers."""
        return jnp.issubdtype(self.dtype, np.floating)

    def origin(self, i: int) -> Origin:
        return self.body.origin(self.eqn.invars[i])

    def is_active(self, i: int) -> bool:
        """Whether operand ``i`` depends on x."""
        return self.origin(i).x

    def is_parameter(self, i: int) -> bool:
        origin = self.origin(i)
        return origin.params and not origin.x

    def is_constant(self, i: int) -> bool:
        """Whether operand ``i`` is made of literals inside of the function."""
        return self.origin(i) == Origin()

    @property
    def carries(self) -> bool:
        """Whether the first output holds real numbers that depend on x."""
        return self.is_float and self.body.origin(self.eqn.outvars[0]).x

    def literal(self, i: int) -> float | None:
        """The number that operand ``i`` is, if it is a scalar literal."""
        atom = self.eqn.invars[i]
        if not jax_compat.is_literal(atom) or np.ndim(atom.val):
            return None
        return float(jax_compat.literal_value(atom))

    def producer(self, i: int, *primitives: core.Primitive) -> Site | None:
        """The equation that computes operand ``i``, if it is here and one of these."""
        atom = self.eqn.invars[i]
        eqn = None if jax_compat.is_literal(atom) else self.body.producers.get(atom)
        if eqn is None or (primitives and eqn.primitive not in primitives):
            return None
        return Site(eqn, self.body)

    def is_read_once(self) -> bool:
        """Whether nothing but one operand reads its only output."""
        return self.body.uses[self.eqn.outvars[0]] == 1

    def bind(self, *inputs: Any, **params: Any) -> Any:
        """The equation on other operands; its first output."""
        return jax_compat.bind(self.primitive, {**self.params, **params}, inputs)[0]

    def computed(self) -> list[Any]:
        """The outputs as the program has them."""
        return jax_compat.bind(self.primitive, self.params, self.inputs)


class Rewriter:
    """One rewriting of one program.

    Args:
      rewriting: what is written in other words.
      only: the numbers of the sites where it is, in the order met; None: all.

    Attributes:
      sites: where it could be, as (primitive, place).
    """

    def __init__(self, rewriting: Rewriting, only: Sequence[int] | None = None):
        self.rewriting = rewriting
        self.only = None if only is None else frozenset(only)
        self.sites: list[tuple[str, str]] = []

    def run(
        self,
        jaxpr: Any,
        consts: Sequence[Any],
        args: Sequence[Any],
        origins: Sequence[Origin],
        place: str = "",
    ) -> list[Any]:
        atoms = [*jaxpr.constvars, *jaxpr.invars]
        known = [*([Origin(params=True)] * len(consts)), *origins]
        body = Body(
            jaxpr,
            dict(zip(atoms, [*consts, *args], strict=True)),
            spread(jaxpr, dict(zip(atoms, known, strict=True))),
        )
        for eqn in jaxpr.eqns:
            with jax_compat.naming(
                eqn.source_info, jax_compat.scope_path(eqn.source_info)
            ):
                outs = self._outputs(Site(eqn, body), where(eqn) or place)
            body.env.update(zip(eqn.outvars, outs, strict=True))
        return [body.read(a) for a in jaxpr.outvars]

    def _outputs(self, site: Site, place: str) -> list[Any]:
        wanted = self.rewriting
        if wanted.equation and (
            site.primitive in wanted.primitives or not wanted.primitives
        ):
            outs = wanted.equation(site)
            if outs is not None:
                outs = list(outs) if isinstance(outs, list | tuple) else [outs]
                number = len(self.sites)
                self.sites.append((site.primitive.name, place))
                if self.only is None or number in self.only:
                    _check(site, outs, wanted.name)
                    return outs
        return self._entered(site, place)

    def _entered(self, site: Site, place: str) -> list[Any]:
        """The equation as it is, but for what its bodies hold."""
        eqn, before = site.eqn, len(self.sites)
        places = jax_compat.body_inputs(eqn)
        if not places:
            return site.computed()
        known = [site.body.origin(a) for a in eqn.invars]
        if eqn.primitive in LOOPS:
            known = _loop_origins(eqn, known)

        def rewrite(index: int, jaxpr: Any, consts: Sequence[Any]) -> Any:
            origins = [known[i] for i in places[index]]

            def again(*args: Any) -> list[Any]:
                return self.run(jaxpr, consts, args, origins, place)

            avals = [
                jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in jaxpr.invars
            ]
            return pruned(jax.make_jaxpr(again)(*avals))

        params = jax_compat.with_bodies(eqn, rewrite)
        if len(self.sites) == before:  # nothing to say in there
            return site.computed()
        return jax_compat.bind(eqn.primitive, params, site.inputs)


LOOPS = frozenset({p.scan_p, p.while_p})


def _loop_origins(eqn: Any, known: list[Origin]) -> list[Origin]:
    """A carry may come from all that the loop reads."""
    anything = Origin()
    for origin in known:
        anything |= origin
    if eqn.primitive is p.scan_p:
        constants, carries = jax_compat.scan_counts(eqn.params)
        carried = range(constants, constants + carries)
    else:
        first = eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
        carried = range(first, len(known))
    return [anything if i in carried else known[i] for i in range(len(known))]


def spread(jaxpr: Any, origins: dict[Any, Origin]) -> dict[Any, Origin]:
    """Where each value of a jaxpr comes from."""
    found = dict(origins)
    for eqn in jaxpr.eqns:
        out = Origin()
        for atom in eqn.invars:
            if not jax_compat.is_literal(atom):
                out |= found[atom]
        found.update(dict.fromkeys(eqn.outvars, out))
    return found


def where(eqn: Any) -> str:
    """Name scope and source line of an equation."""
    scope, line = (
        jax_compat.scope_path(eqn.source_info),
        jax_compat.source_line(eqn.source_info),
    )
    return f"{scope} ({line})" if scope and line else scope or line


def _check(site: Site, outs: list[Any], name: str) -> None:
    """A rewriting that returns something else is a fault of ours, not of the user's."""
    for var, out in zip(site.eqn.outvars, outs, strict=True):
        got = (np.shape(out), out.dtype)
        assert got == (var.aval.shape, var.aval.dtype), (name, site.eqn, got)


def pruned(closed: Any) -> Any:
    """A closed jaxpr without the equations that nothing reads."""
    jaxpr, consts = jax_compat.open_jaxpr(closed)
    needed = {a for a in jaxpr.outvars if not jax_compat.is_literal(a)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or needed.intersection(eqn.outvars):
            kept.append(eqn)
            needed.update(a for a in eqn.invars if not jax_compat.is_literal(a))
    if len(kept) == len(jaxpr.eqns):
        return closed

    def run(*args: Any) -> list[Any]:
        return jax_compat.evaluate(jaxpr.replace(eqns=kept[::-1]), consts, args)

    avals: list[Any] = [v.aval for v in jaxpr.invars]
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
    return jax.make_jaxpr(run)(*shapes)


def traced(fn: Function, params: Any, x: Any) -> tuple[Any, Any, list[Origin]]:
    """The closed jaxpr of ``fn(params, x)``, the output's tree, the inputs' origins."""
    closed, out = jax.make_jaxpr(fn, return_shape=True)(params, x)
    origins = [
        *[Origin(params=True)] * len(jax.tree.leaves(params)),
        *[Origin(x=True)] * len(jax.tree.leaves(x)),
    ]
    return closed, jax.tree.structure(out), origins


class Rewritten:
    """``fn`` with a rewriting of its equations: ``(params, x) -> output``.

    Traced for each structure and shapes, once.
    """

    def __init__(
        self, fn: Function, rewriting: Rewriting, only: Sequence[int] | None = None
    ):
        self.fn, self.rewriting, self.only = fn, rewriting, only
        self._programs: dict[Any, Any] = {}

    def __call__(self, params: Any, x: Any) -> Any:
        program, tree, _ = self.program(params, x)
        jaxpr, consts = jax_compat.open_jaxpr(program)
        outs = jax_compat.evaluate(jaxpr, consts, jax.tree.leaves((params, x)))
        return jax.tree.unflatten(tree, outs)

    def program(self, params: Any, x: Any) -> tuple[Any, Any, list[tuple[str, str]]]:
        """The rewritten jaxpr, the tree of its output, and the sites rewritten."""
        leaves, tree = jax.tree.flatten((params, x))
        avals = [jax.ShapeDtypeStruct(np.shape(a), jnp.result_type(a)) for a in leaves]
        key = (tree, tuple((a.shape, a.dtype) for a in avals))
        if key not in self._programs:
            shapes = jax.tree.unflatten(tree, avals)
            closed, out, origins = traced(self.fn, *shapes)
            jaxpr, consts = jax_compat.open_jaxpr(closed)
            rewriter = Rewriter(self.rewriting, self.only)

            def again(*args: Any) -> list[Any]:
                return rewriter.run(jaxpr, consts, args, origins)

            program = pruned(jax.make_jaxpr(again)(*avals))
            found = program, out, rewriter.sites
            if any(map(jax_compat.is_tracer, consts)):  # of the trace around: not kept
                return found
            self._programs[key] = found
        return self._programs[key]


def equations(jaxpr: Any) -> Iterator[Any]:
    """Those of a jaxpr and of all bodies in it."""
    for eqn in jax_compat.open_jaxpr(jaxpr)[0].eqns:
        yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from equations(inner)

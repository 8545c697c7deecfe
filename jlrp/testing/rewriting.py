"""Writing a program again: the traced equations run, some of them in other words.

A *rewriting* knows another spelling of some equations, or of the whole function. The
rewritten program computes the same function; only its equations are others. Each new
equation keeps the name scope and the source line of the one that it stands for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.extend.core import primitives as p

from jlrp.composites import Composite
from jlrp.ir import jax_compat
from jlrp.ir.jax_compat import JaxAtom, Jaxpr, JaxprEqn, Operand, Params
from jlrp.typing import Array, ArrayLike, Function, PyTree


class Origin(NamedTuple):
    """What a value was computed from; from neither: a constant made inside."""

    x: bool = False
    params: bool = False

    def __or__(self, other: Origin) -> Origin:
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
    equation: OfEquation | None = None
    whole: OfWhole | None = None
    primitives: frozenset[core.Primitive] = frozenset()
    documented: Reason = lambda composite: None


Outputs: TypeAlias = Operand | Sequence[Operand] | None
"""Of an equation: its only one, or all; None where there is no other spelling."""

OfEquation: TypeAlias = Callable[["Site"], Outputs]
OfWhole: TypeAlias = Callable[[Function, PyTree, PyTree], Function | None]
Reason: TypeAlias = Callable[[Composite], str | None]

E = TypeVar("E", bound=OfEquation)
W = TypeVar("W", bound=OfWhole)

REWRITINGS: dict[str, Rewriting] = {}


def rewriting(
    family: str,
    *primitives: core.Primitive,
    documented: Reason = lambda composite: None,
) -> Callable[[E], E]:
    """Register a function of a ``Site`` as the rewriting of its name."""

    def register(function: E) -> E:
        name, summary = function.__name__, _summary(function.__doc__)
        REWRITINGS[name] = Rewriting(
            name,
            family,
            summary,
            equation=function,
            primitives=frozenset(primitives),
            documented=documented,
        )
        return function

    return register


def rewriting_of_whole(family: str) -> Callable[[W], W]:
    """Register a function of ``fn, params, x`` as the rewriting of its name."""

    def register(function: W) -> W:
        name, summary = function.__name__, _summary(function.__doc__)
        REWRITINGS[name] = Rewriting(name, family, summary, whole=function)
        return function

    return register


def _summary(doc: str | None) -> str:
    return (doc or "").strip().split("\n")[0]


@dataclass
class Body:
    """A jaxpr while it runs: the values so far, and where they come from."""

    jaxpr: Jaxpr
    env: dict[JaxAtom, Operand]
    origins: dict[JaxAtom, Origin]

    @cached_property
    def producers(self) -> dict[JaxAtom, JaxprEqn]:
        return {v: eqn for eqn in self.jaxpr.eqns for v in eqn.outvars}

    @cached_property
    def uses(self) -> Counter[JaxAtom]:
        atoms = [a for eqn in self.jaxpr.eqns for a in eqn.invars]
        atoms += self.jaxpr.outvars
        return Counter(a for a in atoms if not jax_compat.is_literal(a))

    def read(self, atom: JaxAtom) -> Operand:
        return (
            jax_compat.literal_value(atom)
            if jax_compat.is_literal(atom)
            else self.env[atom]
        )

    def origin(self, atom: JaxAtom) -> Origin:
        return Origin() if jax_compat.is_literal(atom) else self.origins[atom]


@dataclass
class Site:
    """One equation, where a rewriting may stand in for it."""

    eqn: JaxprEqn
    body: Body

    @property
    def primitive(self) -> core.Primitive:
        return self.eqn.primitive

    @property
    def params(self) -> Params:
        return self.eqn.params

    @cached_property
    def inputs(self) -> list[Operand]:
        return [self.body.read(a) for a in self.eqn.invars]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the first output."""
        return jax_compat.shape_of(self.eqn.outvars[0]).shape

    @property
    def dtype(self) -> np.dtype:
        return jax_compat.shape_of(self.eqn.outvars[0]).dtype

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

    def bind(self, *inputs: ArrayLike, **params: object) -> Array:
        """The equation on other operands; its first output."""
        return jax_compat.bind(self.primitive, {**self.params, **params}, inputs)[0]

    def computed(self) -> list[Array]:
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
        jaxpr: Jaxpr,
        consts: Sequence[Operand],
        args: Sequence[Operand],
        origins: Sequence[Origin],
        place: str = "",
    ) -> list[Operand]:
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

    def _outputs(self, site: Site, place: str) -> Sequence[Operand]:
        wanted = self.rewriting
        if wanted.equation and (
            site.primitive in wanted.primitives or not wanted.primitives
        ):
            outs = wanted.equation(site)
            if outs is not None:
                outs = [outs] if isinstance(outs, Operand) else outs
                number = len(self.sites)
                self.sites.append((site.primitive.name, place))
                if self.only is None or number in self.only:
                    _check(site, outs, wanted.name)
                    return outs
        return self._entered(site, place)

    def _entered(self, site: Site, place: str) -> list[Array]:
        """The equation as it is, but for what its bodies hold."""
        eqn, before = site.eqn, len(self.sites)
        places = jax_compat.body_inputs(eqn)
        if not places:
            return site.computed()
        known = [site.body.origin(a) for a in eqn.invars]
        if eqn.primitive in LOOPS:
            known = _loop_origins(eqn, known)

        def rewrite(
            index: int, jaxpr: Jaxpr, consts: Sequence[Array]
        ) -> core.ClosedJaxpr:
            origins = [known[i] for i in places[index]]

            def again(*args: Array) -> list[Operand]:
                return self.run(jaxpr, consts, args, origins, place)

            shapes = map(jax_compat.shape_of, jaxpr.invars)
            return pruned(jax.make_jaxpr(again)(*shapes))

        params = jax_compat.with_bodies(eqn, rewrite)
        if len(self.sites) == before:  # nothing to say in there
            return site.computed()
        return jax_compat.bind(eqn.primitive, params, site.inputs)


LOOPS = frozenset({p.scan_p, p.while_p})


def _loop_origins(eqn: JaxprEqn, known: list[Origin]) -> list[Origin]:
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


def spread(jaxpr: Jaxpr, origins: dict[JaxAtom, Origin]) -> dict[JaxAtom, Origin]:
    """Where each value of a jaxpr comes from."""
    found = dict(origins)
    for eqn in jaxpr.eqns:
        out = Origin()
        for atom in eqn.invars:
            if not jax_compat.is_literal(atom):
                out |= found[atom]
        found.update(dict.fromkeys(eqn.outvars, out))
    return found


def where(eqn: JaxprEqn) -> str:
    """Name scope and source line of an equation."""
    scope, line = (
        jax_compat.scope_path(eqn.source_info),
        jax_compat.source_line(eqn.source_info),
    )
    return f"{scope} ({line})" if scope and line else scope or line


def _check(site: Site, outs: Sequence[Operand], name: str) -> None:
    """A rewriting that returns something else is a fault of ours, not of the user's."""
    for var, out in zip(site.eqn.outvars, outs, strict=True):
        aval, got = jax_compat.shape_of(var), (np.shape(out), out.dtype)
        assert got == (aval.shape, aval.dtype), (name, site.eqn, got)


def pruned(closed: core.ClosedJaxpr) -> core.ClosedJaxpr:
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

    def run(*args: Array) -> list[Array]:
        return jax_compat.evaluate(jaxpr.replace(eqns=kept[::-1]), consts, args)

    return jax.make_jaxpr(run)(*map(jax_compat.shape_of, jaxpr.invars))


def traced(
    fn: Function, params: PyTree, x: PyTree
) -> tuple[core.ClosedJaxpr, PyTree, list[Origin]]:
    """The jaxpr of ``fn(params, x)``, the output's shapes, the inputs' origins."""
    closed, out = jax.make_jaxpr(fn, return_shape=True)(params, x)
    origins = [
        *[Origin(params=True)] * len(jax.tree.leaves(params)),
        *[Origin(x=True)] * len(jax.tree.leaves(x)),
    ]
    return closed, out, origins


class RewrittenProgram(NamedTuple):
    """The jaxpr, the shapes of its output, and the sites rewritten."""

    closed: core.ClosedJaxpr
    shapes: PyTree
    sites: list[tuple[str, str]]


class Rewritten:
    """``fn`` with a rewriting of its equations: ``(params, x) -> output``.

    Traced for each structure and shapes, once.
    """

    def __init__(
        self, fn: Function, rewriting: Rewriting, only: Sequence[int] | None = None
    ):
        self.fn, self.rewriting, self.only = fn, rewriting, only
        self._programs: dict[Hashable, RewrittenProgram] = {}

    def __call__(self, params: PyTree, x: PyTree) -> PyTree:
        program, shapes, _ = self.program(params, x)
        jaxpr, consts = jax_compat.open_jaxpr(program)
        outs = jax_compat.evaluate(jaxpr, consts, jax.tree.leaves((params, x)))
        return jax.tree.unflatten(jax.tree.structure(shapes), outs)

    def program(self, params: PyTree, x: PyTree) -> RewrittenProgram:
        """As rewritten for arguments of these structures and shapes."""
        leaves, tree = jax.tree.flatten((params, x))
        avals = [jax.ShapeDtypeStruct(np.shape(a), jnp.result_type(a)) for a in leaves]
        key = (tree, tuple((a.shape, a.dtype) for a in avals))
        if key not in self._programs:
            shapes = jax.tree.unflatten(tree, avals)
            closed, out, origins = traced(self.fn, *shapes)
            jaxpr, consts = jax_compat.open_jaxpr(closed)
            rewriter = Rewriter(self.rewriting, self.only)

            def again(*args: Array) -> list[Operand]:
                return rewriter.run(jaxpr, consts, args, origins)

            program = pruned(jax.make_jaxpr(again)(*avals))
            found = RewrittenProgram(program, out, rewriter.sites)
            if any(map(jax_compat.is_tracer, consts)):  # of the trace around: not kept
                return found
            self._programs[key] = found
        return self._programs[key]


def equations(jaxpr: Jaxpr | core.ClosedJaxpr) -> Iterator[JaxprEqn]:
    """Those of a jaxpr and of all bodies in it."""
    for eqn in jax_compat.open_jaxpr(jaxpr)[0].eqns:
        yield eqn
        for inner in core.jaxprs_in_params(eqn.params):
            yield from equations(inner)

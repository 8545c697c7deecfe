"""The traced program as a graph: values, equations, who uses what, what is active.

Bodies of calls (``jit``, ``custom_jvp_call``, ...) are looked into: each call gets
fresh values, since two calls of one jitted function share a jaxpr and its variables.
The graph is one flat list of equations; what recognises operations never meets a call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.extend.core import Primitive, primitives

from jlrp.ir import jax_compat
from jlrp.ir.declared import LOOKED_INTO, Declared
from jlrp.ir.jax_compat import Aval, JaxAtom, Jaxpr, JaxprEqn, Params, SourceInfo
from jlrp.ir.own_primitives import tag_p
from jlrp.ir.sharding.program import one_program
from jlrp.typing import Array, PyTree


@dataclass(eq=False, slots=True)
class Value:
    """One intermediate value of the program; compared by identity."""

    aval: Aval
    producer: Equation | None = None
    interval: Any = field(default=None, repr=False)  # once analysis/ has found it

    @property
    def position(self) -> int:
        """Index of the producing equation; -1 for inputs and constants."""
        return -1 if self.producer is None else self.producer.position

    @property
    def shape(self) -> tuple[int, ...]:
        return self.aval.shape

    @property
    def dtype(self) -> np.dtype:
        return self.aval.dtype


@dataclass(eq=False, slots=True)
class Literal:
    """A number written into the program."""

    number: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.number.shape

    @property
    def dtype(self) -> np.dtype:
        return self.number.dtype


Atom = Value | Literal

# How a value depends on the sources; a value has the highest level of its operands:
# not at all; only by what was chosen (integers of x, predicates, indices); on floats,
# but on no path that carries relevance; on such a path.
INDEPENDENT, CHOSEN, DEAD, CARRIED = range(4)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One call of ``jax.checkpoint``, and its policy (None: nothing is saved)."""

    policy: Callable[..., object] | None


@dataclass(eq=False, slots=True)
class Equation:
    """One application of a primitive."""

    primitive: Primitive
    params: Params
    inputs: tuple[Atom, ...]
    outputs: tuple[Value, ...]
    position: int
    scope: str
    source_infos: tuple[SourceInfo, ...]  # of the equation and the calls around it
    bodies: tuple[Program, ...] = ()  # of a loop or branch
    fresh_bodies: Callable[[], tuple[Program, ...]] = tuple  # with values of their own
    regions: tuple[Checkpoint, ...] = ()  # the checkpoints around it, outermost first
    has_effects: bool = False
    placements: dict[Value, Params] = field(default_factory=dict)

    def placed(self, outs: Sequence[Array]) -> Sequence[Array]:
        """The outputs, each on the devices that the user asked for."""
        if not self.placements:
            return outs
        return [
            jax_compat.constrained(out, self.placements[v])
            if v in self.placements
            else out
            for v, out in zip(self.outputs, outs, strict=True)
        ]

    def __repr__(self) -> str:
        return f"{self.primitive.name} at {self.where()}"

    def holds(self, names: Collection[str]) -> bool:
        """Whether a primitive of these names is in a body among its parameters."""
        bodies = jax_compat.jaxprs_in_params(self.params)
        return any(jax_compat.holds(body, names) for body in bodies)

    def where(self) -> str:
        """Scope path and the user's source line, for messages."""
        lines = map(jax_compat.source_line, self.source_infos)
        line = next(filter(None, lines), "")
        return " ".join(filter(None, [self.scope or "top level", line and f"({line})"]))


def unchanged(program: Program) -> None:
    """A rewriting that rewrites nothing."""


@dataclass(eq=False)
class Program:
    """A flat program; ``sources`` are the inputs that are explained.

    ``origins`` says what the inputs of a body are outside of it, ``unread`` are loops
    and branches that no output depends on: their names are names all the same.
    """

    equations: list[Equation]
    inputs: tuple[Value, ...]
    outputs: tuple[Atom, ...]
    constants: dict[Value, Array]
    tags: dict[str, list[Atom]] = field(default_factory=dict)
    unread: tuple[Equation, ...] = ()
    boundaries: set[Value] = field(default_factory=set)  # no operation spans these
    declared: Declared = LOOKED_INTO  # derivatives that stand for a call's body
    rewrite: Callable[[Program], None] = unchanged  # of bodies too
    parent: Program | None = None  # of a loop's or branch's body
    origins: dict[Value, tuple[Atom, ...]] = field(default_factory=dict)
    sources: tuple[Value, ...] = ()
    explained: tuple[Value, ...] = ()
    active: frozenset[Value] = frozenset()
    entered: frozenset[Value] = frozenset()  # integer sources of active floats
    levels: Mapping[Value, int] = field(default_factory=dict)  # INDEPENDENT left out
    uses: dict[Value, list[Equation]] = field(default_factory=dict)
    choosing: dict[Equation, frozenset[Atom]] = field(default_factory=dict)  # keys
    operands: dict[Equation, tuple[Value, ...]] = field(default_factory=dict)  # active
    fixed: dict[Value, bool] = field(default_factory=dict)  # made of literals alone?
    own: list[Equation] = field(default_factory=list)  # as run, if read otherwise
    virtual: set[Value] = field(default_factory=set)  # that these alone compute
    named: set[Atom] | None = None  # values, when they were first asked for

    def is_active(self, atom: Atom) -> bool:
        return isinstance(atom, Value) and atom in self.active

    def is_parameter(self, atom: Atom | None) -> bool:
        """Whether an atom is the same for every x: parameters, literals, their sums."""
        return self.level(atom) == INDEPENDENT

    def level(self, atom: Atom | None) -> int:
        """How a value depends on what is explained."""
        return self.levels.get(atom, INDEPENDENT)  # type: ignore[arg-type]

    def is_dead(self, atom: Atom) -> bool:
        """Whether a float depends on floats of x, but on no path of relevance."""
        return self.level(atom) == DEAD and jax_compat.is_inexact(atom)

    def active_inputs(self, equation: Equation) -> tuple[Value, ...]:
        """The distinct active operands of an equation, in order."""
        try:  # asked so often that calls count
            return self.operands[equation]
        except KeyError:
            active = self.active
            found = [a for a in equation.inputs if a in active]
            if self.choosing and equation in self.choosing:
                found = [a for a in found if a not in self.choosing[equation]]
            distinct = tuple(dict.fromkeys(found))
            self.operands[equation] = distinct  # type: ignore[assignment]
            return distinct  # type: ignore[return-value]

    def used_once(self, value: Value) -> bool:
        """Whether exactly one operand of one active equation reads the value."""
        kept_apart = value in self.explained or value in self.boundaries
        return len(self.uses.get(value, ())) == 1 and not kept_apart


def trace(
    fn: Callable[..., PyTree],
    *args: PyTree,
    declared: Declared = LOOKED_INTO,
    rewrite: Callable[[Program], None] = unchanged,
) -> tuple[Program, PyTree]:
    """Trace ``fn(*args)``; arguments are pytrees of arrays or ``ShapeDtypeStruct``.

    A ``custom_vjp`` or ``custom_jvp`` is looked into, but for those of which
    ``declared`` takes the derivative. ``rewrite`` writes the program and each body in
    it again, in place.

    Returns the program, whose inputs are the leaves of ``args`` in order, and the
    pytree of output avals.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    return _body(*jax_compat.open_jaxpr(closed), "", (), declared, rewrite), shapes


def append(
    program: Program,
    jaxpr: Jaxpr,
    consts: Sequence[Array],
    env: dict[JaxAtom, Atom],
    scope: str = "",
    callers: tuple[SourceInfo, ...] = (),
    regions: tuple[Checkpoint, ...] = (),
    known: dict[Hashable, Equation] | None = None,
) -> tuple[Atom, ...]:
    """Append the equations of ``jaxpr``, its inputs bound by ``env``; its outputs."""

    known = {} if known is None else known
    frame = _Frame(program, env, scope, callers, regions, known)
    return frame.append(jaxpr, consts)


@dataclass
class _Frame:
    """A jaxpr while it is appended: what its variables are, and where it is called."""

    program: Program
    env: dict[JaxAtom, Atom]
    scope: str
    callers: tuple[SourceInfo, ...]
    regions: tuple[Checkpoint, ...]
    known: dict[Hashable, Equation]

    def append(self, jaxpr: Jaxpr, consts: Sequence[Array]) -> tuple[Atom, ...]:
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            value = Value(jax_compat.aval_of(var))
            self.env[var], self.program.constants[value] = value, const
        for eqn in _one_value_each(jaxpr.eqns):
            outputs = self._outputs(eqn, tuple(map(self._read, eqn.invars)))
            self.env.update(zip(eqn.outvars, outputs, strict=True))
        return tuple(map(self._read, jaxpr.outvars))

    def _read(self, atom: JaxAtom) -> Atom:
        if jax_compat.is_literal(atom):
            return Literal(jax_compat.literal_value(atom))
        return self.env[atom]

    def _outputs(self, eqn: JaxprEqn, inputs: tuple[Atom, ...]) -> Sequence[Atom]:
        if eqn.primitive in _NAMING:  # a name for a value, not a value of its own
            self.program.tags.setdefault(eqn.params["name"], []).append(inputs[0])
            return inputs
        if eqn.primitive is primitives.sharding_constraint_p:  # no value of its own
            (value,) = inputs
            if isinstance(value, Value) and value.producer is not None:
                value.producer.placements[value] = eqn.params
            return inputs
        if eqn.primitive.name in _PLACING:
            return inputs
        call = jax_compat.call_body(eqn) or one_program(eqn, self.program.declared)
        if call is not None and not self.program.declared.keeps(eqn):
            return self._called(eqn, call, inputs)
        return self._applied(eqn, inputs)

    def _place(self, eqn: JaxprEqn) -> tuple[str, tuple[SourceInfo, ...]]:
        """The scope of an equation, and its line with those of the calls around it."""
        scopes = [self.scope, jax_compat.scope_path(eqn.source_info)]
        return "/".join(filter(None, scopes)), (eqn.source_info, *self.callers)

    def _called(
        self,
        eqn: JaxprEqn,
        call: tuple[Jaxpr, Sequence[Array]],
        inputs: tuple[Atom, ...],
    ) -> tuple[Atom, ...]:
        """The outputs of a call, its body appended."""
        body, consts = call
        regions = self.regions
        if eqn.primitive is primitives.remat_p:
            regions = (*regions, Checkpoint(eqn.params["policy"]))
        env: dict[JaxAtom, Atom] = dict(zip(body.invars, inputs, strict=True))
        frame = _Frame(self.program, env, *self._place(eqn), regions, self.known)
        return frame.append(body, consts)

    def _applied(self, eqn: JaxprEqn, inputs: tuple[Atom, ...]) -> tuple[Value, ...]:
        """The outputs of an equation of the program, or of the same one before it."""
        scope, sources = self._place(eqn)
        key = (eqn.primitive, scope, tuple(map(_identity, inputs)))
        same = self.known.get(key)
        if same is not None and same.params == eqn.params:
            return same.outputs
        program = self.program
        bodies = jax_compat.bodies(eqn)
        fresh = partial(
            _bodies, bodies, scope, sources, program.declared, program.rewrite
        )
        equation = Equation(
            eqn.primitive,
            jax_compat.unplaced(eqn.params),
            inputs,
            tuple(Value(jax_compat.aval_of(v)) for v in eqn.outvars),
            len(program.equations),
            scope,
            sources,
            fresh(),
            fresh,
            self.regions,
            bool(eqn.effects),
        )
        for value in equation.outputs:
            value.producer = equation
        program.equations.append(equation)
        if _may_be_shared(eqn):
            self.known[key] = equation
        return equation.outputs


def _one_value_each(eqns: Iterable[JaxprEqn]) -> Iterable[JaxprEqn]:
    """Equations that hand on several values side by side, as one for each.

    Otherwise a parameter that is put on a device beside x would carry relevance.
    """
    for eqn in eqns:
        if eqn.primitive.name not in _SIDE_BY_SIDE or len(eqn.invars) == 1:
            yield eqn
            continue
        for i, (read, made) in enumerate(zip(eqn.invars, eqn.outvars, strict=True)):
            params = {
                name: (given[i],) if isinstance(given, tuple) else given
                for name, given in eqn.params.items()
            }
            yield eqn.replace(invars=[read], outvars=[made], params=params)


def _bodies(
    bodies: Sequence[tuple[Jaxpr, Sequence[Array]]],
    scope: str,
    callers: tuple[SourceInfo, ...],
    declared: Declared,
    rewrite: Callable[[Program], None],
) -> tuple[Program, ...]:
    found = (_body(*body, scope, callers, declared, rewrite) for body in bodies)
    return tuple(found)


def _body(
    jaxpr: Jaxpr,
    consts: Sequence[Array],
    scope: str,
    callers: tuple[SourceInfo, ...],
    declared: Declared,
    rewrite: Callable[[Program], None],
) -> Program:
    program = Program([], (), (), {}, declared=declared, rewrite=rewrite)
    program.inputs = tuple(Value(jax_compat.aval_of(v)) for v in jaxpr.invars)
    env: dict[JaxAtom, Atom] = dict(zip(jaxpr.invars, program.inputs, strict=True))
    program.outputs = append(program, jaxpr, consts, env, scope, callers)
    read = reaching(program.equations, program.outputs)
    unread = set(program.equations).difference(read)
    program.unread = tuple(e for e in program.equations if e in unread and e.bodies)
    program.equations = read
    rewrite(program)
    return program


def _may_be_shared(eqn: JaxprEqn) -> bool:
    """Whether an equation that was traced twice is one: it moves, or makes integers.

    torchax replays a view each time that it is read: a signal and its norm would be
    made from different, if equal, slices.
    """
    if eqn.effects or jax_compat.bodies(eqn):
        return False
    moves = eqn.primitive in _MOVES
    return moves or not any(jax_compat.is_inexact(v.aval) for v in eqn.outvars)


def _identity(atom: Atom) -> Hashable:
    if isinstance(atom, Value) or atom.number.size > 16:
        return atom
    return str(atom.dtype), atom.shape, atom.number.tobytes()


_MOVES = {
    primitives.broadcast_in_dim_p,
    primitives.convert_element_type_p,
    primitives.gather_p,
    primitives.reshape_p,
    primitives.rev_p,
    primitives.slice_p,
    primitives.squeeze_p,
    primitives.transpose_p,
}
_SIDE_BY_SIDE = ("device_put", "optimization_barrier")
_NAMING = (tag_p, primitives.name_p)
_PLACING = ("mesh_cast", "pvary", "reshard")  # types alone: numbers as they are


def reaching(equations: list[Equation], outputs: Iterable[Atom]) -> list[Equation]:
    """The equations that the outputs depend on: dead ones are common in traces."""
    needed = {a for a in outputs if isinstance(a, Value)}
    kept = []
    for equation in reversed(equations):
        if not needed.isdisjoint(equation.outputs):
            kept.append(equation)
            needed.update(a for a in equation.inputs if isinstance(a, Value))
    return kept[::-1]


def computing(
    program: Program, wanted: Iterable[Value], follows: Callable[[Value], bool]
) -> tuple[list[Equation], list[Value]]:
    """The equations that compute some values, and the values that these start from.

    Values that are not to be followed are such starts; so are the program's inputs, but
    not its constants.
    """
    starts: dict[Value, None] = {}
    found: set[Equation] = set()
    seen: set[Value] = set()
    stack = list(wanted)
    while stack:
        value = stack.pop()
        if value in seen or value in program.constants:
            continue
        seen.add(value)
        if value.producer is None or not follows(value):
            starts[value] = None
        elif value.producer not in found:
            found.add(value.producer)
            stack += [a for a in value.producer.inputs if isinstance(a, Value)]
    return sorted(found, key=lambda e: e.position), list(starts)


def between(
    starts: Iterable[Value],
    ends: Iterable[Value],
    follows: Callable[[Value], bool],
) -> tuple[tuple[Equation, ...], tuple[Value, ...]]:
    """The equations that compute ``ends`` from ``starts``, and the constants they read.

    Constants are the values among their operands that do not depend on ``starts``, or
    depend on them only through values that are not to be followed.
    """
    starts, ends = set(starts), tuple(ends)
    earliest = min(v.position for v in starts)
    depends: dict[Value, bool] = dict.fromkeys(starts, True)

    def visit(end: Value) -> None:
        stack = [end]
        while stack:
            value = stack[-1]
            if value in depends:
                stack.pop()
            elif (
                value.position <= earliest
                or value.producer is None
                or not follows(value)
            ):
                depends[stack.pop()] = False
            else:
                operands = [a for a in value.producer.inputs if isinstance(a, Value)]
                unknown = [a for a in operands if a not in depends]
                if unknown:
                    stack.extend(unknown)
                else:
                    depends[stack.pop()] = any(depends[a] for a in operands)

    for end in ends:
        visit(end)
    inside: dict[Equation, None] = {}
    constants: dict[Value, None] = {}
    stack = [v for v in ends if v not in starts]
    while stack:
        producer = stack.pop().producer
        if producer is None or producer in inside:
            continue
        inside[producer] = None
        for atom in producer.inputs:
            if isinstance(atom, Value) and atom not in starts:
                if depends[atom]:
                    stack.append(atom)
                else:
                    constants[atom] = None
    equations = tuple(sorted(inside, key=lambda e: e.position))
    return equations, tuple(constants)


def produced_by(atom: object, *primitives: Primitive) -> Equation | None:
    """The equation that makes a value, if it is of one of some primitives."""
    made = atom.producer if isinstance(atom, Value) else None
    return made if made is not None and made.primitive in primitives else None


def evaluate(
    equations: Iterable[Equation],
    env: dict[Value, Any],
    params_of: Callable[[Equation], Params] = lambda e: e.params,
) -> None:
    """Run equations in ``env``, which holds their operands and gets their outputs."""
    for equation in equations:
        args = [read(env, a) for a in equation.inputs]
        outs = jax_compat.bind(equation.primitive, params_of(equation), args)
        env.update(zip(equation.outputs, equation.placed(outs), strict=True))


def read(env: Mapping[Value, Any], atom: Atom) -> Any:
    return atom.number if isinstance(atom, Literal) else env[atom]

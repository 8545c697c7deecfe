"""Loops and branches: the rules of their bodies' operations, run in reverse.

A scan keeps what its body's rules read, stacked over the iterations, and hands
relevance back by a scan the other way round. A branch is run again where relevance
comes back, and so is a ``while_loop``, from checkpoints: its trip count is not known
before it has run, so that nothing can be stacked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import jaxpr_as_fun

from jlrp.analysis.dataflow import dependent
from jlrp.ir.jax_compat import Jaxpr, Operand
from jlrp.ir.loops import Body
from jlrp.ir.program import Atom, Equation, Literal, Value, computing
from jlrp.ops.base import Operation
from jlrp.ops.captures import COUNTS, Captured
from jlrp.promise import Promise, difference
from jlrp.rules.base import (
    Array,
    BodyPlan,
    Both,
    Causes,
    Context,
    Forward,
    Propagation,
    Residuals,
    Rule,
)
from jlrp.typing import PyTree

T = TypeVar("T")
Promises = list[Promise | None]
ScanBody = Callable[[PyTree, PyTree], tuple[PyTree, PyTree]]  # as lax.scan takes it
Recompute = tuple[ScanBody, PyTree]  # what is run again, and the scanned arrays
Masks = Mapping[str, Array]


@dataclass(frozen=True)
class _Extra:
    """What is asked for beside the promises of the operands."""

    captures: bool = False
    causes: bool = False
    wanted: frozenset[Value] = frozenset()


@dataclass(frozen=True)
class _Found:
    """What a reverse pass through a loop or branch found.

    Attributes:
      promises: one for each operand of the equation.
      causes: amounts absorbed inside, by cause.
      multipliers: of the wanted parameters among the operands.
      captured: relevance at names, by the number of the body that they are in.
    """

    promises: Promises
    causes: Causes
    multipliers: dict[Value, Array]
    captured: Mapping[int, Captured]


@dataclass(frozen=True, eq=False)
class _Bodies(Rule):
    """What loops and branches share: their bodies and the plans for them."""

    bodies: tuple[Body, ...]
    plans: tuple[BodyPlan, ...]

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def needs(self, op: Operation) -> tuple[Value, ...]:
        return tuple(a for a in op.equations[0].inputs if isinstance(a, Value))

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        (equation,) = op.equations
        by_value = dict(zip(op.outputs, r, strict=True))
        r_out = [by_value.get(v) for v in equation.outputs]
        extra = _Extra(captures=self._captures())
        found = self._reverse(equation, r_out, ctx, extra)
        active = set(op.inputs)
        promises = [
            promise
            for atom, promise in zip(equation.inputs, found.promises, strict=True)
            if atom in active
        ]

        def causes() -> Causes:
            return self._reverse(equation, r_out, ctx, _Extra(causes=True)).causes

        def constants(wanted: Sequence[Value]) -> Sequence[Array]:
            extra = _Extra(wanted=frozenset(wanted))
            found = self._reverse(equation, r_out, ctx, extra).multipliers
            return [found[v] for v in wanted]

        return Propagation(
            promises, causes, constants=constants, captured=found.captured
        )

    def _captures(self) -> bool:
        return any(plan.captured for plan in self.plans)

    def _reverse(
        self, equation: Equation, r_out: Promises, ctx: Context, extra: _Extra
    ) -> _Found:
        raise NotImplementedError


class _Iteration:
    """One run of a body in reverse: promises of its outputs in, of its inputs out.

    Returns these, the amounts that its operations absorbed, the multipliers of the
    wanted inputs, and what was captured. ``masks`` are those of this iteration.
    """

    def __init__(
        self,
        body: Body,
        plan: BodyPlan,
        equation: Equation,
        ctx: Context,
        extra: _Extra,
    ):
        self.body, self.plan, self.ctx, self.extra = body, plan, ctx, extra
        pairs = zip(body.program.inputs, body.operands(equation), strict=True)
        wanted = [(v, a) for v, a in pairs if isinstance(a, Value)]
        wanted = [(v, a) for v, a in wanted if a in extra.wanted]
        self.initial = [(v, a) for v, a in wanted if v in body.carries]
        self.wanted = [(v, a) for v, a in wanted if v not in body.carries]
        self.carried = [  # made of parameters by the iteration before
            v for v in body.carries if extra.wanted and v in plan.parameters
        ]

    def __call__(
        self, residuals: Residuals, outs: Promises, masks: Masks
    ) -> tuple[Promises, Causes, list[Array], Captured]:
        program = self.body.program
        seeds: dict[Value, Promise] = {}
        explained: dict[Value, Array] = {}
        causes: Causes = {}
        for atom, promise in zip(program.outputs, outs, strict=True):
            if promise is None:
                continue
            if program.is_active(atom):
                assert isinstance(atom, Value)
                seeds[atom] = promise + seeds.get(atom)
                continue  # else only other iterations' plans have it active
            if self.extra.wanted and atom in self.plan.parameters:
                multiplier = promise.per_unit(self._number(atom, residuals))
                if multiplier is not None:
                    _added(explained, atom, multiplier)  # type: ignore[arg-type]
            if self.extra.causes:
                amount = jnp.sum(promise.resolve(self._number(atom, residuals)))
                cause = "stopped" if program.is_dead(atom) else "constants"
                causes[cause] = causes.get(cause, 0.0) + amount
        observe = _summing(causes) if self.extra.causes else None
        inputs = [v for v, _ in self.wanted] + self.carried
        r_in, found, captured = self.ctx.reverse_body(
            self.plan,
            residuals,
            seeds,
            observe,
            inputs,
            explained,
            masks,
            self.extra.captures,
        )
        multipliers = dict(zip(inputs, found, strict=True))
        by_source = dict(zip(program.sources, r_in, strict=True))
        by_source |= {v: Promise(multiplier=multipliers[v]) for v in self.carried}
        promises = [by_source.get(v) for v in program.inputs]
        wanted = [multipliers[v] for v, _ in self.wanted]
        return promises, causes, wanted, captured

    def add_initial(self, found: dict[Value, Array], carried: Promises) -> None:
        """Add the multipliers of learned initial states."""
        for v, outer in self.initial:
            number = self.ctx.read(outer)
            promise = carried[self.body.carries.index(v)] or Promise()
            multiplier = promise.per_unit(number)
            zero = jnp.zeros_like(number)
            _added(found, outer, zero if multiplier is None else multiplier)

    def _number(self, atom: Atom, residuals: Residuals | Both) -> Array:
        """What multipliers of the atom are of: from a reference, its change."""

        def at(residuals: Residuals) -> Operand:
            return atom.number if isinstance(atom, Literal) else residuals[atom]

        found = at_both(at, residuals)
        if isinstance(found, Both):
            return difference(jnp.asarray(found.here), jnp.asarray(found.there))
        return found


def both_of(ctx: Context, read: Callable[[Context], T]) -> T | Both:
    """What is read at x, and, from a reference, there too."""
    here = read(ctx)
    return here if ctx.reference is None else Both(here, read(ctx.reference))


def at_both(function: Callable[..., PyTree], *args: PyTree) -> PyTree:
    """A function of what there may be one of at each point."""
    if not any(isinstance(a, Both) for a in args):
        return function(*args)
    here = [a.here if isinstance(a, Both) else a for a in args]
    there = [a.there if isinstance(a, Both) else a for a in args]
    return Both(function(*here), function(*there))


def _by_iteration(plans: Sequence[BodyPlan], ctx: Context) -> Masks:
    """The masks in a loop's bodies that have one for each iteration along axis 0."""
    axes = {name: n for plan in plans for name, n in plan.masks.items()}
    masks = {name: ctx.mask(name) for name in axes}
    return {name: mask for name, mask in masks.items() if mask.ndim > axes[name]}


def _summing(causes: Causes) -> Callable[..., None]:
    def observe(
        step: object, r_out: object, propagated: Propagation, numbers: object
    ) -> None:
        for name, amount in propagated.causes().items():
            amount = jnp.sum(amount)
            causes[name] = causes[name] + amount if name in causes else amount

    return observe


def _added(found: dict[Value, Array], value: Value, amount: Array) -> None:
    found[value] = found[value] + amount if value in found else amount


# A loop's carried promises must have the same parts in every iteration.


def _settled(
    iteration: Callable[[Promises], Promises], carried: Promises
) -> list[Promise | None]:
    """Carried promises with every part that some iteration gives them."""
    while True:
        shapes = jax.eval_shape(iteration, carried)
        grown = [_filled(c, s) for c, s in zip(carried, shapes, strict=True)]
        if jax.tree.structure(grown) == jax.tree.structure(carried):
            return grown
        carried = grown


def _filled(promise: Promise | None, like: Promise | None) -> Promise | None:
    """The promise with every part that ``like`` has; new parts are zero."""
    if like is None:
        return promise
    have = promise or Promise()

    def part(mine: Array | None, other: Array | None) -> Array | None:
        if other is None or mine is not None:
            return mine
        return jnp.zeros(other.shape, other.dtype)

    return Promise(part(have.value, like.value), part(have.multiplier, like.multiplier))


def _all_like(promises: Promises, like: Promises) -> Promises:
    """Promises with the parts and dtypes of others."""
    return [_dtypes_like(_filled(p, q), q) for p, q in zip(promises, like, strict=True)]


def _causes_like(causes: Causes, zeros: Causes) -> Causes:
    """Amounts with the causes and dtypes of others; new ones are zero."""
    return _dtypes_like({k: causes.get(k, zero) for k, zero in zeros.items()}, zeros)


def _dtypes_like(arrays: PyTree, like: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: a.astype(b.dtype), arrays, like)


def _zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def _plus(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, a, b)


@dataclass(frozen=True, eq=False)
class _Part:
    """A body of a scan with its plan: what of it is stacked, sliced, made again."""

    body: Body
    plan: BodyPlan

    @cached_property
    def _varying(self) -> set[Value]:
        body = self.body
        return dependent(body.program, (*body.carries, *body.slices))

    @cached_property
    def stacked(self) -> list[Value | Equation]:
        slices = set(self.body.slices)
        kept = [v for v in self.plan.kept if v in self._varying and v not in slices]
        recorded = [e for e in self.plan.recorders if e not in self.plan.repeated]
        return [*kept, *recorded]

    @cached_property
    def invariant(self) -> list[Value]:
        return [v for v in self.plan.kept if v not in self._varying]

    @cached_property
    def inputs_read(self) -> set[Value]:
        """The constants and slices that the reverse pass reads."""
        program = self.body.program
        _, starts = computing(program, self.invariant, lambda _: True)
        slices = {v for v in self.body.slices if v in self.plan.kept}
        return slices.union(starts)


@dataclass(frozen=True, eq=False, repr=False)
class Scan(_Bodies):
    """``lax.scan``: relevance by the reverse scan over stacked residuals.

    Stacked is only what the body's rules read and what differs between iterations;
    slices are read from the scanned arrays, invariants made again from constants. First
    iterations that have a plan of their own are run before the scan.

    A ``chunked`` scan of n iterations keeps the carries before each of about sqrt(n)
    chunks instead, and runs a chunk again where relevance comes back. Source: Chen et
    al. 2016 (arXiv 1604.06174).
    """

    chunked: bool = False

    def parts(self) -> list[_Part]:
        return [_Part(b, p) for b, p in zip(self.bodies, self.plans, strict=True)]

    def needs(self, op: Operation) -> tuple[Value, ...]:
        (equation,) = op.equations
        if self.chunked:
            return super().needs(op)
        needed: dict[Value, None] = {}
        for part in self.parts():
            operands = part.body.operands(equation)
            for v, a in zip(part.body.program.inputs, operands, strict=True):
                if v in part.inputs_read and isinstance(a, Value):
                    needed[a] = None
        return tuple(needed)

    def record(
        self, equation: Equation, operands: Sequence[Array], forward: Forward
    ) -> tuple[list[Array], list[PyTree]]:
        """Run the scan; its outputs, and what is kept for the reverse pass."""
        *peeled, main = self.parts()
        n, c = main.body.n_carries, main.body.n_constants
        constants, carry = operands[:c], list(operands[c : c + n])
        order = _Order(equation, len(peeled))
        first, rest = order.taken(list(operands[c + n :]))
        kept, first_ys = [], []
        for part, xs in zip(peeled, first, strict=False):
            run = _iteration(part, constants, forward)
            carry, (ys, residuals) = run(carry, xs)
            kept.append(residuals)
            first_ys.append(ys)
        run = _iteration(main, constants, forward)
        rest_ys = []
        for span in order.spans(self.chunked):
            carry, (ys, residuals) = span.forward(run, carry, rest)
            rest_ys.append(ys)
            kept.append(residuals)
        return [*carry, *order.joined(first_ys, order.concatenated(rest_ys))], kept

    def _reverse(
        self, equation: Equation, r_out: Promises, ctx: Context, extra: _Extra
    ) -> _Found:
        return _ScanInReverse(self, equation, r_out, ctx, extra).found()

    def masks(self, order: _Order, ctx: Context) -> Masks:
        """The masks that differ between iterations, one for each."""
        masks = {
            name: jnp.broadcast_to(mask, (order.length, *mask.shape[1:]))
            for name, mask in _by_iteration(self.plans, ctx).items()
        }
        for name in frozenset().union(*(plan.masks_of_next for plan in self.plans)):
            mask = ctx.mask(name)
            mask = masks.get(name, jnp.broadcast_to(mask, (order.length, *mask.shape)))
            masks[name] = order.of_next(mask, jnp.ones(mask.shape[1:], mask.dtype))
        return masks


def _iteration(part: _Part, constants: Sequence[Array], forward: Forward) -> ScanBody:
    """One iteration as ``lax.scan`` has it; beside its ys, what rules read of it."""
    n = part.body.n_carries

    def run(carry: PyTree, xs: PyTree) -> tuple[PyTree, PyTree]:
        outs, residuals = forward(part.plan, [*constants, *carry, *xs])
        return outs[:n], (outs[n:], [residuals[key] for key in part.stacked])

    return run


def _again(rerun: Recompute | Both) -> Recompute:
    """The same at x, or at both points, as one."""
    if not isinstance(rerun, Both):
        return rerun
    (here, xs), (there, other_xs) = rerun.here, rerun.there

    def run(carry: Both, xs: Both) -> tuple[PyTree, PyTree]:
        of_x, (ys, residuals) = here(carry.here, xs.here)
        of_other, (_, others) = there(carry.there, xs.there)
        return Both(of_x, of_other), (ys, Both(residuals, others))

    return run, Both(xs, other_xs)


def _shapes_of_one(arrays: PyTree) -> PyTree:
    """Shapes of the slices along the first axis."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), arrays)


class _PartInReverse:
    """One iteration of a scan in reverse."""

    def __init__(
        self,
        part: _Part,
        equation: Equation,
        ctx: Context,
        extra: _Extra,
    ):
        self.part, body = part, part.body
        pairs = zip(body.program.inputs, body.operands(equation), strict=True)
        operands = [(v, a) for v, a in pairs if v in part.inputs_read]
        read = {v for v, _ in operands}
        self.sliced = [v for v in body.slices if v in read]

        def outside(ctx: Context) -> tuple[list[Array], dict[Value, Array]]:
            found = {v: ctx.original(a) for v, a in operands}
            arrays = [found.pop(v) for v in self.sliced]
            return arrays, ctx.made(body.program, part.invariant, found)

        found = both_of(ctx, outside)
        self.arrays = at_both(lambda pair: pair[0], found)
        self.constants = at_both(lambda pair: pair[1], found)
        self.iteration = _Iteration(body, part.plan, equation, ctx, extra)
        wanted = self.iteration.wanted
        self.is_slice = [v in body.slices for v, _ in wanted]
        self.constants_wanted = [a for v, a in wanted if v not in body.slices]
        self.slices_wanted = [a for v, a in wanted if v in body.slices]

    def __call__(self, carried: Promises, xs: PyTree) -> PyTree:
        """Promises of the carries; of constants, with amounts to add up; of slices.

        With those of the slices comes what was captured, as it is stacked too.
        """
        ys, residuals, (slices, masks) = xs
        n, c = self.part.body.n_carries, self.part.body.n_constants

        def numbers_of(
            constants: Residuals, residuals: PyTree, slices: Sequence[Array]
        ) -> Residuals:
            stacked = dict(zip(self.part.stacked, residuals, strict=True))
            return {
                **constants,
                **stacked,
                **dict(zip(self.sliced, slices, strict=True)),
            }

        numbers = at_both(numbers_of, self.constants, residuals, slices)
        outs = [*carried, *ys]
        r_in, causes, multipliers, captured = self.iteration(numbers, outs, masks)
        pairs = list(zip(multipliers, self.is_slice, strict=True))
        summed = [m for m, is_slice in pairs if not is_slice]
        sliced = [m for m, is_slice in pairs if is_slice]
        return (
            r_in[c : c + n],
            (r_in[:c], causes, summed),
            (r_in[c + n :], sliced, captured),
        )


class _ScanInReverse:
    """The reverse pass of one scan.

    First it goes through the iterations that are stacked, by a scan over each span of
    them, then one by one through the first, which have plans of their own.
    """

    def __init__(
        self,
        rule: Scan,
        equation: Equation,
        r_out: Promises,
        ctx: Context,
        extra: _Extra,
    ):
        parts = rule.parts()
        n = parts[-1].body.n_carries
        self.order = _Order(equation, len(parts) - 1)
        self.carried = r_out[:n]
        self.first_ys, self.rest_ys = self.order.taken(r_out[n:])
        residuals = _recorded_at_both(equation, ctx)
        n_first = len(self.first_ys)
        self.residuals, self.of_spans = residuals[:n_first], residuals[n_first:]
        self.runs = [_PartInReverse(part, equation, ctx, extra) for part in parts]
        masks = rule.masks(self.order, ctx)
        slices = [self.order.taken((run.arrays, masks)) for run in self.runs]
        self.slices = [of_first for of_first, _ in slices]
        self.arrays = (self.rest_ys, slices[-1][1])
        self.spans = self.order.spans(rule.chunked)
        self.again = None
        if rule.chunked:
            rerun = partial(_rerun, parts[-1], equation, self.order)
            self.again = _again(both_of(ctx, rerun))

    def found(self) -> _Found:
        carried, totals, of_rest = self._through_spans()
        multipliers: dict[Value, Array] = {}
        carried, constants, causes, of_first = self._through_first(
            carried, totals, multipliers
        )
        of_slices, of_sliced, captured = self.order.joined_promises(of_first, of_rest)
        last = self.runs[-1]
        for outer, amount in zip(last.constants_wanted, totals[2], strict=True):
            _added(multipliers, outer, amount)
        for outer, amount in zip(last.slices_wanted, of_sliced, strict=True):
            _added(multipliers, outer, amount)
        self.runs[0].iteration.add_initial(multipliers, carried)
        promises = [*constants, *carried, *of_slices]
        by_body = {0: captured} if captured else {}
        return _Found(promises, causes, multipliers, by_body)

    def _through_spans(self) -> tuple[Promises, PyTree, PyTree]:
        """Promises before the stacked iterations, sums over these, what they stack."""
        run = self.runs[-1]
        carried, totals = self._start()

        def step(state: PyTree, xs: PyTree) -> PyTree:
            carried, totals = state
            r_in, amounts, out = run(carried, xs)
            return (_all_like(r_in, carried), _plus(totals, amounts)), out

        state, outs = (carried, totals), []
        backwards = zip(reversed(self.spans), reversed(self.of_spans), strict=True)
        for span, residuals in backwards:
            state, out = span.reverse(step, state, self.arrays, residuals, self.again)
            outs.insert(0, out)
        carried, totals = state
        return carried, totals, self.order.concatenated(outs)

    def _start(self) -> tuple[Promises, PyTree]:
        """Carried promises with every part that they will have, and sums of zero."""
        run = self.runs[-1]
        ys, slices = _shapes_of_one(self.arrays)
        residuals = self.spans[0].shapes(self.of_spans[0], self.again)
        xs = (ys, residuals, slices)
        carried = _settled(lambda s: run(s, _zeros(xs))[0], self.carried)
        return carried, _zeros(jax.eval_shape(run, carried, xs)[1])

    def _through_first(
        self, carried: Promises, totals: PyTree, multipliers: dict[Value, Array]
    ) -> tuple[Promises, Promises, Causes, list[PyTree]]:
        """The same of the first iterations, whose multipliers are added to others."""
        constants, causes, _ = totals
        outs = []
        for i in reversed(range(len(self.first_ys))):
            run = self.runs[i]
            xs = (self.first_ys[i], self.residuals[i], self.slices[i][i])
            carried, (more, amounts, of_constants), out = run(carried, xs)
            constants = [_sum(a, b) for a, b in zip(constants, more, strict=True)]
            names = {**causes, **amounts}
            causes = {k: causes.get(k, 0) + amounts.get(k, 0) for k in names}
            for outer, amount in zip(run.constants_wanted, of_constants, strict=True):
                _added(multipliers, outer, amount)
            outs.insert(0, out)
        return carried, constants, causes, outs


def _recorded_at_both(equation: Equation, ctx: Context) -> list[PyTree]:
    """What the forward pass kept of a scan, one entry for each span of iterations."""
    recorded = ctx.recorded(equation)
    if ctx.reference is None:
        return recorded
    there = ctx.reference.recorded(equation)
    return [Both(a, b) for a, b in zip(recorded, there, strict=True)]


def _rerun(part: _Part, equation: Equation, order: _Order, ctx: Context) -> Recompute:
    """An iteration that is run again, and the arrays that it slices."""
    c = part.body.n_constants
    operands = [ctx.original(a) for a in equation.inputs]
    _, xs = order.taken(operands[c + part.body.n_carries :])
    return _iteration(part, operands[:c], ctx.forward_body), xs


class _Order:
    """The order of a scan's iterations along the arrays that it reads and writes."""

    def __init__(self, equation: Equation, n_first: int):
        self.length = equation.params["length"]
        self.reverse = equation.params["reverse"]
        self.unroll = equation.params["unroll"]
        self.n_first = min(n_first, self.length)

    def spans(self, chunked: bool) -> list[_Whole | _Chunks]:
        """What is scanned at once of all iterations but the first."""
        length = self.length - self.n_first
        if not chunked or length < _FEWEST_CHUNKED:
            return [_Whole(length, self.reverse, self.unroll)]
        size = math.isqrt(length)
        count, rest = divmod(length, size)
        spans: list[_Whole | _Chunks] = [_Chunks(0, count, size, length, self.reverse)]
        if rest:
            spans.append(_Chunks(length - rest, 1, rest, length, self.reverse))
        return spans

    def concatenated(self, of_spans: list[PyTree]) -> PyTree:
        """The arrays of all spans."""
        if len(of_spans) == 1:
            return of_spans[0]
        of_spans = of_spans[::-1] if self.reverse else of_spans
        return jax.tree.map(lambda *parts: jnp.concatenate(parts), *of_spans)

    def taken(self, arrays: PyTree) -> tuple[list[PyTree], PyTree]:
        """The slices of the first iterations, and the arrays of the others."""
        count = self.n_first
        if not count:
            return [], arrays
        rest = slice(0, self.length - count) if self.reverse else slice(count, None)
        indices = [self.length - 1 - i if self.reverse else i for i in range(count)]
        slices = [jax.tree.map(lambda a: a[i], arrays) for i in indices]  # noqa: B023
        return slices, jax.tree.map(lambda a: a[rest], arrays)

    def of_next(self, array: Array, behind: Array) -> Array:
        """What each iteration has of the next; ``behind`` is what the last has."""
        if not self.length:
            return array
        if self.reverse:
            return jnp.concatenate([behind[None], array[:-1]])
        return jnp.concatenate([array[1:], behind[None]])

    def joined(self, first: list[PyTree], rest: PyTree) -> PyTree:
        """The arrays of all iterations."""
        if not first:
            return rest
        first = first[::-1] if self.reverse else first

        def join(*parts: Array) -> Array:
            *one_by_one, others = parts
            stacked = jnp.stack(one_by_one).astype(others.dtype)
            both = [others, stacked] if self.reverse else [stacked, others]
            return jnp.concatenate(both)

        return jax.tree.map(join, *first, rest)

    def joined_promises(self, first: list[PyTree], rest: PyTree) -> PyTree:
        """As ``joined``, of promises that may have other parts in each iteration."""
        if not first:
            return rest
        promises, multipliers, captured = rest
        joined: Promises = []
        for i, whole in enumerate(promises):
            ones = [out[0][i] for out in first]
            like = _stacked_parts([whole, *ones])
            if like is None:
                joined.append(None)
                continue
            shape = lambda a: jax.ShapeDtypeStruct(  # noqa: E731
                (self.length - len(first), *a.shape), a.dtype
            )
            whole = _filled(whole, jax.tree.map(shape, like))
            ones = [_filled(one, like) for one in ones]
            joined.append(self.joined(ones, whole))
        return (
            joined,
            self.joined([out[1] for out in first], multipliers),
            self.joined([out[2] for out in first], captured),
        )


_FEWEST_CHUNKED = 4


@dataclass(frozen=True)
class _Whole:
    """Iterations of which all that rules read is stacked."""

    length: int
    reversed: bool
    unroll: int | bool

    def forward(self, run: ScanBody, carry: PyTree, xs: PyTree) -> PyTree:
        return lax.scan(run, carry, xs, self.length, self.reversed, self.unroll)

    def reverse(
        self,
        step: ScanBody,
        state: PyTree,
        arrays: PyTree,
        residuals: PyTree,
        again: Recompute | None,
    ) -> PyTree:
        xs = (arrays[0], residuals, arrays[1])
        return lax.scan(step, state, xs, self.length, not self.reversed, self.unroll)

    def shapes(self, residuals: PyTree, again: Recompute | None) -> PyTree:
        """Of what rules read of one iteration."""
        return _shapes_of_one(residuals)


@dataclass(frozen=True)
class _Chunks:
    """Iterations in chunks, of which the carries before each are kept.

    ``start`` is the first of them in time, ``length`` how many there are with those of
    other spans: they index the whole arrays, since a slice of all weights of a chunk
    would be a copy.
    """

    start: int
    count: int
    size: int
    length: int
    reversed: bool

    def _times(self) -> Array:
        return self.start + jnp.arange(self.count * self.size).reshape(-1, self.size)

    def _at(self, arrays: PyTree, time: Array) -> PyTree:
        index = self.length - 1 - time if self.reversed else time
        return jax.tree.map(
            lambda a: lax.dynamic_index_in_dim(a, index, 0, False), arrays
        )

    def _flat(self, stacked: PyTree) -> PyTree:
        def flat(a: Array) -> Array:
            a = a.reshape(-1, *a.shape[2:])
            return jnp.flip(a, 0) if self.reversed else a

        return jax.tree.map(flat, stacked)

    def forward(self, run: ScanBody, carry: PyTree, xs: PyTree) -> PyTree:
        def one(carry: PyTree, time: Array) -> PyTree:
            carry, (ys, _) = run(carry, self._at(xs, time))
            return carry, ys

        def chunk(start: PyTree, times: Array) -> PyTree:
            carry, ys = lax.scan(one, start, times)
            return carry, (ys, start)

        carry, (ys, starts) = lax.scan(chunk, carry, self._times())
        return carry, (self._flat(ys), starts)

    def reverse(
        self,
        step: ScanBody,
        state: PyTree,
        arrays: PyTree,
        starts: PyTree,
        again: Recompute | None,
    ) -> PyTree:
        assert again is not None
        run, xs = again

        def one(carry: PyTree, time: Array) -> PyTree:
            carry, (_, residuals) = run(carry, self._at(xs, time))
            return carry, residuals

        def back(state: PyTree, at_time: PyTree) -> PyTree:
            time, residuals = at_time
            ys, slices = self._at(arrays, time)
            return step(state, (ys, residuals, slices))

        def chunk(state: PyTree, of_chunk: PyTree) -> PyTree:
            start, times = of_chunk
            _, residuals = lax.scan(one, start, times)
            return lax.scan(back, state, (times, residuals), reverse=True)

        state, out = lax.scan(chunk, state, (starts, self._times()), reverse=True)
        return state, self._flat(out)

    def shapes(self, starts: PyTree, again: Recompute | None) -> PyTree:
        """Of what rules read of one iteration."""
        assert again is not None
        run, xs = again
        _, (_, residuals) = jax.eval_shape(
            run, _shapes_of_one(starts), _shapes_of_one(xs)
        )
        return residuals


def _stacked_parts(promises: Promises) -> Promise | None:
    """Shapes of one slice of the parts that any of these promises has."""
    whole, *ones = promises
    like = _shapes_of_one(whole)
    for one in ones:
        if one is None:
            continue
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), one)
        like = like or Promise()
        like = Promise(
            like.value if like.value is not None else shapes.value,
            like.multiplier if like.multiplier is not None else shapes.multiplier,
        )
    return like


def _sum(a: Promise | None, b: Promise | None) -> Promise | None:
    return b if a is None else a + b


class Cond(_Bodies):
    """``lax.cond`` and ``lax.switch``: the branch that ran, run again in reverse."""

    def _reverse(
        self, equation: Equation, r_out: Promises, ctx: Context, extra: _Extra
    ) -> _Found:
        index, operands = self._operands(equation, ctx)
        if ctx.reference is not None and ctx.varies(equation.inputs[0]):
            return self._of_both(equation, r_out, ctx, extra)
        return self._of_branch(index, operands, equation, r_out, ctx, extra)

    def _operands(self, equation: Equation, ctx: Context) -> tuple[Array, PyTree]:
        def read(ctx: Context) -> list[Array]:
            return [ctx.read(a) for a in equation.inputs]

        index, *operands = read(ctx)
        if ctx.reference is None:
            return index, operands
        return index, Both(operands, read(ctx.reference)[1:])

    def _of_both(
        self, equation: Equation, r_out: Promises, ctx: Context, extra: _Extra
    ) -> _Found:
        """Half by the branch of each point; what another branch makes is a switch."""
        assert ctx.reference is not None
        index, operands = self._operands(equation, ctx)
        other = ctx.reference.read(equation.inputs[0])
        first, second = (
            self._of_branch(i, operands, equation, r_out, ctx, extra)
            for i in (index, other)
        )

        def mean(a: PyTree, b: PyTree) -> PyTree:
            return jax.tree.map(lambda x, y: (x + y) / 2, a, b)

        causes = mean(first.causes, second.causes)
        if extra.causes:
            switch = self._switched(index, other, operands, r_out, ctx)
            causes["switch"] = causes.get("switch", 0.0) + switch
        return _Found(
            mean(first.promises, second.promises),
            causes,
            mean(first.multipliers, second.multipliers),
            mean(first.captured, second.captured),
        )

    def _switched(
        self, index: Array, other: Array, operands: Both, r_out: Promises, ctx: Context
    ) -> Array:
        def outputs(index: Array, operands: Sequence[Array]) -> list[Array]:
            def branch(plan: BodyPlan) -> Callable[..., list[Array]]:
                return lambda *xs: [
                    jnp.asarray(y) for y in ctx.forward_body(plan, xs)[0]
                ]

            return lax.switch(index, [branch(plan) for plan in self.plans], *operands)

        total = jnp.zeros(())
        for xs in (operands.here, operands.there):
            pairs = zip(outputs(index, xs), outputs(other, xs), strict=True)
            for promise, (y, y0) in zip(r_out, pairs, strict=True):
                if promise is not None:
                    total = total + jnp.sum(promise.resolve(difference(y, y0))) / 2
        return total

    def _of_branch(
        self,
        index: Array,
        operands: PyTree,
        equation: Equation,
        r_out: Promises,
        ctx: Context,
        extra: _Extra,
    ) -> _Found:
        n_operands = len(equation.inputs) - 1
        iterations = [
            _Iteration(body, plan, equation, ctx, extra)
            for body, plan in zip(self.bodies, self.plans, strict=True)
        ]

        def branch(iteration: _Iteration) -> Callable[..., PyTree]:
            def again(operands: Sequence[Array]) -> Residuals:
                return ctx.forward_body(iteration.plan, operands)[1]

            def run(operands: PyTree, r_out: Promises) -> PyTree:
                return iteration(at_both(again, operands), r_out, {})

            return run

        branches = [branch(iteration) for iteration in iterations]
        shapes = [jax.eval_shape(b, operands, r_out) for b in branches]
        promises: Promises = [None] * n_operands
        causes: Causes = {}
        for r_in, amounts, *_ in shapes:
            promises = [_filled(p, q) for p, q in zip(promises, r_in, strict=True)]
            causes |= amounts
        causes = _zeros(causes)
        nothing = [_zeros(captured) for *_, captured in shapes]

        def alike(i: int, run: Callable[..., PyTree]) -> Callable[..., PyTree]:
            def uniform(operands: Sequence[Array], r_out: Promises) -> PyTree:
                r_in, amounts, multipliers, here = run(operands, r_out)
                amounts = _causes_like(amounts, causes)
                captured = [*nothing[:i], here, *nothing[i + 1 :]]
                return _all_like(r_in, promises), amounts, multipliers, captured

            return uniform

        r_in, amounts, found, captured = lax.switch(
            index, [alike(i, b) for i, b in enumerate(branches)], operands, r_out
        )
        multipliers: dict[Value, Array] = {}
        for (_, outer), amount in zip(iterations[0].wanted, found, strict=True):
            _added(multipliers, outer, amount)
        by_branch = {i: of_branch for i, of_branch in enumerate(captured) if of_branch}
        return _Found([None, *r_in], amounts, multipliers, by_branch)


_CHECKPOINTS = 64


@dataclass(frozen=True, eq=False, repr=False)
class While(_Bodies):
    """``lax.while_loop``: run again from checkpoints, last iteration first.

    Its trip count n is known only when it has run, so that the states before every
    iteration cannot be kept in an array. It is run once to count, once to keep 64
    states evenly spaced, and each segment is run again from its first state: the
    memory is bounded whatever n, the time about n / 128 runs of each iteration.

    What is captured of the first ``steps`` iterations is stacked, with zeros behind the
    last; NaN everywhere if there were more.
    """

    steps: int | None = None

    def _captures(self) -> bool:
        return self.steps is not None

    def record(
        self, equation: Equation, operands: Sequence[Array], forward: Forward
    ) -> tuple[list[Array], Array]:
        """Run the loop; its outputs, and how often it ran."""
        loop = _Loop(equation, operands)

        def goes_on(state: PyTree) -> Array:
            return jnp.any(loop.goes_on(state[1]))

        def step(state: PyTree) -> PyTree:
            return state[0] + 1, loop.advance(state[1])

        count, outs = lax.while_loop(goes_on, step, (jnp.int32(0), loop.start))
        return outs, count

    def _reverse(
        self, equation: Equation, r_out: Promises, ctx: Context, extra: _Extra
    ) -> _Found:
        return _WhileInReverse(self, equation, r_out, ctx, extra).found()


class _Checkpoints:
    """States of a loop, evenly spaced, from which those between are made again."""

    def __init__(self, advance: Callable[[PyTree], PyTree], start: PyTree, n: Array):
        self.advance = advance
        self.spacing = jnp.maximum(1, -(-n // _CHECKPOINTS))
        states = jax.tree.map(
            lambda v: jnp.zeros((_CHECKPOINTS, *v.shape), v.dtype), start
        )
        self.states, _ = lax.fori_loop(0, n, self._keep, (states, start))

    def _keep(self, i: Array, kept: PyTree) -> PyTree:
        states, state = kept

        def written(row: Array, v: Array) -> Array:
            v = jnp.where(i % self.spacing == 0, v, row[i // self.spacing])
            return lax.dynamic_update_index_in_dim(row, v, i // self.spacing, 0)

        return jax.tree.map(written, states, state), self.advance(state)

    def before(self, i: Array) -> PyTree:
        """The state before iteration i."""
        start = jax.tree.map(lambda s: s[i // self.spacing], self.states)
        return lax.fori_loop(
            0, i % self.spacing, lambda _, state: self.advance(state), start
        )


class _WhileInReverse:
    """The reverse pass of one ``while_loop``."""

    def __init__(
        self,
        rule: While,
        equation: Equation,
        r_out: Promises,
        ctx: Context,
        extra: _Extra,
    ):
        self.equation, self.r_out = equation, r_out
        self.ctx, self.extra = ctx, extra
        self.n_constants = rule.bodies[-1].n_constants
        self.count = ctx.recorded(equation)

        def loop_of(ctx: Context) -> _Loop:
            return _Loop(equation, [ctx.original(a) for a in equation.inputs])

        self.loops = both_of(ctx, loop_of)
        self.start = at_both(lambda loop: loop.start, self.loops)
        self.iterations = [
            _Iteration(body, plan, equation, ctx, extra)
            for body, plan in zip(rule.bodies, rule.plans, strict=True)
        ]
        self.rows = _Rows(rule.steps or 0)
        self.masks = _by_iteration(rule.plans, ctx)

    def found(self) -> _Found:
        checkpoints = _Checkpoints(self._advance, self.start, self.count)
        start = self._start()
        _, totals, _ = start
        runs = [partial(self._alike, it, totals) for it in self.iterations]

        def step(k: Array, state: PyTree) -> PyTree:
            carried, totals, rows = state
            i = self.count - 1 - k
            part = jnp.minimum(i, len(runs) - 1)
            before = checkpoints.before(i)
            r_in, amounts, captured = lax.switch(part, runs, carried, before, i)
            return r_in, _plus(totals, amounts), self.rows.written(rows, captured, i)

        carried, totals, rows = lax.fori_loop(0, self.count, step, start)
        constants, causes, of_wanted = totals
        multipliers: dict[Value, Array] = {}
        for (_, outer), amount in zip(
            self.iterations[0].wanted, of_wanted, strict=True
        ):
            _added(multipliers, outer, amount)
        self.iterations[0].add_initial(multipliers, carried)
        captures = self.extra.captures
        captured = self.rows.finished(rows, self.count) if captures else {}
        of_condition = [None] * self.equation.params["cond_nconsts"]
        promises = [*of_condition, *constants, *carried]
        by_body = {1: captured} if captured else {}
        return _Found(promises, causes, multipliers, by_body)

    def _advance(self, state: PyTree) -> PyTree:
        return at_both(lambda loop, state: loop.advance(state), self.loops, state)

    def _one(
        self, iteration: _Iteration, carried: Promises, state: PyTree, i: Array
    ) -> tuple[Promises, PyTree, Captured]:
        """Iteration i: promises of its carries; amounts to add up; what is captured.

        To add up are promises of constants, causes, and multipliers of parameters.
        """

        def again(loop: _Loop, state: Sequence[Array]) -> Residuals:
            inputs = [*loop.constants, *state]
            return self.ctx.forward_body(iteration.plan, inputs)[1]

        residuals = at_both(again, self.loops, state)
        at_x = state.here if isinstance(state, Both) else state
        loop = self.loops.here if isinstance(self.loops, Both) else self.loops
        running, ended = loop.divided(carried, at_x)
        masks = self.rows.at(self.masks, i)
        r_in, causes, multipliers, captured = iteration(residuals, running, masks)
        constants, carries = r_in[: self.n_constants], r_in[self.n_constants :]
        carries = [_sum(a, b) for a, b in zip(carries, ended, strict=True)]
        return carries, (constants, causes, multipliers), captured

    def _alike(
        self,
        iteration: _Iteration,
        zeros: PyTree,
        carried: Promises,
        state: PyTree,
        i: Array,
    ) -> tuple[Promises, PyTree, Captured]:
        """As ``_one``, with the same parts and causes whatever the iteration."""
        r_in, amounts, captured = self._one(iteration, carried, state, i)
        constants, causes, multipliers = amounts
        amounts = (
            _all_like(constants, zeros[0]),
            _causes_like(causes, zeros[1]),
            _dtypes_like(multipliers, zeros[2]),
        )
        return _all_like(r_in, carried), amounts, captured

    def _start(self) -> tuple[Promises, PyTree, Captured]:
        """Carried promises with all their parts, sums of zero, and empty rows."""
        carried, first = self.r_out, jnp.int32(0)
        runs = [partial(self._one, iteration) for iteration in self.iterations]
        for run in runs:
            carried = _settled(lambda s, f=run: f(s, self.start, first)[0], carried)
        shapes = [jax.eval_shape(run, carried, self.start, first) for run in runs]
        constants: Promises = [None] * self.n_constants
        causes: Causes = {}
        for _, (of_constants, of_causes, _), _ in shapes:
            pairs = zip(constants, of_constants, strict=True)
            constants = [_filled(a, b) for a, b in pairs]
            causes |= _zeros(of_causes)
        _, (*_, multipliers), captured = shapes[-1]
        totals = (constants, causes, _zeros(multipliers))
        return carried, totals, self.rows.empty(captured)


@dataclass(frozen=True)
class _Rows:
    """What is stacked of a loop of unknown length: a fixed number of iterations."""

    count: int

    def empty(self, of_one: Captured) -> Captured:
        return jax.tree.map(
            lambda s: jnp.zeros((self.count, *s.shape), s.dtype), of_one
        )

    def written(self, rows: Captured, of_one: Captured, i: Array) -> Captured:
        if not self.count:
            return rows
        i = jnp.minimum(i, self.count - 1)
        return jax.tree.map(
            lambda row, a: lax.dynamic_update_index_in_dim(row, a, i, 0), rows, of_one
        )

    def at(self, masks: Masks, i: Array) -> Masks:
        """The masks of an iteration; NaN where there are none left."""

        def row(mask: Array) -> Array:
            if mask.shape[0] == 1:
                return mask[0]
            number = lax.dynamic_index_in_dim(mask, i, 0, False)
            floating = jnp.result_type(number, jnp.float32)
            return jnp.where(i < mask.shape[0], number.astype(floating), jnp.nan)

        return {name: row(mask) for name, mask in masks.items()}

    def finished(self, rows: Captured, ran: Array) -> Captured:
        """All rows, or NaN if there would have been more; and how often it ran.

        A compiled program cannot raise: NaN is seen, a row that is left out is not.
        """

        def filled(row: Array) -> Array:
            if not jnp.issubdtype(row.dtype, jnp.floating):
                return row
            return jnp.where(ran > self.count, jnp.nan, row)

        counts = [*rows.get(COUNTS, ()), jnp.int32(ran)]
        return {**jax.tree.map(filled, rows), COUNTS: counts}


class _Loop:
    """A ``while_loop``'s condition and body, at its constants.

    ``vmap`` may give each example a trip count of its own: the condition then has an
    entry for each, and those that have ended keep their state.
    """

    def __init__(self, equation: Equation, operands: Sequence[Array]):
        n_condition = equation.params["cond_nconsts"]
        self.for_condition, rest = operands[:n_condition], operands[n_condition:]
        n_constants = equation.params["body_nconsts"]
        self.constants, self.start = rest[:n_constants], list(rest[n_constants:])
        self._condition = _function(equation.params["cond_jaxpr"])
        self._body = _function(equation.params["body_jaxpr"])
        self._is_one = equation.params["cond_jaxpr"].out_avals[0].shape == ()

    def goes_on(self, state: Sequence[Array]) -> Array:
        return self._condition(*self.for_condition, *state)[0]

    def advance(self, state: Sequence[Array]) -> list[Array]:
        new = self._body(*self.constants, *state)
        if self._is_one:
            return new
        runs = self.goes_on(state)
        return [
            jnp.where(_over_leading_axes(runs, a), a, b)
            for a, b in zip(new, state, strict=True)
        ]

    def divided(
        self, promises: Promises, state: Sequence[Array]
    ) -> tuple[Promises, Promises]:
        """The promises of examples that run on, and of those that wait."""
        if self._is_one:
            return promises, [None] * len(promises)
        runs = self.goes_on(state)

        def where(condition: Array) -> Promises:
            return jax.tree.map(
                lambda part: jnp.where(_over_leading_axes(condition, part), part, 0),
                promises,
            )

        return where(runs), where(~runs)


def _over_leading_axes(flags: Array, array: Array) -> Array:
    return lax.broadcast_in_dim(flags, array.shape, range(flags.ndim))


def _function(jaxpr: Jaxpr) -> Callable[..., list[Array]]:
    return lambda *args: list(jaxpr_as_fun(jaxpr)(*args))


CONTROL_FLOW = {"scan": Scan, "cond": Cond, "while": While}

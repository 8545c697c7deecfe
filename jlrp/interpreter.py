"""The two loops: forward records activations, reverse hands relevance back.

Both are ordinary JAX code: under jit they become one XLA program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as p

from jlrp.errors import RuleError
from jlrp.ir import jax_compat
from jlrp.ir.primitives import traits
from jlrp.ir.program import (
    Atom,
    Equation,
    Literal,
    Program,
    Value,
    computing,
    evaluate,
    read,
)
from jlrp.ops.activation import Region
from jlrp.ops.base import Operation
from jlrp.ops.canonized import CanonizedKernel, canonized_map, linear_part
from jlrp.ops.captures import Captured, Entry
from jlrp.ops.decompositions import bound, decomposition_of, with_derivative
from jlrp.ops.transposes import direct_product_vjp, direct_transpose, direct_vjp
from jlrp.plan.planning import Plan, Step, is_float
from jlrp.promise import Promise, difference, number
from jlrp.rules.base import Both, Propagation, Recorder, Residuals
from jlrp.tactics import depend_on
from jlrp.typing import PyTree

Array = jax.Array
_NONE: Residuals = {}
Observer = Callable[[Step, Sequence[Promise | None], Propagation, "EvalContext"], None]


def forward(plan: Plan, arguments: Sequence[Array]) -> tuple[list[Array], Residuals]:
    """Run the program; its outputs, and the activations that the plan keeps.

    What the rules of loops record is kept under their equation.
    """
    program = plan.program
    env: Residuals = dict(program.constants)
    env.update(zip(program.inputs, arguments, strict=True))
    recorded = {e: r for e, r in plan.recorders.items() if e not in plan.repeated}
    _run(program.own or program.equations, env, recorded)
    outputs = [read(env, atom) for atom in program.outputs]
    kept = {key: env[key] for key in (*plan.kept, *recorded)}
    kept |= {value: jax_compat.OnHost(env[value]) for value in plan.offloaded}
    return outputs, kept


def _on_device(number: Array | jax_compat.OnHost) -> Array:
    return number.back() if isinstance(number, jax_compat.OnHost) else number


def _run(
    equations: Iterable[Equation],
    env: Residuals,
    recorders: Mapping[Equation, Recorder],
) -> None:
    for equation in equations:
        rule = recorders.get(equation)
        if rule is None and (function := with_derivative(equation)) is not None:
            outs = function(*(read(env, a) for a in equation.inputs))
            env.update(zip(equation.outputs, equation.placed(outs), strict=True))
        elif rule is None:
            evaluate([equation], env)
        else:
            operands = [read(env, a) for a in equation.inputs]
            outs, env[equation] = rule.record(equation, operands, forward)
            env.update(zip(equation.outputs, equation.placed(outs), strict=True))


@dataclass(frozen=True)
class Delivered:
    """The promises that the reverse pass delivered.

    Attributes:
      sources: one for each source of the program.
      captured: those of the captured values, when all their consumers had added.
      parameters: multipliers of the parameters' values that were asked for.
      inside: by loop or branch and by its body, what was captured in it.
    """

    sources: list[Promise | None]
    captured: dict[Value, Promise]
    parameters: dict[Value, Array]
    inside: dict[Equation, Mapping[int, Captured]]


def reverse(
    plan: Plan,
    numbers: EvalContext,
    seeds: Mapping[Value, Promise],
    observe: Observer | None = None,
    explained: Mapping[Value, Array] = _NONE,
) -> Delivered:
    """Hand promises from the explained outputs back to the sources.

    ``explained`` are the multipliers of parameters among the explained outputs.
    """
    pending = {value: [promise] for value, promise in seeds.items()}
    watched = plan.watched
    captured: dict[Value, Promise] = {}
    inside: dict[Equation, Mapping[int, Captured]] = {}
    parameters: dict[Value, Array] = dict(explained)
    for step in plan.steps:
        op = step.operation
        r_out = [_added(pending.pop(v, ())) for v in op.outputs]
        if all(promise is None for promise in r_out):
            continue
        if numbers.arrived is None:
            numbers.wait_for(r_out)
        propagation = step.rule.propagate(op, r_out, numbers)
        if observe is not None:
            observe(step, r_out, propagation, numbers)
        if propagation.captured:
            inside[op.equations[0]] = propagation.captured
        if op.affine is not None:
            numbers.wait_for(propagation.promises)
        for value, promise in zip(op.inputs, propagation.promises, strict=True):
            if promise is not None:
                pending.setdefault(value, []).append(promise)
        for value, promise in zip(op.outputs, r_out, strict=True):
            if promise is not None and value in watched and value not in op.inputs:
                captured[value] = promise
        wanted = plan.wanted(op)
        multipliers = _of_constants(op, r_out, propagation, numbers, wanted)
        for value, m in zip(wanted, multipliers, strict=True):
            parameters[value] = m + parameters[value] if value in parameters else m
    sources = [_added(pending.get(value, ())) for value in plan.program.sources]
    for value, promise in zip(plan.program.sources, sources, strict=True):
        if promise is not None and value in watched:
            captured[value] = promise
    return Delivered(sources, captured, parameters, inside)


def captured(plan: Plan, delivered: Delivered, numbers: EvalContext) -> Captured:
    """The relevance that was asked for by name, zeros where there is none."""

    def one(name: str, entry: Entry) -> PyTree:
        if entry.like is None:
            return ()
        if entry.value is not None:
            return resolved(entry.value, delivered.captured.get(entry.value), numbers)
        of_loop = {} if entry.loop is None else delivered.inside.get(entry.loop, {})
        rows = jnp.zeros(entry.like.shape, entry.like.dtype)
        if entry.body in of_loop:
            rows = of_loop[entry.body][name][entry.index]
        moves = entry.carry is not None and entry.loop is not None
        return moved_on(rows, entry) if moves else rows

    def moved_on(rows: Array, entry: Entry) -> Array:
        """Of a carry: what each iteration made as what the next got of it."""
        start = jnp.zeros(rows.shape[1:], rows.dtype)
        if entry.start is not None:
            promise = delivered.captured.get(entry.start)
            start = resolved(entry.start, promise, numbers).astype(rows.dtype)
        if not len(rows):
            return rows
        if entry.backwards:
            return jnp.concatenate([rows[1:], start[None]])
        return jnp.concatenate([start[None], rows[:-1]])

    return {name: [one(name, e) for e in es] for name, es in plan.captured.items()}


def resolved(value: Value, promise: Promise | None, numbers: EvalContext) -> PyTree:
    """The relevance of a value; random keys have none, not even zeros."""
    if jax_compat.is_key(value.dtype):
        return ()
    if promise is None:
        dtype = numbers.shape_of(value).dtype
        dtype = dtype if is_float(value) else jnp.float32
        return jnp.zeros(value.shape, dtype).real
    return promise.resolve(numbers.difference(value))


def _added(promises: Sequence[Promise]) -> Promise | None:
    """The promises of one value, summed from the last to the first.

    Along a residual stream the first is all that came from behind. Were the others
    added to it one by one, XLA would write the whole stream into each fusion.
    """
    if not promises:
        return None
    return reduce(lambda total, one: one + total, reversed(promises))


def to_inputs(
    plan: Plan,
    delivered: Delivered,
    inputs: Sequence[Value],
    given: Mapping[Value, Array],
) -> Sequence[Array]:
    """Multipliers of inputs, by the chain rule from those of what is made of them."""
    wanted, constants = delivered.parameters, plan.program.constants
    equations, starts = computing(plan.program, wanted, plan.parameters.__contains__)
    read = [v for v in inputs if v in starts]

    def values(*numbers: Array) -> list[Array]:
        env = {**constants, **given, **dict(zip(read, numbers, strict=True))}
        evaluate(equations, env, lambda e: jax_compat.widened(e.params))
        return [env[v] for v in wanted]

    _, pull = jax.vjp(values, *(jax_compat.at_least_float32(given[v]) for v in read))
    found = dict(zip(read, pull(list(wanted.values())), strict=True))
    zeros = {v: jnp.zeros(v.shape, v.dtype) for v in inputs if v not in found}
    return [
        found[v] if v in found else jax_compat.at_least_float32(zeros[v])
        for v in inputs
    ]


def _of_constants(
    op: Operation,
    r_out: Sequence[Promise | None],
    propagation: Propagation,
    numbers: EvalContext,
    wanted: Sequence[Value],
) -> Sequence[Array]:
    """The multipliers of some constants of an operation."""
    if not wanted:
        return []
    if propagation.constants is not None:
        return propagation.constants(wanted)
    shares = propagation.shares
    if shares is None:
        shares = [
            promise and promise.per_unit(numbers.difference(out))
            for out, promise in zip(op.outputs, r_out, strict=True)
        ]
    multipliers = numbers.vjp_constants(op, shares, wanted)
    if op.region is not None and op.region.inverted:  # R / y is that of 1/y
        multipliers = [-m for m in multipliers]
    return multipliers


def _finite(scores: Array) -> Array:
    """-inf as the lowest number, inf as the highest."""
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        return scores
    largest = number(scores, float(jnp.finfo(scores.dtype).max))
    return lax.clamp(-largest, scores, largest)


class Recomputed:
    """Activations that the forward pass did not keep, made again when asked for.

    ``guarded``: behind a barrier, or the compiler would take them from the forward
    pass, and keep them after all.
    """

    def __init__(self, plan: Plan, residuals: Residuals, guarded: bool = True):
        self._plan, self._kept, self._guarded = plan, residuals, guarded
        self._made: Residuals = {}
        self.arrived: Array | None = None

    def __getitem__(self, value: Value) -> Array:
        if value not in self._plan.recomputed:
            made = value.producer
            raise RuleError(
                "A rule reads a value that its needs(op) does not name, "
                + (f"an output of {made.primitive.name}" if made else "an input")
                + (f" at {made.where()}." if made else ".")
            )
        if value not in self._made:
            self._make([value])
        return self._made[value]

    def recorded(self, equation: Equation) -> PyTree:
        if equation not in self._made:
            # Its outputs may be kept, what it records is not.
            self._make([a for a in equation.inputs if isinstance(a, Value)])
            _run([equation], self._made, self._plan.recorders)
        return self._made[equation]

    def _make(self, values: Sequence[Value]) -> None:
        def is_missing(v: Value) -> bool:
            return v not in self._kept and v not in self._made

        equations, starts = computing(self._plan.program, values, is_missing)
        starts = [v for v in starts if v not in self._made]
        self._made.update(self._plan.program.constants)
        held = self._held_back(starts, _laid_out(equations))
        self._made.update(zip(starts, held, strict=True))
        _run(equations, self._made, self._plan.recorders)

    def _held_back(
        self, starts: Sequence[Value], laid_out: frozenset[Atom]
    ) -> list[Array]:
        """What a recomputation starts from, with a dependency on relevance.

        The dependency may cost a copy. So parameters have none, but for those that are
        ``laid_out`` anew, which is a copy by itself.
        """
        numbers = [_on_device(self._kept[v]) for v in starts]
        floats = [i for i, v in enumerate(starts) if is_float(v)]
        if self._guarded and floats and self.arrived is not None:
            held = [*(numbers[i] for i in floats), self.arrived]
            for i, number in zip(floats, lax.optimization_barrier(held), strict=False):
                is_parameter = self._plan.program.is_parameter(starts[i])
                if starts[i] in laid_out or not is_parameter:
                    number = depend_on(number, after=self.arrived)
                numbers[i] = number
        return numbers


def _laid_out(equations: Iterable[Equation]) -> frozenset[Atom]:
    """The kernels of convolutions, which XLA copies into an order of its own."""
    convolutions = (e for e in equations if e.primitive is p.conv_general_dilated_p)
    return frozenset(e.inputs[1] for e in convolutions)


def _stackable(plan: Plan, found: Captured) -> Captured:
    """What was captured, in the dtypes that all iterations share."""

    def cast(array: Array, entry: Entry) -> PyTree:
        return array if entry.like is None else jnp.asarray(array, entry.like.dtype)

    return {
        name: [cast(a, e) for a, e in zip(found[name], several, strict=True)]
        for name, several in plan.captured.items()
    }


class EvalContext:
    """The context of rules: kept numbers, and operations as functions of them.

    Low-precision programs are read and re-run in float32 here, so that relevance
    accumulates in float32.
    """

    def __init__(
        self,
        plan: Plan,
        residuals: Residuals,
        masks: Mapping[str, Array] | None = None,
        recomputed: Recomputed | None = None,
        reference: EvalContext | None = None,
    ):
        self._plan, self._residuals, self._masks = plan, residuals, masks or {}
        self._recomputed = recomputed or Recomputed(plan, residuals)
        self.reference = reference

    @property
    def kept(self) -> Residuals:
        """What the forward pass kept."""
        return self._residuals

    @property
    def arrived(self) -> Array | None:
        """What is made of parameters or recomputed depends on this relevance."""
        return self._recomputed.arrived

    def wait_for(self, promises: Sequence[Promise | None]) -> None:
        self._recomputed.arrived = next(iter(jax.tree.leaves(promises)), self.arrived)
        if self.reference is not None:
            self.reference.wait_for(promises)

    def replaced(self, numbers: Mapping[Value, Array]) -> EvalContext:
        residuals = {**self._residuals, **numbers}
        return EvalContext(
            self._plan, residuals, self._masks, self._recomputed, self.reference
        )

    def difference(self, value: Value) -> Array:
        number = self.read(value)
        if self.reference is None:
            return number
        return difference(number, self.reference.read(value))

    def varies(self, atom: Atom) -> bool:
        return not self._plan.program.is_parameter(atom)

    def with_reference(self, reference: EvalContext) -> EvalContext:
        return EvalContext(
            self._plan, self._residuals, self._masks, self._recomputed, reference
        )

    def mask(self, name: str) -> Array:
        return self._masks[name]

    def recorded(self, equation: Equation) -> PyTree:
        if equation in self._residuals:
            return self._residuals[equation]
        return self._recomputed.recorded(equation)

    def original(self, atom: Atom) -> Array:
        if isinstance(atom, Literal) or atom in self._residuals:
            return _on_device(read(self._residuals, atom))
        return self._recomputed[atom]

    def forward_body(
        self, plan: Plan, inputs: Sequence[Array]
    ) -> tuple[list[Array], Residuals]:
        return forward(plan, inputs)

    def reverse_body(
        self,
        plan: Plan,
        residuals: Residuals | Both,
        seeds: Mapping[Value, Promise],
        observe: Observer | None,
        wanted: Sequence[Value],
        explained: Mapping[Value, Array],
        masks: Mapping[str, Array],
        captures: bool,
    ) -> tuple[list[Promise | None], Sequence[Array], Captured]:
        masks = {**self._masks, **masks}

        def at(residuals: Residuals, reference: EvalContext | None) -> EvalContext:
            residuals = {**plan.program.constants, **residuals}
            recomputed = Recomputed(plan, residuals, guarded=False)
            return EvalContext(plan, residuals, masks, recomputed, reference)

        here, there = (
            (residuals.here, residuals.there)
            if isinstance(residuals, Both)
            else (residuals, None)
        )
        inside = at(here, None if there is None else at(there, None))
        residuals = inside.kept
        plan = plan if wanted else replace(plan, parameters=frozenset())
        delivered = reverse(plan, inside, seeds, observe, explained)
        found = _stackable(plan, captured(plan, delivered, inside)) if captures else {}
        if not wanted:
            return delivered.sources, [], found
        return delivered.sources, to_inputs(plan, delivered, wanted, residuals), found

    def made(
        self, program: Program, wanted: Sequence[Value], given: Mapping[Value, Array]
    ) -> dict[Value, Array]:
        env: Residuals = {**program.constants, **given}
        equations, _ = computing(program, wanted, lambda _: True)
        evaluate(equations, env)
        return {v: env[v] for v in wanted}

    def read(self, atom: Atom) -> Array:
        number = self.original(atom)
        if str(getattr(number, "dtype", "")) in jax_compat.LOW_PRECISION:
            number = jnp.asarray(number, jnp.float32)
        return number

    def run(
        self,
        equations: Sequence[Equation],
        constants: Sequence[Value],
        inputs: Mapping[Value, Array],
    ) -> dict[Value, Array]:
        env = {value: self.read(value) for value in constants}
        env.update(inputs)
        for equation in equations:
            args = [
                env[a] if isinstance(a, Value) else self.read(a)
                for a in equation.inputs
            ]
            outs = (decomposition_of(equation) or bound(equation))(*args)
            env.update(zip(equation.outputs, outs, strict=True))
        return env

    def apply(self, op: Operation, x: Sequence[Array]) -> list[Array]:
        inputs = dict(zip(op.inputs, x, strict=True))
        if op.kind == "softmax":  # the shift of a row in which all is masked
            inputs |= {v: _finite(self.read(v)) for v in op.constants}
        constants = [v for v in op.constants if v not in inputs]
        env = self.run(op.equations, constants, inputs)
        return [env[v] for v in op.outputs]

    def offset(self, op: Operation) -> Array:
        if op.affine is None:
            zeros = [jnp.zeros_like(self.shape_of(v)) for v in op.inputs]
            (out,) = self.apply(op, zeros)
            return out
        # The core gives zero at zero, but XLA would run a convolution of zeros.
        (end,), (out,) = op.affine.core.outputs, op.outputs
        zero = {end: lax.full(end.shape, 0, self.shape_of(end).dtype)}
        before = {op.affine.core, *op.affine.of_kernel}
        behind = [e for e in op.equations if e not in before]
        return self.run(behind, op.constants, zero)[out]

    def shape_of(self, value: Value) -> jax.ShapeDtypeStruct:
        low = str(value.dtype) in jax_compat.LOW_PRECISION
        return jax.ShapeDtypeStruct(value.shape, jnp.float32 if low else value.dtype)

    def linear(self, op: Operation, x: Sequence[Array]) -> list[Array]:
        if not op.has_offset:
            return self.apply(op, x)
        zeros = [jnp.zeros_like(v) for v in x]
        pairs = zip(self.apply(op, x), self.apply(op, zeros), strict=True)
        return [y - offset for y, offset in pairs]

    def transpose(
        self, op: Operation, cotangents: Sequence[Array | None]
    ) -> list[Array]:
        if (direct := direct_transpose(op, cotangents, self)) is not None:
            return direct
        shapes = [self.shape_of(v) for v in op.inputs]
        if op.affine is not None:
            (shape,), (cotangent,) = shapes, cotangents
            linear = partial(linear_part, op.affine, numbers=self)
            return list(jax.linear_transpose(linear, shape)(cotangent))
        if not all(traits(e).transposes for e in op.equations):
            zeros = [jnp.zeros_like(shape) for shape in shapes]
            _, pull = jax.vjp(lambda *x: self.apply(op, x), *zeros)
            return list(pull(self._filled(op, cotangents)))
        # Zeros for the other outputs are not as good as nothing: JAX transposes no
        # solver whose residual or trip count has a cotangent.
        reached = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]

        def outputs(*x: Array) -> list[Array]:
            found = self.apply(op, x)
            return [found[i] for i in reached]

        # What constants add is no concern of a transpose: jax drops it.
        pull = jax.linear_transpose(outputs, *shapes)
        return list(pull([cotangents[i] for i in reached]))

    def vjp(self, op: Operation, cotangents: Sequence[Array | None]) -> list[Array]:
        if op.nature in ("linear", "movement"):
            return self.transpose(op, cotangents)
        if (direct := direct_vjp(op, cotangents, self)) is not None:
            return direct
        _, pull = jax.vjp(lambda *x: self.apply(op, x), *self._at_inputs(op))
        return list(pull(self._filled(op, cotangents)))

    def vjp_constants(
        self, op: Operation, shares: Sequence[Array | None], wanted: Sequence[Value]
    ) -> list[Array]:
        x = [self.read(v) for v in op.inputs]

        def outputs(*constants: Array) -> list[Array]:
            numbers = self.replaced(dict(zip(wanted, constants, strict=True)))
            return numbers.apply(op, x)

        _, pull = jax.vjp(outputs, *(self.read(v) for v in wanted))
        return list(pull(self._filled(op, shares)))

    def jvp(
        self, op: Operation, tangents: Sequence[Array] | None = None
    ) -> list[Array]:
        x = self._at_inputs(op)
        tangents = x if tangents is None else tangents
        return jax.jvp(lambda *x: self.apply(op, x), tuple(x), tuple(tangents))[1]

    def _at_inputs(self, op: Operation) -> list[Array]:
        """The operation's inputs; masked scores as the lowest number, not -inf.

        The derivative of a softmax is the same there, but never NaN.
        """
        x = [self.read(v) for v in op.inputs]
        if op.kind != "softmax":
            return x
        return [_finite(v) for v in x]

    def _filled(self, op: Operation, parts: Sequence[Array | None]) -> list[Array]:
        return [
            jnp.zeros_like(self.shape_of(v)) if part is None else part
            for v, part in zip(op.outputs, parts, strict=True)
        ]

    def product_vjp(
        self, op: Operation, m: Array, operands: Sequence[Array], taking: Sequence[int]
    ) -> list[Array]:
        direct = direct_product_vjp(op, m, operands, taking)
        if direct is not None:
            return direct
        (equation,) = op.equations
        params = jax_compat.widened(equation.params)
        others = [self.read(a) for a in equation.inputs[len(operands) :]]

        def of_taking(*taken: Array) -> list[Array]:
            args = [*operands, *others]
            for i, x in zip(taking, taken, strict=True):
                args[i] = x
            return jax_compat.bind(equation.primitive, params, args)

        _, pull = jax.vjp(of_taking, *(operands[i] for i in taking))
        return list(pull([m]))

    def region(self, region: Region, x: Array) -> dict[Value, Array]:
        return self.run(region.equations, region.constants, {region.start: x})

    def kernel_map(self, op: Operation) -> CanonizedKernel:
        return canonized_map(op, self)

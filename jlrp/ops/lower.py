"""Operations: groups of equations that one rule explains.

They are made on demand, from the explained outputs backwards: each active value that
receives relevance is the output of exactly one operation, found by the first fact that
recognises it. A value inside a group that is also read elsewhere simply becomes the
output of an operation of its own.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from jax.extend.core import primitives as p

from jlrp.analysis.activity import Levels, active_parts
from jlrp.analysis.dataflow import Passage, dependent, reached
from jlrp.analysis.intervals import is_nonnegative, scalar_of
from jlrp.analysis.stopped import (
    Choice,
    Stop,
    choices_of,
    endings,
    stopped_operands,
)
from jlrp.analysis.terms import moves_all
from jlrp.ir.families import family_at
from jlrp.ir.jax_compat import is_inexact
from jlrp.ir.primitives import traits
from jlrp.ir.program import Atom, Equation, Program, Value, between
from jlrp.ops.activation import Regions
from jlrp.ops.affine import (
    Stage,
    affine_ending_at,
    batch_norm_start,
    core_of,
    is_core,
    scale_chain,
    start_of,
)
from jlrp.ops.average import Handed
from jlrp.ops.base import Operation, View
from jlrp.ops.embedding import Embedding
from jlrp.ops.factors import Reading, factors_of, norm_of
from jlrp.ops.kinds.activation import ActivationOp
from jlrp.ops.kinds.affine import AffineOp
from jlrp.ops.kinds.embedding import EmbeddingOp
from jlrp.ops.kinds.generic import (
    CustomOp,
    FunctionOp,
    HomogeneousOp,
    RoundingOp,
    SelectionOp,
    UnsupportedOp,
)
from jlrp.ops.kinds.linear import LinearOp, MovementOp, ReductionOp, SumOp
from jlrp.ops.kinds.loop import LoopOp
from jlrp.ops.kinds.product import ProductOp
from jlrp.ops.kinds.softmax import SoftmaxOp
from jlrp.ops.mean import mean_kind, mean_of, weight_of
from jlrp.ops.other_words import read_other_words
from jlrp.ops.position import (
    affine_before,
    marked_attention,
    marked_by_position,
    with_depths,
)
from jlrp.ops.product import products
from jlrp.ops.softmax import may_be_minus_infinity
from jlrp.ops.statistic import statistic_of, unscaled


class _Builder:
    def __init__(
        self,
        program: Program,
        opaque: set[Any],
        view: View,
        levels: Levels,
        embeddings: Mapping[Value, Embedding],
        outer: Regions | None = None,
        handed: Iterable[Handed] = (),
    ):
        self.program = program
        self.levels = levels
        self.embeddings = embeddings
        program.boundaries.update(embeddings)  # a dot with a one-hot code is no layer
        self.opaque = opaque
        self.view = view
        if not view.as_differentiated:
            read_other_words(program, opaque)
        self.regions = Regions(program, opaque, outer, not view.as_differentiated)
        self.products, self.averages = products(
            program, self.regions, view.find_signals, handed
        )

    @cached_property
    def unmapped(self) -> set[Value]:
        """The values that a source reaches through no affine operation."""

        def passes(equation: Equation, _: Value) -> bool:
            return not is_core(self.program, equation)

        return reached(Passage(passes), self.program, self.program.sources)

    @cached_property
    def varying(self) -> set[Value]:
        """The values that are not the same for all arguments, as counts are."""
        program = self.program
        return dependent(program, (*program.inputs, *program.constants))

    def lower(self, value: Value) -> Operation:
        equation = value.producer
        assert equation is not None
        if equation.primitive in self.opaque:
            return self.primitive_operation(equation)
        if equation.bodies:
            return self.with_bodies(equation)
        for recognise in (
            self.entry,
            self.softmax,
            self.activation,
            self.mean,
            self.affine,
            self.scale,
            self.addition,
            self.multiplication,
        ):
            if (operation := recognise(value)) is not None:
                return operation
        return self.primitive_operation(equation)

    def with_bodies(self, equation: Equation) -> Operation:
        """A loop or branch; what its bodies hold are operations in turn."""
        found = []
        peel = self.view.peel_first and not self.unmapped.isdisjoint(equation.inputs)
        for parts in active_parts(self.program, equation, self.levels, peel):
            for body in parts:
                inner = _Builder(
                    body.program,
                    self.opaque,
                    self.view,
                    self.levels,
                    {},
                    self.regions,
                    self.averages.handed.get(equation, ()),
                )
                found.append((body, inner.operations()))
        inputs = tuple(v for v in _values(equation.inputs) if v in self.program.active)
        outputs = tuple(v for v in equation.outputs if v in self.program.active)
        values = inputs, outputs, (equation,), ()
        if traits(equation).kind != "control flow":
            return UnsupportedOp("unsupported", *values)
        return LoopOp(equation.primitive.name, *values, bodies=found)

    def entry(self, end: Value) -> Operation | None:
        """Where integer inputs turn into floats."""
        found = self.embeddings.get(end)
        return found and EmbeddingOp(
            "embedding",
            found.sources,
            (end,),
            found.equations,
            found.constants,
            embedding=found,
        )

    def softmax(self, end: Value) -> Operation | None:
        found = self.regions.softmaxes.ending_at(end)
        if found is None:
            return None
        masked = may_be_minus_infinity(self.program, found.scores)
        facts = frozenset({"masked"} if masked else ())
        parts = self.group([found.scores], end)
        return SoftmaxOp("softmax", *parts, facts, softmax=found)

    def activation(self, end: Value) -> Operation | None:
        region = self.regions.ending_at(end)
        if region is None:
            return None
        return ActivationOp(
            "activation",
            (region.start,),
            (end,),
            region.equations,
            region.constants,
            region=region,
        )

    def mean(self, end: Value) -> Operation | None:
        """A sum over axes or windows, divided by its fixed count."""
        steps = scale_chain(self.regions.terms, end)
        if not steps or self._mean_steps(steps) < len(steps):
            return None
        summed = start_of(self.regions.terms, steps).producer
        assert summed is not None
        return ReductionOp(mean_kind(summed), *self.group(self.operands(summed), end))

    def _mean_steps(self, steps: list[Stage]) -> int:
        """How many of these steps turn the sum before them into a mean."""
        summed = start_of(self.regions.terms, steps)
        equation = summed.producer
        if (
            equation is None
            or equation.primitive in self.opaque
            or weight_of(self.program, equation) is None
            or not (summed is not steps[0].source or self.program.used_once(summed))
        ):
            return 0
        found = 0
        for index, step in enumerate(steps):
            if step.kind == "shift" or self._varies(step.constant):
                break
            if step.kind == "scale":
                counts = scalar_of(step.constant) is None if step.constant else False
                if counts or mean_of(self.regions.terms, step.equation.outputs[0]):
                    found = index + 1
        return found

    def _varies(self, constant: Atom | None) -> bool:
        return isinstance(constant, Value) and constant in self.varying

    def affine(self, end: Value) -> Operation | None:
        terms = self.regions.terms
        affine = affine_ending_at(terms, end, self.view.merge_batch_norm)
        if affine is None:
            return None
        if affine.stands:
            parts = self.standing(affine.equations, affine.start, end)
        else:
            parts = self.group([affine.start], end)
        facts = {"negated"} if self._is_subtracted(end) else set()
        if affine.has_shift:
            facts.add("offset")
        if is_nonnegative(affine.start):
            facts.add("nonnegative")
        return AffineOp(affine.kind, *parts, frozenset(facts), affine=affine)

    def _is_subtracted(self, end: Value) -> bool:
        """Whether a value is read as a term of a sum, and with a minus."""
        value, minus = end, False
        while self.program.used_once(value):
            (use,) = self.program.uses[value]
            if use.primitive in self.opaque:
                break
            if traits(use).addition and len(self.operands(use)) > 1:
                minus ^= use.primitive is p.sub_p and use.inputs[1] is value
            elif not moves_all(use):
                break
            (value,) = use.outputs
        return minus

    def scale(self, end: Value) -> Operation | None:
        """Scales and shifts by constants; with a square root, a batch norm."""
        steps = scale_chain(self.regions.terms, end)
        for i in reversed(range(len(steps))):  # a literal tail is the activation's
            if self.regions.ending_at(steps[i].source) is not None:
                steps = steps[i:]
                break
        if not steps:
            return None
        start = batch_norm_start(steps)
        behind_core = (
            core_of(self.regions.terms, start_of(self.regions.terms, steps)) is not None
        )
        if start is not None and behind_core and not self.view.merge_batch_norm:
            steps = steps[start:]
        elif behind_core and self.program.used_once(steps[0].source):
            steps = steps[-1:]  # scales that do not fit the kernel stay by themselves
        else:
            steps = steps[self._mean_steps(steps) :]
        kind = "batch_norm" if batch_norm_start(steps) is not None else "scale"
        shifts = any(step.kind == "shift" for step in steps)
        return LinearOp(kind, *self.group([steps[0].source], end), _offset(shifts))

    def addition(self, end: Value) -> Operation | None:
        """A sum of active values, flattened: ``(a + b) + c`` is one operation."""
        leaves: list[Value] = []
        offset = False
        stack = [end]
        while stack:
            value = stack.pop()
            equation = value.producer
            inner = value is end or self.program.used_once(value)
            if (
                inner
                and equation is not None
                and traits(equation).addition
                and equation.primitive not in self.opaque
                and (value is end or self.activation(value) is None)
                and (value is end or len(self.operands(equation)) > 1)
            ):
                stack += reversed(self.operands(equation))
                offset |= not all(self.program.is_active(a) for a in equation.inputs)
            else:
                leaves.append(value)
        if leaves == [end]:
            return None
        constants = [a for a in end.producer.inputs if a not in leaves]  # type: ignore
        if len(leaves) == 1 and any(map(self.program.is_dead, constants)):
            return LinearOp("scale", *self.group(leaves, end), _offset(True))  # a shift
        parts = self.group(list(dict.fromkeys(leaves)), end)
        return SumOp("add", *parts, _offset(offset))

    def multiplication(self, end: Value) -> Operation | None:
        equation = end.producer
        assert equation is not None
        product = self.products.get(equation)
        if product is None:
            return None
        if self.view.relative:
            return self.of_factors(equation)
        averaged = equation in self.averages.parts
        statistic = None if averaged else statistic_of(self.regions.terms, equation)
        if statistic is not None and self.view.hold_statistics:
            if statistic == 1 or equation.primitive is not p.div_p:
                return self.norm(equation, statistic)
        slots = _values(equation.inputs[i] for i in product.slots)
        reciprocal = tuple(self.regions.is_inverted(equation, i) for i in product.slots)
        product = replace(product, reciprocal=reciprocal)
        facts = set()
        if any(product.weights):
            facts.add("attention")
        elif averaged:
            facts.add("average")
        elif product.gated != product.uniform:
            facts.add("gate")
        alone = self._equation_alone(equation, self.operands(equation))
        parts = slots, *alone[1:]
        return ProductOp("product", *parts, frozenset(facts), product=product)

    def of_factors(self, equation: Equation) -> Operation:
        """A product with all its factors, a norm with what it divides by."""
        view = self.view
        reading = Reading(
            self.program,
            self.regions,
            self.averages.parts,
            view.find_signals,
            view.hold_statistics,
        )
        values, product = factors_of(reading, equation)
        is_norm = any(product.denominators) and len(values) == 2
        kind = (
            "norm" if is_norm and norm_of(reading, equation) is not None else "product"
        )
        parts = self.group(values, equation.outputs[0])
        facts = set()
        if any(product.weights):
            facts.add("attention")
        elif product.gated != product.uniform:
            facts.add("gate")
        return ProductOp(kind, *parts, frozenset(facts), product=product)

    def norm(self, equation: Equation, statistic: int) -> Operation:
        """A signal over its statistic, which is a constant, scaled by parameters."""
        signal, held = equation.inputs[1 - statistic], equation.inputs[statistic]
        assert isinstance(signal, Value) and isinstance(held, Value)
        base, scales = unscaled(self.program, held)
        equations = (*scales, equation)
        inside = {v for e in equations for v in e.outputs} | {signal, base}
        constants = dict.fromkeys(
            a
            for e in equations
            for a in e.inputs
            if isinstance(a, Value) and a not in inside
        )
        parts = (signal,), equation.outputs, equations, (base, *constants)
        return LinearOp("norm", *parts)

    def primitive_operation(self, equation: Equation) -> Operation:
        """An equation by itself, as the table of primitives has it."""
        family = family_at(equation, self.program.active)
        parts = self._equation_alone(equation, self.operands(equation))
        if equation.primitive in self.opaque:  # it has a registered rule
            return CustomOp("custom", *parts)
        if family is None:
            return UnsupportedOp("unsupported", *parts)
        kind = family.kind
        if kind in ("dense", "conv") and not is_core(self.program, equation):
            kind = self._fixed_kind(equation)
        made = _BY_NATURE[family.nature]
        made = _LINEAR.get(kind, made) if made is LinearOp else made
        floats = [a for a in equation.inputs if is_inexact(a)]
        offset = issubclass(made, LinearOp) and len(parts[0]) < len(floats)
        return made(kind, *parts, _offset(offset and traits(equation).adds))

    def _equation_alone(self, equation: Equation, inputs: tuple[Value, ...]) -> Parts:
        """The parts of an operation of one equation."""
        constants = dict.fromkeys(
            a for a in _values(equation.inputs) if a not in inputs
        )
        outputs = tuple(v for v in equation.outputs if v in self.program.active)
        return inputs, outputs, (equation,), tuple(constants)

    def _fixed_kind(self, equation: Equation) -> str:
        """The kind of a linear map that is the same whatever the parameters."""
        (*_, out) = equation.outputs
        if mean_of(self.regions.terms, out):
            return mean_kind(equation)
        return "linear" if weight_of(self.program, equation) is None else "sum"

    def operands(self, equation: Equation) -> tuple[Value, ...]:
        return self.program.active_inputs(equation)

    def operations(self) -> list[Operation]:
        """Those that relevance passes, from the outputs back to the sources."""
        heap: list[tuple[int, int, Value]] = []
        queued: set[Value] = set()

        def demand(value: Value) -> None:
            if value not in queued and value.position >= 0:
                queued.add(value)
                heapq.heappush(heap, (-value.position, len(queued), value))

        for value in self.program.explained:
            if value in self.program.active:
                demand(value)
        found: list[Operation] = []
        done: set[Value] = set()
        while heap:
            value = heapq.heappop(heap)[2]
            if value in done or value in self.program.sources:
                continue
            operation = self._with_stops(self.lower(value))
            done.update(operation.outputs)
            found.append(operation)
            for operand in operation.inputs:
                demand(operand)
        return marked_attention(found)

    def _with_stops(self, op: Operation) -> Operation:
        if not isinstance(op, LinearOp):
            return op
        found = stopped_operands(self.program, op.equations, op.constants)
        return replace(op, stopped=found) if found else op

    def standing(
        self, equations: Sequence[Equation], start: Value, end: Value
    ) -> Parts:
        """The parts of an operation whose equations stand for those of the program."""
        inside = {v for e in equations for v in e.outputs} | {start}
        read = (a for e in equations for a in e.inputs if isinstance(a, Value))
        constants = dict.fromkeys(a for a in read if a not in inside)
        return (start,), (end,), tuple(equations), tuple(constants)

    def group(self, inputs: Sequence[Value], end: Value) -> Parts:
        """The parts of an operation of all equations between some values."""
        equations, constants = between(inputs, [end], self.program.active.__contains__)
        return tuple(inputs), (end,), equations, constants


# The inputs, outputs, equations and constants of an operation.
Parts = tuple[
    tuple[Value, ...], tuple[Value, ...], tuple[Equation, ...], tuple[Value, ...]
]

# The class of an equation by itself: by how relevance is derived; if linear, by kind.
_LINEAR: dict[str, type[Operation]] = {
    "add": SumOp,
    "avg_pool": ReductionOp,
    "mean": ReductionOp,
    "sum": ReductionOp,
}
_BY_NATURE: dict[str, type[Operation]] = {
    "function": FunctionOp,
    "homogeneous": HomogeneousOp,
    "linear": LinearOp,
    "movement": MovementOp,
    "product": UnsupportedOp,
    "rounding": RoundingOp,
    "selection": SelectionOp,
}


def _values(atoms: Iterable[Atom]) -> tuple[Value, ...]:
    return tuple(a for a in atoms if isinstance(a, Value))


def _offset(adds: bool) -> frozenset[str]:
    return frozenset({"offset"} if adds else ())


def find_operations(
    program: Program,
    opaque: set[Any],
    view: View,
    levels: Levels,
    embeddings: Mapping[Value, Embedding],
) -> list[Operation]:
    """The operations that relevance passes, from the outputs back to the sources.

    ``opaque`` primitives have a rule of their own: each is an operation by itself.
    """
    builder = _Builder(program, opaque, view, levels, embeddings)
    found = marked_by_position(builder.operations())
    before, _ = affine_before(found, {})
    return with_depths(found, before, max(before.values(), default=0))


def stops(program: Program, operations: Iterable[Operation]) -> Iterator[Stop]:
    """Where dead values meet what carries relevance, in bodies too."""
    for op in operations:
        for equation in op.equations:
            for atom in set(op.stopped).intersection(equation.inputs):
                yield Stop(endings(program, atom), equation)
        for body, inner in op.bodies:
            (equation,) = op.equations
            yield from stops(body.program, inner)
            pairs = zip(body.program.outputs, equation.outputs, strict=True)
            for atom, outer in pairs:
                if program.is_active(outer) and body.program.is_dead(atom):
                    yield Stop(endings(body.program, atom), equation)


def choices(program: Program, operations: Iterable[Operation]) -> Iterator[Choice]:
    """What x decides without being a part of it, in bodies too.

    The predicates of an activation are the function itself, a mask of a softmax's
    scores is a part of them.
    """
    for op in operations:
        if not isinstance(op, ActivationOp | EmbeddingOp):
            yield from choices_of(program, op.equations, op.constants)
        for body, inner in op.bodies:
            yield from choices(body.program, inner)

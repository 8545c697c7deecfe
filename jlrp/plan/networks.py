"""What a program is, as the default composite asks: of convolutions, patches, products.

All is read from operations, their shapes and who reads whom, so that it does not depend
on how a program is written: a loop counts as what it unrolls to, axes lie in any order.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_

from jax.extend.core import primitives as p

from jlrp.ir.families import rearranges
from jlrp.ir.fixpoint import settled
from jlrp.ir.loops import Body
from jlrp.ir.program import Atom, Value
from jlrp.ops.affine import reshape_groups
from jlrp.ops.base import Operation, with_inner
from jlrp.ops.kinds.activation import ActivationOp
from jlrp.ops.kinds.affine import AffineOp
from jlrp.ops.kinds.linear import LinearOp, ReductionOp
from jlrp.ops.kinds.loop import LoopOp
from jlrp.ops.kinds.product import ProductOp
from jlrp.ops.kinds.softmax import SoftmaxOp


@dataclass(frozen=True)
class Convolution:
    """One convolution, in pixels of x.

    Attributes:
      field: how many pixels along an axis one of its outputs sees, at most; None: all.
      side: of the image that it runs over, the shorter one; 0 of a signal.
      times: how often it runs, in loops of fixed length.
      embeds: whether it cuts x into patches that do not overlap, before all others.
      dense: whether it is a dense layer: on such patches, or with a single position.
    """

    field: float | None
    side: float
    times: int = 1
    embeds: bool = False
    dense: bool = False


@dataclass(frozen=True)
class Network:
    """What a program is made of.

    Attributes:
      convolutions: by operation.
      attends: whether softmax weights, or queries and keys, are multiplied.
      selective: whether there is a selective recurrence.
      patches: whether x is cut into patches that do not overlap, each mapped alike, by
        a convolution or by a reshape.
      gated: whether a recurrence has gates: maps of what they have made before.
      coefficients: the products of those gates that multiply what it carries.
      multiplies: whether values are multiplied by values at all.
      is_map: whether the output is of the places of an image: a convolution is behind
        it, and neither a dense layer nor a mean over places.
    """

    convolutions: Mapping[Operation, Convolution]
    patches: bool
    attends: bool
    selective: bool
    gated: bool
    coefficients: frozenset[Operation]
    multiplies: bool
    is_map: bool

    @property
    def count(self) -> int:
        """How many convolutions run, without those that are dense layers."""
        found = self.convolutions.values()
        return sum(c.times for c in found if not c.dense)

    @property
    def side(self) -> float:
        """Of the image, in pixels; 0 of a signal."""
        return max((c.side for c in self.convolutions.values()), default=0.0)


def network_of(operations: Sequence[Operation]) -> Network:
    """What a program is made of; its operations, from the output back."""
    everything = with_inner(operations)
    products = [op for op in everything if isinstance(op, ProductOp)]
    windows = _Windows()
    seen = windows.walk(operations, {}, 1)
    convolutions = windows.convolutions
    gates = _recurrent_gates(operations)
    return Network(
        convolutions,
        any(c.embeds for c in convolutions.values()) or any(map(_cuts, operations)),
        any("attention" in op.facts for op in products),
        any(op.product.recurs for op in products),
        bool(gates),
        frozenset(op for op, multiplies_carry in gates.items() if multiplies_carry),
        bool(products),
        _is_map(operations, seen),
    )


def _is_map(operations: Sequence[Operation], seen: Mapping[Value, _Seen]) -> bool:
    read = {v for op in operations for v in op.inputs}
    outputs = [v for op in operations for v in op.outputs if v not in read]
    ends = [seen.get(v, _Seen()) for v in outputs]
    return bool(ends) and all(end.places for end in ends)


# Receptive fields


@dataclass(frozen=True)
class _Seen:
    """What an element of a value sees of x.

    Attributes:
      field: pixels along an axis; None: all.
      jump: pixels to the next element.
      side: of the image, as the first convolution tells it; 0 of a signal.
      mapped: whether a dense or convolution was before.
      places: whether it is at one of several places of an image.
    """

    field: float | None = 1.0
    jump: float = 1.0
    side: float = 0.0
    mapped: bool = False
    places: bool = False


def _merged(seen: Iterable[_Seen]) -> _Seen:
    seen = list(seen) or [_Seen()]
    fields = [s.field for s in seen]
    return _Seen(
        None if None in fields else max(fields),  # type: ignore[type-var]
        max(s.jump for s in seen),
        max(s.side for s in seen),
        any(s.mapped for s in seen),
        any(s.places for s in seen),
    )


@dataclass
class _Windows:
    """A walk from x to the output that measures what each convolution sees."""

    convolutions: dict[Operation, Convolution] = field(default_factory=dict)

    def walk(
        self, operations: Sequence[Operation], known: Mapping[Value, _Seen], times: int
    ) -> dict[Value, _Seen]:
        at = dict(known)
        for op in reversed(operations):
            before = _merged(at[v] for v in op.inputs if v in at)
            if op.bodies:
                self.through(op, at, before, times)
            else:
                at |= dict.fromkeys(op.outputs, self.behind(op, before, times))
        return at

    def behind(self, op: Operation, before: _Seen, times: int) -> _Seen:
        if isinstance(op, AffineOp) and op.is_convolution:
            return self.convolved(op, before, times)
        if isinstance(op, AffineOp):
            if len(op.affine.start.shape) > 3:  # a map of channels
                return replace(before, mapped=True)
            return replace(before, field=None, mapped=True, places=False)
        sums = isinstance(op, ReductionOp) and not op.is_pooling
        if sums or isinstance(op, ProductOp | SoftmaxOp):
            return replace(before, field=None, places=False)
        for equation in op.equations:
            if "window_dimensions" in equation.params:
                sizes = equation.params["window_dimensions"]
                strides = equation.params["window_strides"]
                rates = equation.params.get("window_dilation") or [1] * len(sizes)
                before = _stepped(before, list(zip(sizes, strides, rates, strict=True)))
                left = zip(sizes, equation.outputs[0].shape, strict=True)
                single = all(extent == 1 for size, extent in left if size > 1)
                before = replace(before, places=before.places and not single)
        return before

    def convolved(self, op: AffineOp, before: _Seen, times: int) -> _Seen:
        axes = _spatial_axes(op)
        reads = [(size, stride, rate) for _, size, stride, rate, _ in axes]
        after = _stepped(before, reads)
        spread = max((spread for *_, spread in axes), default=1)
        extents = [extent for extent, *_ in axes]
        is_image = sum(extent > 1 for extent in extents) > 1
        side = before.side or (min(extents) * before.jump if is_image else 0.0)
        after = replace(after, jump=after.jump / spread, side=side, mapped=True)
        after = replace(after, places=is_image and math.prod(_out_shape(op)) > 1)
        cut = [(size, stride) for extent, size, stride, *_ in axes if extent > 1]
        single = math.prod(_out_shape(op)) == 1
        apart = all(stride >= size for size, stride in cut)
        apart = apart and any(size > 1 for size, _ in cut)
        embeds = apart and not before.mapped and not single
        dense = embeds or single
        self.convolutions[op] = Convolution(after.field, side, times, embeds, dense)
        return after

    def through(
        self, op: Operation, at: dict[Value, _Seen], before: _Seen, times: int
    ) -> None:
        """A loop: its last iteration sees most. A branch: all of its cases."""
        (equation,) = op.equations
        length = equation.params.get("length", 1)
        for part, (body, inner) in enumerate(op.bodies):
            runs = _runs(op, part, length)
            operands = body.operands(equation)
            inside = {
                v: at.get(a, before) if a in at else _Seen()
                for v, a in zip(body.program.inputs, operands, strict=True)
            }
            after = self.walk(inner, inside, times * runs)
            if body.n_carries and runs > 1:
                for carry, out in zip(body.carries, body.program.outputs, strict=False):
                    if out in after:
                        inside[carry] = _grown(inside[carry], after[out], runs)
                after = self.walk(inner, inside, times * runs)
            outs = zip(equation.outputs, body.program.outputs, strict=False)
            for value, out in outs:
                if out in after:
                    at[value] = _merged([after[out], at.get(value, after[out])])


def _runs(op: Operation, part: int, length: int) -> int:
    """How often a body of a loop runs: one that is peeled, once."""
    if not (isinstance(op, LoopOp) and op.has_length):
        return 1
    peeled = len(op.bodies) - 1
    return 1 if part < peeled else max(1, length - peeled)


def _grown(before: _Seen, after: _Seen, runs: int) -> _Seen:
    """A carry of the last of some iterations, of which one was walked through."""
    if before.field is None or after.field is None:
        return replace(after, field=None)
    more = (after.field - before.field) * max(0, runs - 2)
    return replace(after, field=after.field + more)


def _stepped(before: _Seen, windows: Iterable[tuple[int, int, int]]) -> _Seen:
    windows = list(windows)
    reach = max((size - 1) * rate for size, _, rate in windows) if windows else 0
    stride = max((stride for _, stride, _ in windows), default=1)
    field = None if before.field is None else before.field + reach * before.jump
    return replace(before, field=field, jump=before.jump * stride)


def _out_shape(op: AffineOp) -> list[int]:
    """The spatial axes of a convolution's output."""
    core = op.affine.core
    axes = core.params["dimension_numbers"].out_spec[2:]
    return [core.outputs[0].shape[axis] for axis in axes]


def _spatial_axes(op: AffineOp) -> list[tuple[int, int, int, int, int]]:
    """Extent, kernel, stride, dilation and spread of each spatial axis of x."""
    core = op.affine.core
    numbers = core.params["dimension_numbers"]
    image, kernel = core.inputs
    return list(
        zip(
            (image.shape[a] for a in numbers.lhs_spec[2:]),
            (kernel.shape[a] for a in numbers.rhs_spec[2:]),
            core.params["window_strides"],
            core.params["rhs_dilation"],
            core.params["lhs_dilation"],
            strict=True,
        )
    )


def _cuts(op: Operation) -> bool:
    """Whether a dense layer maps parts of an axis of x, which a reshape has cut."""
    if not isinstance(op, AffineOp) or op.is_convolution or "first" not in op.facts:
        return False
    positions = math.prod(op.affine.core.outputs[0].shape[1:-1])
    value, cut = op.affine.start, False
    while value.producer is not None:
        equation = value.producer
        moved = [a for a in equation.inputs if isinstance(a, Value)]
        if len(moved) != 1 or not rearranges(equation):
            return False
        cut |= equation.primitive is p.reshape_p and _splits(
            moved[0].shape, value.shape
        )
        value = moved[0]
    return cut and positions > 1


def _splits(old: tuple[int, ...], new: tuple[int, ...]) -> bool:
    def count(shape: tuple[int, ...], axes: Sequence[int]) -> int:
        return sum(shape[a] > 1 for a in axes)

    return any(
        count(old, olds) == 1 < count(new, news)
        for olds, news in reshape_groups(old, new)
    )


# Recurrences


def _recurrent_gates(operations: Sequence[Operation]) -> dict[Operation, bool]:
    """The gates' products of a recurrence, and whether it carries what they multiply.

    A gate is a map of what the same map has made before. What such a gate was computed
    from, if it is the other factor, is carried: ``f * c`` and ``o * tanh(c)`` of an
    LSTM, ``z * h`` of a GRU. The same gate is a coefficient elsewhere too: ``1 - z``.
    """
    again = _Again().found(operations)
    producers = {v: op for op in with_inner(operations) for v in op.outputs}

    def recurs(op: ProductOp) -> bool:
        gates = (_maps_before(v, producers) for v in _gates_of(op))
        return any(not again.isdisjoint(maps) for maps in gates)

    everything = with_inner(operations) if again else ()
    products = [op for op in everything if isinstance(op, ProductOp)]
    found = [op for op in products if "gate" in op.facts and recurs(op)]
    starts = {op: {_start(v, producers) for v in _gates_of(op)} for op in found}
    carried: set[Value] = set()
    for op in found:
        if op.product.selective != op.product.uniform:
            carried |= starts[op]
    return {op: not carried.isdisjoint(starts[op]) for op in found}


def _gates_of(op: ProductOp) -> list[Value]:
    shares = zip(op.inputs, op.product.gated, strict=True)
    return [v for v, share in shares if not share]


def _start(gate: Value, producers: Mapping[Value, Operation]) -> Value:
    """What a gate's activation reads: the same for ``z`` and for ``1 - z``."""

    def steps(op: Operation | None) -> bool:
        return isinstance(op, ActivationOp) or isinstance(op, LinearOp) and op.is_scale

    while steps(producers.get(gate)):
        (gate,) = producers[gate].inputs
    return gate


def _maps_before(value: Value, producers: Mapping[Value, Operation]) -> set[Operation]:
    """The dense and convolutions that a value is reached from through no other."""
    found, stack, seen = set(), [value], set()
    while stack:
        op = producers.get(stack.pop())
        if op is None or op in seen:
            continue
        seen.add(op)
        if isinstance(op, AffineOp):
            found.add(op)
        else:
            stack += op.inputs
    return found


@dataclass
class _Again:
    """The maps whose kernel also reads what it has made before.

    In a loop a kernel is the same in every iteration if it follows from no slice and no
    carry: scanned layers have one each, steps of time share theirs. Each kernel is a
    bit; a value has those of the kernels on some path to it.
    """

    kernels: dict[Operation, int] = field(default_factory=dict)
    again: int = 0
    numbers: dict[Hashable, int] = field(default_factory=dict)  # of a spelling
    known: dict[Value, int] = field(default_factory=dict)  # the number of a value

    def found(self, operations: Sequence[Operation]) -> set[Operation]:
        self.walk(operations, {}, None)
        return {op for op, bit in self.kernels.items() if bit & self.again}

    def walk(
        self,
        operations: Sequence[Operation],
        known: Mapping[Atom, int],
        body: Body | None,
    ) -> dict[Atom, int]:
        at = dict(known)
        for op in reversed(operations):
            bits = 0
            for value in op.inputs:
                bits |= at.get(value, 0)
            if isinstance(op, AffineOp):
                bit = self.kernels[op] = self.bit_of(op.affine.kernel, body)
                self.again |= bit & bits
                bits |= bit
            for part, inner in op.bodies:
                bits |= self.through(op, part, inner, at)
            at |= {v: at.get(v, 0) | bits for v in op.outputs}
        return at

    def through(
        self, op: Operation, body: Body, inner: list[Operation], at: Mapping[Atom, int]
    ) -> int:
        """The bits that a loop or branch adds."""
        operands = body.operands(op.equations[0])
        pairs = list(zip(body.program.inputs, operands, strict=True))
        inside: dict[Atom, int] = {v: at.get(a, 0) for v, a in pairs}
        for constant, outside in pairs[: body.n_constants]:
            self.known[constant] = self.number(outside)

        def behind(carry: Sequence[int]) -> list[int]:
            inside.update(zip(body.carries, carry, strict=True))
            after = self.walk(inner, inside, body)
            return [after.get(out, 0) for out in body.program.outputs]

        def step(carry: Sequence[int]) -> list[int]:
            return behind(carry)[: body.n_carries]

        carry = [inside[v] for v in body.carries]
        return reduce(or_, behind(settled(step, carry, or_)), 0)

    def bit_of(self, kernel: Atom, body: Body | None) -> int:
        """The bit of a kernel; 0 for one that changes with every iteration."""
        changing = {*body.carries, *body.slices} if body else set()
        if not changing.isdisjoint(_made_of(kernel)):
            return 0
        return 1 << self.number(kernel)

    def number(self, atom: Atom) -> int:
        """A number for what makes a value: equal slices of one array are one kernel."""
        if not isinstance(atom, Value):
            spelled = str(atom.dtype), atom.shape, atom.number.tobytes()
            return self.numbers.setdefault(spelled, len(self.numbers))
        for value in reversed(_made_of(atom)):  # operands first
            if value not in self.known:
                self.known[value] = self.numbers.setdefault(
                    self.spelled(value), len(self.numbers)
                )
        return self.known[atom]

    def spelled(self, value: Value) -> Hashable:
        equation = value.producer
        if equation is None:
            return value
        operands = tuple(
            self.known[a] if isinstance(a, Value) else self.number(a)
            for a in equation.inputs
        )
        which = equation.outputs.index(value)
        return equation.primitive, str(equation.params), which, operands


def _made_of(atom: Atom) -> list[Value]:
    """A value and all that it is made of, the last first."""
    found, stack = set(), [atom]
    while stack:
        value = stack.pop()
        if isinstance(value, Value) and value not in found:
            found.add(value)
            if value.producer is not None:
                stack += value.producer.inputs
    return sorted(found, key=lambda v: -v.position)

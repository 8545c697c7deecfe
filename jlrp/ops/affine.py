"""Affine operation: a dot or convolution with a parameter kernel, and what only scales
and shifts its output by constants: the bias, an inference batch norm, in any spelling.

The chain is walked from its last scale or shift back to the dot or convolution
("core"). Rules that look at weights see the effective kernel: every scale on the way is
moved onto the kernel's output-feature axes. Where that is impossible (a scale that
varies over batch or space), the chain ends, and the scale is an operation by itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jax.extend.core import primitives as p

from jlrp.analysis.terms import Terms
from jlrp.ir.families import rounds
from jlrp.ir.primitives import traits
from jlrp.ir.program import Atom, Equation, Program, Value
from jlrp.ops.contraction import Dot, as_dot, cut_of_dot, is_fixed
from jlrp.promise import is_complex


@dataclass(frozen=True)
class Stage:
    """One equation behind the core: a ``move``, a ``scale`` or a ``shift``."""

    equation: Equation
    kind: str
    source: Value  # the operand that comes from the core
    constant: Atom | None = None  # of a scale or shift

    @property
    def negates(self) -> bool:
        """``-x`` or ``constant - x``."""
        prim = self.equation.primitive
        subtracted = prim is p.sub_p and self.equation.inputs[1] is self.source
        return prim is p.neg_p or subtracted


@dataclass(frozen=True)
class Affine:
    """``end = moves(core(start, kernel)) * scales + shifts``."""

    core: Equation
    operand: int  # index of the active operand of the core
    steps: tuple[Stage, ...]
    stands: bool = False  # the core stands for equations of the program
    of_kernel: tuple[Equation, ...] = ()  # what makes the kernel of parameters, then

    @property
    def start(self) -> Value:
        value = self.core.inputs[self.operand]
        assert isinstance(value, Value)
        return value

    @property
    def kernel(self) -> Atom:
        return self.core.inputs[1 - self.operand]

    @property
    def kind(self) -> str:
        return traits(self.core).linear_kind

    @property
    def equations(self) -> tuple[Equation, ...]:
        return (*self.of_kernel, self.core, *(step.equation for step in self.steps))

    @property
    def has_shift(self) -> bool:
        return any(s.kind == "shift" for s in self.steps)


def is_core(program: Program, equation: Equation) -> bool:
    """A dot or convolution of one active operand with a kernel of parameters.

    One whose kernel is made of literals inside of the program (a resize, a filter bank,
    a sum as a dot with ones) is a fixed map, and no layer.
    """
    if not traits(equation).contraction or is_complex(equation.outputs[0]):
        return False  # rules that look at kernels look at their signs
    kernels = [a for a in equation.inputs if not program.is_active(a)]
    return len(kernels) == 1 and not is_fixed(program, kernels[0])


def step_of(program: Program, equation: Equation) -> Stage | None:
    """The equation as a step that keeps each element of its one active operand."""
    operands = program.active_inputs(equation)
    if len(operands) != 1 or len(equation.outputs) != 1:
        return None
    (source,) = operands
    (out,) = equation.outputs
    prim, row = equation.primitive, traits(equation)
    if row.view:
        if rounds(equation):
            return None
        same_size = math.prod(source.shape) == math.prod(out.shape)
        return Stage(equation, "move", source) if same_size else None
    if prim is p.neg_p:
        return Stage(equation, "scale", source)
    if not (row.addition or row.scaling) or source.shape != out.shape:
        return None
    others = [a for a in equation.inputs if a is not source]
    if len(others) != 1 or (prim is p.div_p and equation.inputs[1] is source):
        return None
    if not program.is_parameter(others[0]):
        return None  # a mask made from x is no part of a kernel
    kind = "shift" if row.addition else "scale"
    return Stage(equation, kind, source, others[0])


def scale_chain(terms: Terms, end: Value) -> list[Stage]:
    """The longest run of scales and shifts by constants that ends at ``end``.

    From the first to the last. Moves are part of it only between two of them.
    """
    key = scale_chain, end
    if key not in terms.remembered:  # several recognisers ask
        terms.remembered[key] = _scale_chain(terms, end)
    return terms.remembered[key]


def _scale_chain(terms: Terms, end: Value) -> list[Stage]:
    program = terms.program
    steps: list[Stage] = []
    value = end
    while (made := value.producer) is not None:
        if value is not end and not program.used_once(value):
            break
        before = terms.before_trip(value) if steps else value
        if before is not value:
            value = before
            continue
        step = step_of(program, made)
        if step is None or (not steps and step.kind == "move"):
            break
        steps.append(step)
        value = step.source
    return steps[::-1]


def start_of(terms: Terms, steps: list[Stage]) -> Value:
    """What the first of some steps reads, before it was moved forth and back."""
    return terms.before_trip(steps[0].source)


def core_of(terms: Terms, value: Value, behind: bool = True) -> Dot | None:
    """The dot or convolution that makes a value, and moves that are a part of it.

    ``behind`` something: then dots that are concatenated, or a part of one, will do.
    """
    made = value.producer
    if made is None:
        return None
    if is_core(terms.program, made):
        return Dot(made, (), ())
    if made.primitive is p.reduce_sum_p or (
        behind and made.primitive is p.concatenate_p
    ):
        return as_dot(terms, made)
    return cut_of_dot(terms, value) if behind else None


def affine_ending_at(terms: Terms, end: Value, merge_batch_norm: bool = True):
    """The affine operation that ends at ``end``, or None."""
    program = terms.program
    steps = scale_chain(terms, end)
    value = start_of(terms, steps) if steps else end
    dot = core_of(terms, value, bool(steps))
    if dot is None:
        return None
    whole = not steps or value is not steps[0].source or program.used_once(value)
    if not whole:
        return None
    behind = [Stage(e, "move", e.inputs[0]) for e in dot.moves]  # type: ignore[arg-type]
    operand = next(i for i, a in enumerate(dot.core.inputs) if program.is_active(a))
    stands = dot.core is not value.producer
    if stands and not _follow_each_other(value, steps):
        return None
    affine = Affine(dot.core, operand, (*behind, *steps), stands, dot.kernel)
    if not merge_batch_norm and batch_norm_start(steps) is not None:
        return None
    return affine if _scales_fit(affine) else None


def _follow_each_other(start: Value, steps: list[Stage]) -> bool:
    """Whether each step reads what the step before has made, and nothing is between."""
    made = [start, *(v for step in steps for v in step.equation.outputs)]
    return all(step.source in made for step in steps)


def batch_norm_start(steps: list[Stage]) -> int | None:
    """Index of the first step of an inference batch norm among ``steps``, or None.

    Its scale is computed with a square root (of the running variance). The mean is
    subtracted right before the scale, unless a later shift is computed from the scale:
    then that shift holds the mean (Keras: ``x * inv + (beta - mean * inv)``), and what
    comes before the scale is the bias of the convolution.
    """
    rooted = [
        i for i, s in enumerate(steps) if s.kind == "scale" and _has_root(s.constant)
    ]
    if not rooted:
        return None
    first = rooted[0]
    scale = steps[first].constant
    for later in steps[first + 1 :]:
        if later.kind == "shift" and _depends(later.constant, scale):
            return first
    before = first - 1
    while before >= 0 and steps[before].kind == "move":
        before -= 1
    return before if before >= 0 and steps[before].kind == "shift" else first


def _constant_ancestors(atom: Atom | None):
    stack, seen = [atom], set()
    while stack:
        value = stack.pop()
        if isinstance(value, Value) and value not in seen:
            seen.add(value)
            yield value
            if value.producer is not None:
                stack.extend(value.producer.inputs)


def _has_root(constant: Atom | None) -> bool:
    return any(
        v.producer is not None and v.producer.primitive in (p.rsqrt_p, p.sqrt_p)
        for v in _constant_ancestors(constant)
    )


def _unmoved(atom: Atom | None) -> Atom | None:
    while (
        isinstance(atom, Value)
        and atom.producer is not None
        and traits(atom.producer).view
    ):
        atom = atom.producer.inputs[0]
    return atom


def _depends(constant: Atom | None, on: Atom | None) -> bool:
    target = _unmoved(on)
    return any(v is target for v in _constant_ancestors(constant))


# Where the kernel's output features lie: axes of the core's output and of the kernel.


def feature_axes(affine: Affine) -> list[tuple[int, int]]:
    """Pairs (axis of the core's output, axis of the kernel), by output axis."""
    core = affine.core
    kernel_index = 1 - affine.operand
    if core.primitive is p.conv_general_dilated_p:
        numbers = core.params["dimension_numbers"]
        if kernel_index == 0:  # the image is the parameter: no output feature axis
            return []
        return [(numbers.out_spec[1], numbers.rhs_spec[0])]
    contracting, batch = core.params["dimension_numbers"]
    ranks = [len(a.shape) for a in core.inputs]
    free = [
        [i for i in range(ranks[k]) if i not in contracting[k] and i not in batch[k]]
        for k in (0, 1)
    ]
    pairs = [(i, axis) for i, axis in enumerate(batch[kernel_index])]
    offset = len(batch[0]) + (len(free[0]) if kernel_index == 1 else 0)
    pairs += [(offset + i, axis) for i, axis in enumerate(free[kernel_index])]
    return pairs


def feature_layouts(affine: Affine) -> list[frozenset[int] | None]:
    """For each step, the axes of its operand that hold kernel features.

    None behind a move that mixes feature axes with others.
    """
    axes: frozenset[int] | None = frozenset(out for out, _ in feature_axes(affine))
    layouts = []
    for step in affine.steps:
        layouts.append(axes)
        if step.kind == "move" and axes is not None:
            axes = _moved_axes(step.equation, axes)
    return layouts


def _scales_fit(affine: Affine) -> bool:
    """Whether every scale varies along kernel features only."""
    layouts = feature_layouts(affine)
    for step, axes in zip(affine.steps, layouts, strict=True):
        if step.kind == "scale":
            varying = varying_axes(step.constant, len(step.source.shape))
            if varying and (axes is None or not varying <= axes):
                return False
    return True


def _moved_axes(equation: Equation, axes: frozenset[int]) -> frozenset[int] | None:
    """Where a set of axes goes in a move; None if it mixes them with others."""
    prim, params = equation.primitive, equation.params
    (source,) = (a for a in equation.inputs if isinstance(a, Value))
    if prim is p.transpose_p:
        permutation = params["permutation"]
        return frozenset(i for i, old in enumerate(permutation) if old in axes)
    if prim is p.broadcast_in_dim_p:
        dimensions = params["broadcast_dimensions"]
        return frozenset(dimensions[a] for a in axes)
    if prim in (p.reshape_p, p.squeeze_p):
        out_shape = equation.outputs[0].shape
        return _reshaped_axes(source.shape, out_shape, axes)
    return axes


def _reshaped_axes(
    old: tuple[int, ...], new: tuple[int, ...], axes: frozenset[int]
) -> frozenset[int] | None:
    moved: set[int] = set()
    for old_group, new_group in reshape_groups(old, new):
        inside = [a in axes for a in old_group if old[a] > 1]
        if any(inside):
            if not all(inside):
                return None
            moved.update(new_group)
    return frozenset(moved)


def reshape_groups(old: tuple[int, ...], new: tuple[int, ...]):
    """Smallest groups (axes of old, axes of new) of equal size, in order."""
    i = j = 0
    groups = []
    while i < len(old) or j < len(new):
        old_group, new_group = [], []
        old_size = new_size = 1
        while True:
            if old_size <= new_size and i < len(old):
                old_size *= old[i]
                old_group.append(i)
                i += 1
            elif j < len(new):
                new_size *= new[j]
                new_group.append(j)
                j += 1
            else:
                break
            if old_size == new_size and old_group and new_group:
                break
        groups.append((old_group, new_group))
    return groups


def varying_axes(atom: Atom | None, rank: int) -> frozenset[int]:
    """The axes along which a constant may vary; those of a broadcast do not."""
    if atom is None or not atom.shape:
        return frozenset()
    axes = frozenset(i for i, size in enumerate(atom.shape) if size > 1)
    if not isinstance(atom, Value) or atom.producer is None:
        return axes
    equation = atom.producer
    prim = equation.primitive
    operand = equation.inputs[0] if equation.inputs else None
    if operand is None:
        return axes
    if prim is p.broadcast_in_dim_p:
        inner = varying_axes(operand, len(operand.shape))
        dimensions = equation.params["broadcast_dimensions"]
        return frozenset(dimensions[a] for a in inner)
    if prim is p.transpose_p:
        inner = varying_axes(operand, rank)
        permutation = equation.params["permutation"]
        return frozenset(i for i, old in enumerate(permutation) if old in inner)
    if prim in (p.reshape_p, p.squeeze_p):
        inner = varying_axes(operand, len(operand.shape))
        moved = _reshaped_axes(operand.shape, atom.shape, inner)
        return axes if moved is None else moved & axes
    if traits(equation).carries_elementwise and prim is not p.select_n_p:
        parts = [varying_axes(a, rank) for a in equation.inputs if a.shape]
        return frozenset().union(*parts) & axes
    return axes

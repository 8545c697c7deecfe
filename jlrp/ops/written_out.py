"""Sums that are written out, read as the one equation that computes the same.

``x[:, 0] + x[:, 1]``, the last of a running sum and a window over a whole axis are a
sum over that axis; a sum of products of two values is their contraction, and so are
contractions of parts, concatenated: one operation, which a rule stabilises once. The
equations of the program still run; those that stand for them are what recognisers and
rules read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from jax import lax
from jax.extend.core import primitives as p

from jlrp.analysis.intervals import scalar_of
from jlrp.analysis.terms import (
    Digit,
    Factor,
    Root,
    Term,
    Terms,
    covered,
    is_move,
    itself,
    refined,
    strides_of,
)
from jlrp.ir.names import named_values
from jlrp.ir.primitives import traits
from jlrp.ir.program import Equation, Program, Value, between, reaching
from jlrp.ops.contraction import equations_of, is_parameter

Array = Any


def read_as_sums(program: Program, opaque: Iterable[Any]) -> None:
    """Let sums over axes and contractions stand for those that are written out."""
    while found := _written_out(Terms(program, opaque)):  # sums of sums, one by one
        _read(program, found)


def _written_out(terms: Terms) -> dict[Value, list[Equation]]:
    """Some sums that are written out, and the equations that stand for each."""
    program, found, inside = terms.program, dict[Value, list[Equation]](), set()
    named: set[Value] | None = None
    for equation in reversed(program.equations):
        if equation in inside or not _may_sum(terms, equation):
            continue
        (out,) = equation.outputs
        if _is_outer(equation):
            found[out] = _product(equation)
            continue
        term = _term(terms, out, True) or _term(terms, out, False)
        if term is None:
            continue
        starts = [f.root for f in term.factors]
        between_them = between(starts, [out], program.active.__contains__)[0]  # type: ignore
        if _is_plain(between_them):
            continue
        if named is None:
            named = set().union(*named_values(program).values())
        made = {v for e in between_them for v in e.outputs} - {out}
        if not named.isdisjoint(made):
            continue
        standing = _standing(term, equation, out)
        if standing is not None:
            found[out] = standing
            inside.update(between_them)
    return found


def _may_sum(terms: Terms, equation: Equation) -> bool:
    """Whether a sum that is written out may end with an equation."""
    program = terms.program
    if equation.primitive in terms.opaque or len(equation.outputs) != 1:
        return False
    (out,) = equation.outputs
    if out not in program.active or out in program.standing:
        return False
    if equation.primitive is p.reduce_window_sum_p:
        return covered(equation) is not None
    if equation.primitive in (p.reduce_sum_p, p.concatenate_p):
        return True
    if equation.primitive is p.dot_general_p:
        return _is_outer(equation)
    if is_move(equation):
        (source, *_) = equation.inputs
        made = source.producer if isinstance(source, Value) else None
        return made is not None and made.primitive is p.cumsum_p
    return traits(equation).addition and len(program.active_inputs(equation)) == 2


def _is_plain(equations: Sequence[Equation]) -> bool:
    """Whether it is one equation that computes, and moves."""
    made = [e for e in equations if not is_move(e)]
    written = made[0].primitive in (p.reduce_window_sum_p, p.cumsum_p)
    return len(made) == 1 and not written


def _is_outer(equation: Equation) -> bool:
    """Whether it is a product in the words of a contraction, of nothing."""
    if equation.primitive is not p.dot_general_p:
        return False
    (contracting, _), _ = equation.params["dimension_numbers"]
    dtypes = {a.dtype for a in (*equation.inputs, *equation.outputs)}
    return not contracting and len(dtypes) == 1


def _leaves(terms: Terms, out: Value, products: bool) -> set[Value] | None:
    """What a value adds up, or the factors of ``products`` that it adds up."""
    program, found, stack = terms.program, set[Value](), [(out, False)]
    while stack:
        value, added = stack.pop()
        made = value.producer
        inside = value is out or program.used_once(value)
        if made is None or made.primitive in terms.opaque:
            found.add(value)
        elif products and inside and (factors := _factors(terms, made, added)):
            found.update(factors)
        elif is_move(made) or (inside and _adds(program, made)):
            added = added or not is_move(made)
            stack += [(a, added) for a in program.active_inputs(made)]
        else:
            found.add(value)
        if len(found) > 2:
            return None
    return found


def _factors(terms: Terms, equation: Equation, added: bool) -> list[Value]:
    """The two factors of a product of active values, or of one and a parameter.

    Learned maps that are ``added`` stay several, each with its kernel.
    """
    if equation.primitive not in (p.mul_p, p.dot_general_p):
        return []
    before = [terms.before_moves(a) for a in equation.inputs]
    roots = [found[0] for found in before if found is not None]
    still = [root for root in roots if not terms.program.is_active(root)]
    learned = all(is_parameter(terms, root) for root in still)
    several = bool(still) and added and equation.primitive is p.dot_general_p
    return roots if len(roots) == 2 > len(still) and learned and not several else []


def _adds(program: Program, equation: Equation) -> bool:
    prim = equation.primitive
    if prim in (p.reduce_sum_p, p.cumsum_p):
        return True
    if prim is p.reduce_window_sum_p:
        return covered(equation) is not None
    still = [a for a in equation.inputs if not program.is_active(a)]
    return traits(equation).addition and all(scalar_of(a) == 0 for a in still)


def _term(terms: Terms, out: Value, products: bool) -> Term | None:
    """A value as one sum of another one, or as a product of two."""
    leaves = _leaves(terms, out, products)
    if leaves is None or (len(leaves) > 1 and not products):
        return None
    given = {leaf: itself(leaf) for leaf in leaves}
    assumed = terms.assuming(given, through=True)
    term = assumed.closed(assumed.read(out)).only
    if term is None or term.coefficient != 1:
        return None
    if not term.inner and len(term.factors) < 2:
        return None
    roots = [f.root for f in term.factors]
    plain = all(f.power == 1 and _is_number(f.root, out) for f in term.factors)
    return term if plain and set(roots) == leaves else None


def _is_number(root: Root, like: Value) -> bool:
    return isinstance(root, Value) and root.dtype == like.dtype


def _read(program: Program, found: dict[Value, list[Equation]]) -> None:
    """Put standing equations in the place of those of the program."""
    program.own = program.own or program.equations
    kept = [e for e in program.equations if not any(v in found for v in e.outputs)]
    for out, standing in found.items():
        step = 1 / len(standing)
        for k, equation in enumerate(standing):
            equation.position = out.position + (k + 1) * step - 1  # type: ignore
            kept.append(equation)
            virtual = {v for v in equation.outputs if v is not out}
            program.virtual |= virtual
            if not program.active.isdisjoint(equation.inputs):
                program.active |= virtual
        for equation in standing:
            for value in equation.outputs:
                value.producer = equation
    kept.sort(key=lambda e: e.position)
    program.equations = reaching(kept, program.outputs)
    program.uses = _uses(program)
    everything = {*program.own, *program.equations, *program.unread}
    run = {*program.own}

    def order(equation: Equation) -> tuple[float, bool]:
        return equation.position, equation not in run

    for k, equation in enumerate(sorted(everything, key=order)):
        equation.position = k


def _uses(program: Program) -> dict[Value, list[Equation]]:
    uses: dict[Value, list[Equation]] = {}
    for equation in reversed(program.equations):
        if program.active.isdisjoint(equation.outputs):
            continue
        keys = program.choosing.get(equation, ())
        for atom in equation.inputs:
            if atom in program.active and atom not in keys:
                uses.setdefault(atom, []).append(equation)  # type: ignore[arg-type]
    return uses


# The equations that stand.


def _product(outer: Equation) -> list[Equation]:
    """The product of what is broadcast, for a contraction of nothing."""
    (out,) = outer.outputs
    _, batch = outer.params["dimension_numbers"]
    ranks, places = [len(a.shape) for a in outer.inputs], []
    start = len(batch[0])
    for rank, both in zip(ranks, batch, strict=True):
        free = [i for i in range(rank) if i not in both]
        at = dict(zip(both, range(len(both)), strict=True))
        at |= dict(zip(free, range(start, start + len(free)), strict=True))
        start += len(free)
        places.append(at)

    def wide(x: Array, at: dict[int, int]) -> Array:
        order = sorted(range(x.ndim), key=at.__getitem__)
        x = x if order == sorted(order) else lax.transpose(x, order)
        if x.shape == tuple(out.shape):
            return x
        return lax.broadcast_in_dim(x, out.shape, [at[i] for i in order])

    def product(*x: Array) -> Array:
        return lax.mul(*map(wide, x, places))

    return _standing_for(out, product, outer.inputs, outer)


def _standing_for(
    out: Value, function: Any, operands: Sequence[Any], like: Equation
) -> list[Equation]:
    made, (end,) = equations_of(function, operands, like)
    last = made[-1]
    assert end in last.outputs
    return [*made[:-1], replace(last, outputs=(out,))]


def _standing(term: Term, like: Equation, out: Value) -> list[Equation] | None:
    digits = _digits(term)
    if digits is None:
        return None
    n = len(digits) - len(term.inner)
    if len(term.factors) == 1:
        function = _sum(term.factors[0], digits, n, out)
    else:
        function = _contraction(term.factors, digits, n, out)
    if function is None:
        return None
    return _standing_for(out, function, [f.root for f in term.factors], like)


Digits = list[tuple[int, tuple[int, ...]]]  # sizes, and the strides of each factor


def _digits(term: Term) -> Digits | None:
    """The digits of the output, axis by axis, then those that are summed."""
    digits: Digits = []
    for axes in zip(*(f.view.axes for f in term.factors), strict=True):
        sizes = refined(axes)
        strides = sizes and [strides_of(axis, sizes) for axis in axes]
        if sizes is None or (strides and None in strides):
            return None
        digits += zip(sizes, zip(*strides, strict=True), strict=True) if strides else []  # type: ignore
    inner = zip(*(f.inner for f in term.factors), strict=True)
    return [*digits, *zip(term.inner, inner, strict=True)]


class _Cut:
    """A value as an array with one axis for each of some digits, the slowest first."""

    def __init__(self, factor: Factor, digits: Sequence[Digit]):
        self.order = sorted(range(len(digits)), key=lambda k: -digits[k][1])
        root, left = factor.root, factor.view.offset
        above = math.prod(root.shape)
        self.shape, self.starts, self.ends = [], [], []
        self.fits = True
        for k in self.order:
            size, stride = digits[k]
            start, left = divmod(left, stride) if stride > 0 else (0, left)
            if stride <= 0 or above % stride or start + size > above // stride:
                self.fits = False
                return
            self.shape.append(above // stride)
            self.starts.append(start)
            self.ends.append(start + size)
            above = stride
        self.shape.append(above)
        self.starts.append(left)
        self.ends.append(left + 1)

    def __call__(self, x: Array) -> Array:
        last = len(self.order)
        shape = self.shape[:-1] if self.shape[-1] == 1 else self.shape
        x = x if list(x.shape) == shape else lax.reshape(x, shape)
        starts, ends = self.starts[: x.ndim], self.ends[: x.ndim]
        if any(starts) or ends != list(x.shape):
            x = lax.slice(x, starts, ends)
        return x if x.ndim == last else lax.squeeze(x, (last,))


def _laid_out(y: Array, made: Sequence[int], digits: Digits, n: int, out: Value):
    """Digits that were made in some order as the axes of the output."""
    order = [made.index(k) for k in range(n) if k in made]
    y = y if order == sorted(order) else lax.transpose(y, order)
    sizes = [size for size, _ in digits[:n]]
    kept = [k for k in range(n) if k in made]
    if len(kept) < n:
        y = lax.broadcast_in_dim(y, sizes, kept)
    return y if y.shape == tuple(out.shape) else lax.reshape(y, out.shape)


def _sum(factor: Factor, digits: Digits, n: int, out: Value) -> Any:
    varying = [k for k, (_, (stride,)) in enumerate(digits) if stride]
    cut = _Cut(factor, [(digits[k][0], digits[k][1][0]) for k in varying])
    if not cut.fits:
        return None
    made = [varying[k] for k in cut.order]

    def summed(x: Array) -> Array:
        axes = [i for i, k in enumerate(made) if k >= n]
        y = lax.reduce_sum(cut(x), axes)
        return _laid_out(y, [k for k in made if k < n], digits, n, out)

    return summed


def _contraction(factors: Sequence[Factor], digits: Digits, n: int, out: Value) -> Any:
    varying = [
        [k for k, (_, strides) in enumerate(digits) if strides[i]] for i in (0, 1)
    ]
    if not {*range(n, len(digits))} <= {*varying[0]} & {*varying[1]}:
        return None
    if varying[0] == varying[1] and n < len(digits):
        return None  # element by element: a product, and a sum
    cuts = [
        _Cut(f, [(digits[k][0], digits[k][1][i]) for k in varying[i]])
        for i, f in enumerate(factors)
    ]
    if not all(cut.fits for cut in cuts):
        return None
    axes = [[varying[i][k] for k in cut.order] for i, cut in enumerate(cuts)]
    summed = range(n, len(digits))
    both = [k for k in axes[0] if k in axes[1] and k < n]
    free = [[k for k in axes[i] if k not in axes[1 - i]] for i in (0, 1)]
    numbers = tuple(
        tuple(tuple(at.index(k) for k in ks) for at in axes) for ks in (summed, both)
    )

    def contracted(a: Array, b: Array) -> Array:
        x = cuts[0](a), cuts[1](b)
        if not summed:
            return lax.mul(*(_laid_out(x[i], axes[i], digits, n, out) for i in (0, 1)))
        y = lax.dot_general(*x, numbers)  # type: ignore[arg-type]
        return _laid_out(y, [*both, *free[0], *free[1]], digits, n, out)

    return contracted

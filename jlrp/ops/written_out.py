"""Sums that are written out, read as the one equation that computes the same.

``x[:, 0] + x[:, 1]``, the last of a running sum and a window over a whole axis are a
sum over that axis; a sum of products of two values is their contraction, and so are
contractions of parts, concatenated: one operation, which a rule stabilises once. The
equations of the program still run; those that stand for them are what recognisers and
rules read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
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
from jlrp.ir.names import with_names
from jlrp.ir.primitives import traits
from jlrp.ir.program import Atom, Equation, Program, Value, between
from jlrp.ops.standing import OtherWords, standing_for
from jlrp.ops.sums import in_other_words, may_be_other

Array = Any


class Sums(OtherWords):
    """Sums over axes and contractions that are written out, sums of sums one by one."""

    def found(self) -> Iterator[tuple[Value, list[Equation]]]:
        yield from _written_out(Terms(self.program, self.opaque)).items()


def _written_out(terms: Terms) -> dict[Value, list[Equation]]:
    """Some sums that are written out, and the equations that stand for each.

    A sum of a contraction is read once this is, or is known to be none.
    """
    program, found, inside = terms.program, dict[Value, list[Equation]](), set()
    later = dict[Value, list[Equation]]()
    names = partial(with_names, program)
    ends = [e for e in reversed(program.equations) if _may_sum(terms, e)]
    for equation in ends:  # first, or a sum of a sum of a stack is one sum
        if (plain := in_other_words(terms, equation, names)) is not None:
            found[equation.outputs[0]] = plain
    if found:
        return found
    for equation in ends:
        if equation in inside or _is_flat(program, equation):
            continue
        (out,) = equation.outputs
        of_products = False
        for term, between_them in _terms_of(terms, out, names):
            if term is None:
                of_products = True
                continue
            if _is_plain(between_them) and not _is_halved(program, out):
                break
            standing = _standing(program, term, equation, out)
            if standing is not None and of_products:
                later[out] = standing
                break
            if standing is not None:
                found[out] = standing
                inside.update(between_them)
                break
            of_products = len(term.factors) == 2
    return found or later


def _terms_of(
    terms: Terms, out: Value, names: Callable[[], set[Atom]]
) -> Iterator[tuple[Term | None, tuple[Equation, ...]]]:
    """A value as a sum of products, or as a sum, of what is before it.

    None: there are products before it, whose sum it is not.

    First of what is as far before as can be; then of what joins several values; then of
    what adds several. Of what has a name, if that is between. With the equations.
    """
    met: set[str] = set()
    reduces = out.producer is not None and not traits(out.producer).addition
    stops = {"": set(), "joins": {"joins"}, "adds": {"joins", "adds"}}
    for kind, stop in stops.items():
        if kind and kind not in met:
            continue
        if kind == "adds" and not reduces:
            continue
        for products in (True, False):
            for apart in (set[Atom](), None):
                walk = _Walk(terms, out, products, stop, met)
                walk.apart = names() if apart is None else apart
                term = walk.term()
                if term is None:
                    if walk.multiplied:
                        yield None, ()
                    break
                starts = [f.root for f in term.factors]
                equations = between(starts, [out], terms.program.active.__contains__)[0]  # type: ignore
                made = {v for e in equations for v in e.outputs} - {out}
                if _is_plain(equations) or names().isdisjoint(made):
                    yield term, equations
                    break


def _may_sum(terms: Terms, equation: Equation) -> bool:
    """Whether a sum that is written out may end with an equation."""
    program = terms.program
    if equation.primitive in terms.opaque or len(equation.outputs) != 1:
        return False
    (out,) = equation.outputs
    if out not in program.active:
        return False
    if equation.primitive is p.reduce_window_sum_p:
        return covered(equation) is not None
    if equation.primitive in (p.reduce_sum_p, p.concatenate_p):
        return True
    if may_be_other(program, equation):
        return True
    if is_move(equation):
        (source, *_) = equation.inputs
        made = source.producer if isinstance(source, Value) else None
        return made is not None and made.primitive is p.cumsum_p
    return traits(equation).addition and len(program.active_inputs(equation)) == 2


def _is_flat(program: Program, equation: Equation) -> bool:
    """Whether nothing that a sum over axes, or of two values, adds up is a sum, a
    product or moved: then it is as it is, and no walk is needed to see it."""
    if equation.primitive is not p.reduce_sum_p and not traits(equation).addition:
        return False
    for value in program.active_inputs(equation):
        made = value.producer
        if made is None:
            continue
        if is_move(made):
            return False
        of_several = made.primitive in (p.mul_p, p.dot_general_p)
        if program.used_once(value) and (of_several or _adds(program, made)):
            return False
    return True


def _is_plain(equations: Sequence[Equation]) -> bool:
    """Whether it is one equation that computes, and moves."""
    made = [e for e in equations if not is_move(e)]
    written = made[0].primitive in (p.reduce_window_sum_p, p.cumsum_p)
    return len(made) == 1 and not written


def _is_halved(program: Program, out: Value) -> bool:
    """Whether it is an addition of two that are averaged: a mean, as of three."""
    adds = out.producer is not None and traits(out.producer).addition
    if not adds or not program.used_once(out):
        return False
    (halved,) = program.uses[out]
    others = [a for a in halved.inputs if a is not out]
    number = scalar_of(others[0]) if len(others) == 1 else None
    half = 2.0 if halved.primitive is p.div_p and halved.inputs[0] is out else 0.5
    return traits(halved).scaling and np.all(number == half)  # type: ignore


@dataclass
class _Walk:
    """A walk back from a value through what adds and moves.

    Attributes:
      products: whether it ends at the factors of products that are added up.
      stop: whether it ends at what ``joins`` or ``adds`` several values.
      met: which of these it met.
      apart: values that it ends at.
      multiplied: whether it came to a product.
    """

    terms: Terms
    out: Value
    products: bool
    stop: Set[str]
    met: set[str]
    apart: Set[Atom] = frozenset()
    multiplied: bool = False

    def term(self) -> Term | None:
        """The value as one sum of another one, or as a product of two."""
        leaves = self.leaves()
        if leaves is None or (len(leaves) > 1 and not self.multiplied):
            return None
        given = {leaf: itself(leaf) for leaf in leaves}
        assumed = self.terms.assuming(given, through=True)
        term = assumed.closed(assumed.read(self.out)).only
        if term is None or term.coefficient != 1:
            return None
        if not term.inner and len(term.factors) < 2:
            return None
        roots = [f.root for f in term.factors]
        plain = all(f.power == 1 and _is_number(f.root, self.out) for f in term.factors)
        return term if plain and set(roots) == leaves else None

    def leaves(self) -> set[Value] | None:
        """What the value adds up, or the factors of the products that it adds up."""
        program, found = self.terms.program, set[Value]()
        stack = [(self.out, False)]
        while stack:
            value, added = stack.pop()
            made = value.producer
            inside = value is self.out or program.used_once(value)
            if made is None or made.primitive in self.terms.opaque:
                found.add(value)
            elif value in self.apart and value is not self.out:
                found.add(value)
            elif self.products and inside and (of := self.factors(made, added)):
                found.update(of)
                self.multiplied = True
            elif is_move(made) or (inside and _adds(program, made)):
                before = program.active_inputs(made)
                if len(before) > 1 and value is not self.out and self.ends(made):
                    found.add(value)
                    continue
                added = added or not is_move(made)
                stack += [(a, added) for a in before]
            else:
                found.add(value)
            if len(found) > 2:
                return None
        return found

    def ends(self, equation: Equation) -> bool:
        """Whether the walk ends at an equation of several values."""
        kind = "joins" if is_move(equation) else "adds"
        self.met.add(kind)
        return kind in self.stop

    def factors(self, equation: Equation, added: bool) -> list[Value]:
        """The two factors of a product of active values, or of one and a parameter.

        Learned maps that are ``added`` stay several, each with its kernel.
        """
        if equation.primitive not in (p.mul_p, p.dot_general_p):
            return []
        before = [self.before_moves(a) for a in equation.inputs]
        roots = [root for root in before if root is not None]
        still = [root for root in roots if not self.terms.program.is_active(root)]
        kernels = all(map(self.is_kernel, still))
        several = bool(still) and added and equation.primitive is p.dot_general_p
        return roots if len(roots) == 2 > len(still) and kernels and not several else []

    def is_kernel(self, root: Value) -> bool:
        """Whether a constant weighs what is summed: learned, or a map that is fixed."""
        inexact = np.issubdtype(root.dtype, np.inexact)
        return bool(inexact) and self.terms.program.is_parameter(root)

    def before_moves(self, atom: Atom) -> Value | None:
        """What an atom was before it was moved; the last value that is ``apart``."""
        found = self.terms.before_moves(atom)
        if found is None or not isinstance(atom, Value):
            return None
        (root, _), value = found, atom
        while value is not root and value not in self.apart:
            made = value.producer
            if made is None or not is_move(made):
                return root
            before = [a for a in made.inputs if isinstance(a, Value)]
            if len(before) != 1:
                return root
            (value,) = before
        return value


def _adds(program: Program, equation: Equation) -> bool:
    prim = equation.primitive
    if prim in (p.reduce_sum_p, p.cumsum_p):
        return True
    if prim is p.reduce_window_sum_p:
        return covered(equation) is not None
    still = [a for a in equation.inputs if not program.is_active(a)]
    return traits(equation).addition and all(scalar_of(a) == 0 for a in still)


def _is_number(root: Root, like: Value) -> bool:
    return isinstance(root, Value) and root.dtype == like.dtype


# The equations that stand.


def _standing(
    program: Program, term: Term, like: Equation, out: Value
) -> list[Equation] | None:
    digits = _digits(term)
    if digits is None:
        return None
    n = len(digits) - len(term.inner)
    if len(term.factors) == 1:
        function = _sum(term.factors[0], digits, n, out)
    else:
        active = [f.root in program.active for f in term.factors]
        function = _contraction(term.factors, active, digits, n, out)
    if function is None:
        return None
    return standing_for(out, function, [f.root for f in term.factors], like)


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


def _contraction(
    factors: Sequence[Factor],
    active: Sequence[bool],
    digits: Digits,
    n: int,
    out: Value,
) -> Any:
    """Their contraction. What a layer reads copies of is copied before it is mapped."""
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
    copied = [k for k in range(n) if all(k not in at for at in axes)]
    copied, mapped = [] if all(active) else copied, int(not active[0])
    axes[mapped] = [*copied, *axes[mapped]]
    summed = range(n, len(digits))
    both = [k for k in axes[0] if k in axes[1] and k < n]
    free = [[k for k in axes[i] if k not in axes[1 - i]] for i in (0, 1)]
    numbers = tuple(
        tuple(tuple(at.index(k) for k in ks) for at in axes) for ks in (summed, both)
    )

    def contracted(a: Array, b: Array) -> Array:
        x = [cuts[0](a), cuts[1](b)]
        if copied:
            sizes = [digits[k][0] for k in copied]
            x[mapped] = lax.broadcast(x[mapped], sizes)
        if not summed:
            return lax.mul(*(_laid_out(x[i], axes[i], digits, n, out) for i in (0, 1)))
        y = lax.dot_general(*x, numbers)  # type: ignore[arg-type]
        return _laid_out(y, [*both, *free[0], *free[1]], digits, n, out)

    return contracted

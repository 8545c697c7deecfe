"""Late division: ``exp(s) @ v / sum exp(s)`` is ``softmax(s) @ v``.

The weights of such an average are a value that no equation computes. Equations that
stand for those of the program make it, and the average from it: they are run for rules
that read what they make, never in the forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax
from jax import lax
from jax.extend.core import primitives as p

from jlrp.analysis.terms import Reading, Terms, moves_all
from jlrp.ir import jax_compat
from jlrp.ir.program import Equation, Program, Value, append, between
from jlrp.ops.softmax import Softmaxes

_PRODUCTS = (p.dot_general_p, p.mul_p)


def stand_in(terms: Terms, softmaxes: Softmaxes) -> list[Equation]:
    """Let early divisions stand for the late ones of a program; their equations."""
    program = terms.program
    found = []
    for equation in program.equations:
        if equation.primitive is not p.div_p or equation.primitive in terms.opaque:
            continue
        if not all(map(program.is_active, equation.inputs)):
            continue
        found += _early(terms, softmaxes, equation) or []
    return found


def _early(
    terms: Terms, softmaxes: Softmaxes, quotient: Equation
) -> list[Equation] | None:
    program, (out,) = terms.program, quotient.outputs
    numerator, divisor = quotient.inputs
    assert isinstance(numerator, Value) and isinstance(divisor, Value)
    average = _average(program, numerator)
    if average is None or softmaxes.ending_at(out) is not None:
        return None
    terms.read(divisor)
    total = terms.beside(divisor, out)
    if total.only is not None and not total.terms[0].inner:
        term = total.terms[0]  # a value that was summed before
        total = terms.expanded(term.factors[0]) if len(term.factors) == 1 else None
    if total is None:
        return None
    constant, total = total.constant, terms.closed(terms.active(total))
    if len(total.terms) != 1 or not total.terms[0].inner:
        return None
    a, b = average.inputs
    for weights, values in ((a, b), (b, a)):
        if not isinstance(weights, Value) or not isinstance(values, Value):
            continue
        if not program.is_active(weights):
            continue
        one = Reading(tuple(values.shape), (), 1.0)
        assumed = terms.assuming({values: one})
        assumed.read(numerator)
        summed = terms.closed(assumed.beside(numerator, out))
        if summed != total or weights is values:
            continue
        axes = softmaxes.summed_axes(weights, total.terms[0])
        if axes:
            return _standing(softmaxes, quotient, weights, axes, constant)
    return None


def _average(program: Program, value: Value) -> Equation | None:
    """The product of weights and values that a numerator is the sum of."""
    while (made := value.producer) is not None and program.used_once(value):
        if made.primitive in _PRODUCTS:
            return made
        if not moves_all(made) and made.primitive is not p.reduce_sum_p:
            return None
        (value,) = program.active_inputs(made)
    return None


def _standing(
    softmaxes: Softmaxes,
    quotient: Equation,
    weights: Value,
    axes: Iterable[int],
    constant: float,
) -> list[Equation] | None:
    """Weights that are divided by their sum, the average of them, and its name."""
    program, axes = softmaxes.program, tuple(axes)
    numerator, (out,) = quotient.inputs[0], quotient.outputs
    assert isinstance(numerator, Value)

    def softmax(w: Any) -> Any:
        total = lax.reduce_sum(w, axes)
        if constant:
            total = lax.add(total, lax.full_like(total, constant))
        kept = [i for i in range(w.ndim) if i not in axes]
        return lax.div(w, lax.broadcast_in_dim(total, w.shape, kept))

    shape = jax.ShapeDtypeStruct(weights.shape, weights.dtype)
    jaxpr, _ = jax_compat.open_jaxpr(jax.make_jaxpr(softmax)(shape))
    scratch = Program([], (), (), {})
    (divided,) = append(scratch, jaxpr, (), {jaxpr.invars[0]: weights})
    made = list(scratch.equations)
    renamed: dict[Any, Any] = {weights: divided}
    for equation in between([weights], [numerator], program.active.__contains__)[0]:
        copy = replace(
            equation,
            inputs=tuple(renamed.get(a, a) for a in equation.inputs),
            outputs=tuple(Value(v.aval) for v in equation.outputs),
        )
        renamed.update(zip(equation.outputs, copy.outputs, strict=True))
        made.append(copy)
    end = renamed[numerator]
    if end.shape != out.shape:
        return None
    name = replace(quotient, primitive=p.copy_p, params={}, inputs=(end,))
    # Between the quotient and what is before it: positions say what comes first.
    step = 1 / (len(made) + 1)
    for k, equation in enumerate((*made, name)):
        last = equation is name
        behind = 0 if last else (k + 1) * step - 1
        equation.position = quotient.position + behind  # type: ignore[assignment]
        equation.scope, equation.regions = quotient.scope, quotient.regions
        equation.source_infos = quotient.source_infos
        if not last:
            for value in equation.outputs:
                value.producer = equation
    virtual = [v for e in made for v in e.outputs]
    program.virtual.update(virtual)
    program.active |= set(virtual)
    for equation in (*made, name):
        for atom in equation.inputs:
            if atom in program.virtual:
                program.uses.setdefault(atom, []).append(equation)
    if not isinstance(divided, Value) or not softmaxes.are_weights(divided):
        program.active -= set(virtual)
        program.virtual.difference_update(virtual)
        return None
    program.standing[out] = name
    return made

"""Late division: ``exp(s) @ v / sum exp(s)`` is ``softmax(s) @ v``.

The weights of such an average are a value that no equation computes: equations that
stand for those of the program make it, and the average from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

from jax import lax
from jax.extend.core import primitives as p

from jlrp.analysis.terms import Reading, Terms, moves_all, varying_axes
from jlrp.ir import jax_compat
from jlrp.ir.program import Equation, Program, Value, between
from jlrp.ops.affine import is_core
from jlrp.ops.contraction import axes_in_output
from jlrp.ops.softmax import Softmaxes
from jlrp.ops.standing import OtherWords, equations_of, standing_for

_PRODUCTS = (p.dot_general_p, p.mul_p)


class LateDivisions(OtherWords):
    """Late divisions, as early ones."""

    @cached_property
    def softmaxes(self) -> Softmaxes:
        return Softmaxes(Terms(self.program, self.opaque))

    def found(self) -> Iterator[tuple[Value, list[Equation]]]:
        """Quotients, and the equations of the averages that stand for each."""
        program = self.program
        for equation in program.equations:
            if equation.primitive is not p.div_p or equation.primitive in self.opaque:
                continue
            if not all(map(program.is_active, equation.inputs)):
                continue
            if standing := self._early(equation) or self._before_layer(equation):
                yield equation.outputs[0], standing

    def _before_layer(self, quotient: Equation) -> list[Equation] | None:
        """For an average that a layer reads before it is divided: ``(n @ w) / s``."""
        program, (out,) = self.program, quotient.outputs
        numerator, divisor = quotient.inputs
        layer = self.made(numerator, p.dot_general_p)
        if layer is None or not is_core(program, layer) or numerator in self.named:
            return None
        i = next(i for i, a in enumerate(layer.inputs) if program.is_active(a))
        n, kernel = layer.inputs[i], layer.inputs[1 - i]
        if not program.used_once(numerator) or _average(program, n) is None:  # type: ignore[arg-type]
            return None
        places = axes_in_output(layer, i)
        learned = [k for k in range(len(out.shape)) if k not in places.values()]
        self.softmaxes.terms.read(divisor)  # type: ignore[arg-type]
        along = varying_axes(self.softmaxes.terms.beside(divisor, out))
        if not along.isdisjoint(learned):
            return None

        def divided(n: Any, kernel: Any, divisor: Any) -> Any:
            for k in learned:
                divisor = lax.slice_in_dim(divisor, 0, 1, axis=k)
            divisor = lax.squeeze(divisor, learned)
            free = sorted(places, key=places.__getitem__)
            order = sorted(range(len(free)), key=free.__getitem__)
            divisor = lax.transpose(divisor, order)
            early = lax.div(n, lax.broadcast_in_dim(divisor, n.shape, sorted(free)))
            operands = (early, kernel) if i == 0 else (kernel, early)
            (y,) = jax_compat.bind(layer.primitive, layer.params, operands)
            return y

        return standing_for(out, divided, [n, kernel, divisor], quotient)

    def _early(self, quotient: Equation) -> list[Equation] | None:
        program, softmaxes, (out,) = self.program, self.softmaxes, quotient.outputs
        numerator, divisor = quotient.inputs
        assert isinstance(numerator, Value) and isinstance(divisor, Value)
        if numerator.shape != out.shape:
            return None
        average = _average(program, numerator)
        if average is None or softmaxes.ending_at(out) is not None:
            return None
        terms = softmaxes.terms
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
            summed = terms.closed(assumed.read(numerator))
            if summed != total or weights is values:
                continue
            axes = softmaxes.exponentials.summed_axes(weights, total.terms[0])
            if axes:
                return self._divided_early(quotient, weights, axes, constant)
        return None

    def _divided_early(
        self, quotient: Equation, weights: Value, axes: Iterable[int], constant: float
    ) -> list[Equation] | None:
        """Weights that are divided by their sum, and the average of them."""
        program, axes, (out,) = self.program, tuple(axes), quotient.outputs
        numerator = quotient.inputs[0]
        assert isinstance(numerator, Value)

        def softmax(w: Any) -> Any:
            total = lax.reduce_sum(w, axes)
            if constant:
                total = lax.add(total, lax.full_like(total, constant))
            kept = [i for i in range(w.ndim) if i not in axes]
            return lax.div(w, lax.broadcast_in_dim(total, w.shape, kept))

        made, (divided,) = equations_of(softmax, [weights], quotient)
        if not self._are_weights(divided, made):
            return None
        renamed: dict[Any, Any] = {weights: divided, numerator: out}
        for equation in between([weights], [numerator], program.active.__contains__)[0]:
            for value in equation.outputs:
                renamed.setdefault(value, Value(value.aval))
            copy = replace(
                equation,
                inputs=tuple(renamed.get(a, a) for a in equation.inputs),
                outputs=tuple(renamed[v] for v in equation.outputs),
                position=quotient.position,
                scope=quotient.scope,
                regions=quotient.regions,
                source_infos=quotient.source_infos,
            )
            made.append(copy)
        return made

    def _are_weights(self, divided: Value, made: Iterable[Equation]) -> bool:
        """Whether a value that some equations are to make is a softmax."""
        program, virtual = self.program, {v for e in made for v in e.outputs}
        active, program.active = program.active, program.active | virtual
        found = self.softmaxes.are_weights(divided)
        program.active = active
        return found


def _average(program: Program, value: Value) -> Equation | None:
    """The product of weights and values that a numerator is the sum of."""
    alone = program.used_once(value) or _is_divided_always(program, value)
    while (made := value.producer) is not None and alone:
        if made.primitive in _PRODUCTS:
            return made
        if not moves_all(made) and made.primitive is not p.reduce_sum_p:
            return None
        (value,) = program.active_inputs(made)
        alone = program.used_once(value)
    return None


def _is_divided_always(program: Program, value: Value) -> bool:
    """Whether all that reads a value divides it, now or behind a layer."""
    uses = program.uses.get(value, ())
    kept_apart = value in program.explained or value in program.boundaries
    return not kept_apart and all(
        is_core(program, use) or (use.primitive is p.div_p and use.inputs[0] is value)
        for use in uses
    )

"""Constants of a layer, read behind it: the scale of a kernel, the bias of a sum.

``x @ (2 * w)`` is ``(x @ w) * 2``: a number that scales the kernel is one that scales
the output, which may be the beginning of an activation. So is a number that scales a
layer before a contraction: ``(x @ w * 2) @ y`` is ``(x @ w @ y) * 2``.
``(a + x @ w) + b`` is ``a + (x @ w + b)``, if of what is added one value alone comes
from a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from jlrp.analysis.intervals import scalar_of
from jlrp.analysis.terms import Terms, moves_all
from jlrp.ir import jax_compat
from jlrp.ir.primitives import traits
from jlrp.ir.program import Atom, Equation, Value
from jlrp.ops.affine import core_of, is_core, scale_chain, start_of
from jlrp.ops.standing import OtherWords, standing_for

Array = Any
_Reading = Callable[[Equation], list[Equation] | None]


class _Scale(NamedTuple):
    source: Value
    number: Any
    divides: bool


class Layers(OtherWords):
    """Layers whose constants are elsewhere, with these where a layer has them."""

    @cached_property
    def terms(self) -> Terms:
        return Terms(self.program, self.opaque)

    def found(self) -> Iterator[tuple[Value, list[Equation]]]:
        """Values, and the equations that stand for what makes each.

        Scaled kernels first: a number that undoes such a scale is not moved elsewhere.
        """
        kernels = list(self._each(self._scaled, lambda addition: None))
        yield from kernels or self._each(self._of_scaled, self._biased)

    def _each(
        self, of_contraction: _Reading, of_addition: _Reading
    ) -> Iterator[tuple[Value, list[Equation]]]:
        inside: set[Atom] = set()
        for equation in reversed(self.program.equations):
            (out, *others) = equation.outputs
            if others or out in inside or out not in self.program.active:
                continue
            if equation.primitive in self.opaque:
                continue
            if traits(equation).contraction:
                standing = of_contraction(equation)
            elif equation.primitive in (p.add_p, p.sub_p):
                standing = of_addition(equation)
                if standing is not None:
                    inside.update(equation.inputs)
            else:
                continue
            if standing is not None:
                (end,) = standing[-1].outputs
                yield end, standing

    def _scaled(self, layer: Equation) -> list[Equation] | None:
        """For ``x @ (w * c)``."""
        if not is_core(self.program, layer):
            return None
        k = next(i for i, a in enumerate(layer.inputs) if not self.program.is_active(a))
        kernel, number = _unscaled(layer.inputs[k])
        x, (out,) = layer.inputs[1 - k], layer.outputs
        if number == 1 or layer.inputs[k] in self.named or out in self.named:
            return None

        def applied(x: Array, w: Array) -> Array:
            operands = (w, x) if k == 0 else (x, w)
            (y,) = jax_compat.bind(layer.primitive, layer.params, operands)
            return y if undone else lax.mul(y, lax.full_like(y, number))

        undone = self._undoes(out, number)  # then it is the plain layer
        return standing_for(undone or out, applied, [x, kernel], layer)

    def _undoes(self, value: Value, number: float) -> Value | None:
        """What a value is once it is scaled back, if nothing else is done with it."""
        if not self.program.used_once(value):
            return None
        (use,) = self.program.uses[value]
        if use.primitive not in (p.div_p, p.mul_p) or use.primitive in self.opaque:
            return None
        place = use.inputs.index(value)
        known: Any = scalar_of(use.inputs[1 - place])
        if known is None or np.iscomplexobj(known):
            return None
        divides = use.primitive is p.div_p
        if divides and place == 1:
            return None
        (end,) = use.outputs
        back = number == float(known) if divides else number * float(known) == 1
        return end if back and end not in self.named else None

    def _of_scaled(self, contraction: Equation) -> list[Equation] | None:
        """For ``(x @ w * c) @ y``."""
        (out,) = contraction.outputs
        if out in self.named:
            return None
        for k, atom in enumerate(contraction.inputs):
            moves: list[Equation] = []
            value = atom
            while isinstance(value, Value) and self.program.used_once(value):
                made = value.producer
                if made is None or not moves_all(made) or made.primitive in self.opaque:
                    break
                moves.append(made)
                (value, *_) = made.inputs
            scale = self._scale(value)
            if scale is None or not self.named.isdisjoint(
                {value, *(v for e in moves for v in e.outputs)}
            ):
                continue
            return _moved_behind(contraction, k, moves[::-1], scale)
        return None

    def _scale(self, value: Atom) -> _Scale | None:
        """How a number scales a layer to make a value, which nothing else reads."""
        if not isinstance(value, Value) or not self.program.used_once(value):
            return None
        made = value.producer
        if made is None or made.primitive not in (p.div_p, p.mul_p):
            return None
        if made.primitive in self.opaque or len(self.program.active_inputs(made)) != 1:
            return None
        (source,) = self.program.active_inputs(made)
        numbers = [a for a in made.inputs if a is not source]
        divides = made.primitive is p.div_p
        if len(numbers) != 1 or (divides and made.inputs[1] is source):
            return None
        number: Any = scalar_of(numbers[0])
        if number is None or np.ndim(number) or not self._is_layer(source):
            return None
        return _Scale(source, number, divides)

    def _biased(self, addition: Equation) -> list[Equation] | None:
        """For ``(a + x @ w) + b``."""
        program = self.program
        operands = program.active_inputs(addition)
        if len(operands) != 1:
            return None
        (total,) = operands
        place = addition.inputs.index(total)
        bias, made = addition.inputs[1 - place], total.producer
        if made is None or made.primitive not in (p.add_p, p.sub_p):
            return None
        if not isinstance(bias, Value) or not program.is_parameter(bias):
            return None
        if scalar_of(bias) is not None or not program.used_once(total):
            return None
        if made.primitive in self.opaque or total in self.named:
            return None
        if len(program.active_inputs(made)) != 2:
            return None
        layers = [self._is_layer(a) for a in made.inputs]
        if sum(layers) != 1:
            return None
        at = layers.index(True)
        rest, layer = made.inputs[1 - at], made.inputs[at]
        # The signs of the rest, the layer and the bias in the sum.
        whole = -1 if addition.primitive is p.sub_p and place == 1 else 1
        of_bias = -1 if addition.primitive is p.sub_p and place == 0 else 1
        second = -1 if made.primitive is p.sub_p else 1
        of_rest, of_layer = (1, second) if at == 1 else (second, 1)
        signs = whole * of_rest, whole * of_layer, of_bias

        def summed(rest: Array, layer: Array, bias: Array) -> Array:
            inner = p.add_p if signs[1] == signs[2] else p.sub_p
            (layer,) = jax_compat.bind(
                inner, {}, [layer, bias]
            )  # repeated along axes of size 1
            if signs[0] == signs[1]:
                total = lax.add(rest, layer)
                return total if signs[0] == 1 else lax.neg(total)
            return lax.sub(rest, layer) if signs[0] == 1 else lax.sub(layer, rest)

        (out,) = addition.outputs
        if not rest.shape == layer.shape == out.shape:
            return None
        return standing_for(out, summed, [rest, layer, bias], addition)

    def _is_layer(self, atom: Atom) -> bool:
        """Whether a value comes from a layer, and nothing else reads it."""
        if not isinstance(atom, Value) or not self.program.used_once(atom):
            return False
        steps = scale_chain(self.terms, atom)
        start = start_of(self.terms, steps) if steps else atom
        while start.producer is not None and moves_all(start.producer):
            (before, *_) = start.producer.inputs
            if not isinstance(before, Value) or not self.program.used_once(before):
                return False
            start = before
        return core_of(self.terms, start) is not None


def _unscaled(kernel: Atom) -> tuple[Atom, float]:
    """A kernel without the numbers that scale it, and their product."""
    number = 1.0
    while isinstance(kernel, Value) and (made := kernel.producer) is not None:
        if made.primitive is p.neg_p or made.primitive not in (p.mul_p, p.div_p):
            break
        known: list[Any] = [scalar_of(a) for a in made.inputs]
        if made.primitive is p.div_p:
            known[0] = None
        at = next((i for i in (1, 0) if known[i] is not None), None)
        if at is None or np.iscomplexobj(known[at]) or not known[at]:
            break
        if made.inputs[1 - at].shape != kernel.shape:
            break
        scale = float(known[at])
        number *= scale if made.primitive is p.mul_p else 1 / scale
        kernel = made.inputs[1 - at]
    return (kernel, number) if np.isfinite(number) else (kernel, 1.0)


def _moved_behind(
    contraction: Equation, k: int, moves: list[Equation], scale: _Scale
) -> list[Equation]:
    def applied(x: Array, other: Array) -> Array:
        for move in moves:
            (x,) = jax_compat.bind(move.primitive, move.params, [x])
        operands = (x, other) if k == 0 else (other, x)
        (y,) = jax_compat.bind(contraction.primitive, contraction.params, operands)
        wide = lax.full_like(y, scale.number)
        return lax.div(y, wide) if scale.divides else lax.mul(y, wide)

    operands = [scale.source, contraction.inputs[1 - k]]
    return standing_for(contraction.outputs[0], applied, operands, contraction)

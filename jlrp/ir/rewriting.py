"""Writing a program again, with floats in place of narrow numbers.

The engine explains floats. Where integers (or 8-bit floats) stand for numbers, the
program is written again: each equation that computes with them gets a *float twin*, the
same primitive on floats, and what reads the numbers reads the twin. Indices, masks and
comparisons go on reading the originals; what nothing reads any more is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import jax
import numpy as np
from jax import lax
from jax.extend.core import primitives as p

from jlrp.ir import jax_compat
from jlrp.ir.jax_compat import Aval, JaxAtom
from jlrp.ir.primitives import traits
from jlrp.ir.program import Atom, Equation, Literal, Program, Value, append, reaching
from jlrp.typing import Array, DTypeLike, PyTree


def computes_numbers(equation: Equation) -> bool:
    """Whether it computes the same with floats as with integers."""
    return traits(equation).arithmetic


def number_operands(equation: Equation) -> list[int]:
    """The positions of the operands whose numbers go into the output."""
    steering = traits(equation).steering
    return [i for i in range(len(equation.inputs)) if i not in steering]


def is_narrow(atom: Aval) -> bool:
    """Whether an atom holds integers, booleans or floats of at most 8 bits."""
    if jax_compat.is_key(atom.dtype):
        return False
    return not jax_compat.is_inexact(atom) or np.dtype(atom.dtype).itemsize == 1


class Rewriting:
    """A program that is written again, equation by equation, in place.

    Attributes:
      twins: the float twins of narrow values.
      renamed: what is read in place of a value.
    """

    def __init__(self, program: Program, dtype: DTypeLike = np.float32):
        self.program, self.dtype = program, np.dtype(dtype)
        self.new = replace(program, equations=[])
        self.twins: dict[Atom, Value] = {}
        self.renamed: dict[Value, Atom] = {}

    def run(self) -> None:
        for equation in self.program.equations:
            self.visit(self.keep(equation))
        if not self.renamed and self.new.equations == self.program.equations:
            return
        outputs = tuple(map(self.now, self.program.outputs))
        self.program.outputs = outputs
        self.program.equations = reaching(self.new.equations, outputs)
        for name, atoms in self.program.tags.items():
            self.program.tags[name] = [self.now(a) for a in atoms]

    def visit(self, kept: Equation) -> None:
        self.compute_with_twins(kept)

    def now(self, atom: Atom) -> Atom:
        return self.renamed.get(atom, atom)  # type: ignore[arg-type]

    def keep(self, equation: Equation) -> Equation:
        """The equation in the new program, reading what is read now."""
        kept = equation
        if not self.renamed.keys().isdisjoint(equation.inputs):
            kept = replace(equation, inputs=tuple(map(self.now, equation.inputs)))
            for value in kept.outputs:
                value.producer, value.interval = kept, None
        kept.position = len(self.new.equations)
        self.new.equations.append(kept)
        return kept

    def insert(
        self, like: Equation | None, function: Callable[..., PyTree], *atoms: Atom
    ) -> tuple[Atom, ...]:
        """Append ``function`` of some atoms, under the name and line of an equation."""
        values = [a for a in atoms if isinstance(a, Value)]

        def of_values(*arrays: Array) -> PyTree:
            given = iter(arrays)
            return function(
                *(a.number if isinstance(a, Literal) else next(given) for a in atoms)
            )

        shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in values]
        jaxpr, consts = jax_compat.open_jaxpr(jax.make_jaxpr(of_values)(*shapes))
        env: dict[JaxAtom, Atom] = dict(zip(jaxpr.invars, values, strict=True))
        first = len(self.new.equations)
        outs = append(self.new, jaxpr, consts, env)
        for equation in self.new.equations[first:]:
            if like is not None:
                equation.scope, equation.source_infos = like.scope, like.source_infos
                equation.regions = like.regions
        return outs

    def as_float(
        self, like: Equation | None, atom: Atom, dtype: np.dtype | None = None
    ) -> Atom:
        """The float twin of an atom; what has none is converted."""
        dtype = dtype or self.dtype
        atom = self.twins.get(atom, atom)
        if atom.dtype == dtype:
            return atom
        (out,) = self.insert(like, lambda x: lax.convert_element_type(x, dtype), atom)
        return out

    def compute_with_twins(self, kept: Equation) -> bool:
        """Give an equation that computes with twins its own twin, or replace it."""
        numbers = [i for i in number_operands(kept) if kept.inputs[i] in self.twins]
        if not numbers or not computes_numbers(kept):
            return False
        dtype = self._dtype_of(kept, numbers)
        args = [
            self.as_float(kept, a, dtype) if i in number_operands(kept) else a
            for i, a in enumerate(kept.inputs)
        ]
        if kept.primitive is p.convert_element_type_p:
            outs = (args[0],)
        else:
            params = jax_compat.with_dtype(kept.params, dtype)
            outs = self.insert(
                kept, lambda *x: jax_compat.bind(kept.primitive, params, x), *args
            )
        for value, out in zip(kept.outputs, outs, strict=True):
            if is_narrow(value):
                self.twins[value] = out  # type: ignore[assignment]
            else:
                self.renamed[value] = out
        return True

    def _dtype_of(self, kept: Equation, numbers: Iterable[int]) -> np.dtype:
        """That of a float output, else the widest of the twins."""
        (out, *_) = kept.outputs
        if not is_narrow(out):
            return out.dtype
        dtypes = [self.twins[kept.inputs[i]].dtype for i in numbers]
        return np.result_type(*dtypes)

"""Functions with a derivative of their own: looked into, or one operation.

A ``custom_jvp`` or ``custom_vjp`` is its body, like any call. It is kept whole, and
explained by first-order Taylor with the derivative that the user declared, where the
body does not say how its output depends on its operands: around an opaque kernel, and
around a straight-through estimator, whose body is piecewise constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jax.extend.core import Primitive
from jax.extend.core import primitives as p

from jlrp.ir import jax_compat
from jlrp.ir.jax_compat import JaxAtom, Jaxpr, JaxprEqn
from jlrp.ir.primitives import traits


@dataclass(frozen=True)
class Declared:
    """Which declared derivatives are taken in place of the body.

    Attributes:
      kernels: names of primitives: a derivative around one of them is taken.
      stops: the primitives that carry no relevance: a derivative is taken that goes on
        where all paths of the body end at them.
      always: every declared derivative is taken, as gradient times input does.
    """

    kernels: frozenset[str] = frozenset()
    stops: frozenset[Primitive] = frozenset()
    always: bool = False

    def of_kernels(self) -> Declared:
        """Only the derivatives around kernels, which cannot be looked into."""
        return Declared(self.kernels)

    def keeps(self, eqn: JaxprEqn) -> bool:
        """Whether a call is one operation, with the derivative declared for it."""
        if not traits(eqn).has_derivative:
            return False
        if self.always or jax_compat.derives(eqn, self.kernels):
            return True
        return bool(self.stops) and self._goes_on_where_the_body_ends(eqn)

    def _goes_on_where_the_body_ends(self, eqn: JaxprEqn) -> bool:
        jaxpr, _ = jax_compat.open_jaxpr(eqn.params["call_jaxpr"])
        if not self._may_stop(jaxpr):
            return False
        ends = [i for i, v in enumerate(jaxpr.invars) if self._ends(jaxpr, i, v)]
        return bool(ends) and any(jax_compat.uses_cotangent(eqn)[i] for i in ends)

    def _may_stop(self, jaxpr: Jaxpr) -> bool:
        return any(
            self._is_stop(eqn)
            or any(map(self._may_stop, jax_compat.jaxprs_in_params(eqn.params)))
            for eqn in jaxpr.eqns
        )

    def _is_stop(self, eqn: JaxprEqn) -> bool:
        if eqn.primitive in self.stops:
            return True
        to_integers = eqn.primitive is p.convert_element_type_p
        return to_integers and not any(
            jax_compat.is_inexact(v.aval) for v in eqn.outvars
        )

    def _ends(self, jaxpr: Jaxpr, index: int, operand: JaxAtom) -> bool:
        """Whether an operand reaches float outputs, but on no path that carries."""
        if not jax_compat.is_inexact(operand.aval):
            return False
        flags = [_CARRIED * (i == index) for i in range(len(jaxpr.invars))]
        floats = [jax_compat.is_inexact(a.aval) for a in jaxpr.outvars]

        def reaches(carrying: bool) -> bool:
            found = self._flow(jaxpr, flags, carrying)
            return any(n == _CARRIED and f for n, f in zip(found, floats, strict=True))

        return reaches(carrying=False) and not reaches(carrying=True)

    def _flow(self, jaxpr: Jaxpr, flags: Sequence[int], carrying: bool) -> list[int]:
        """How the outputs depend on flagged inputs, or do on paths that carry.

        A rounded number carries again when it is cast to integers: those of a quantised
        layer, which stand for floats (``quantised``).
        """
        found: dict[JaxAtom, int] = {
            v: n for v, n in zip(jaxpr.invars, flags, strict=True) if n
        }

        def level(atom: JaxAtom) -> int:
            return _NOT if jax_compat.is_literal(atom) else found.get(atom, _NOT)

        for eqn in jaxpr.eqns:
            operands = [level(a) for a in eqn.invars]
            if not any(operands):
                continue
            call = jax_compat.call_body(eqn)
            if call is not None and not (carrying and self.keeps(eqn)):
                outs = self._flow(call[0], operands, carrying)
            elif carrying:
                outs = [self._behind(eqn, operands)] * len(eqn.outvars)
            else:
                outs = [_CARRIED] * len(eqn.outvars)
            found.update({v: n for v, n in zip(eqn.outvars, outs, strict=True) if n})
        return [level(a) for a in jaxpr.outvars]

    def _behind(self, eqn: JaxprEqn, operands: Sequence[int]) -> int:
        prim, highest = eqn.primitive, max(operands)
        row = traits(eqn)
        if row.rounding and prim in self.stops:
            return _ROUNDED
        to_integers = not any(jax_compat.is_inexact(v.aval) for v in eqn.outvars)
        if prim in self.stops or (row.fetches and operands[0] < _CARRIED):
            return _NOT
        if to_integers and prim is p.convert_element_type_p:
            from_floats = jax_compat.is_inexact(eqn.invars[0].aval)
            return _CARRIED if highest == _ROUNDED or not from_floats else _NOT
        return highest


_NOT, _ROUNDED, _CARRIED = range(3)

LOOKED_INTO = Declared()

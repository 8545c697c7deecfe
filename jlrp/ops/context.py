"""What rules and operations ask for: the values of one explanation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from jlrp.ir import jax_compat
from jlrp.ir.program import (
    Atom,
    Equation,
    Literal,
    Program,
    Value,
    computing,
    evaluate,
    read,
)
from jlrp.ops.decompositions import bound, decomposition_of
from jlrp.promise import Promise, difference
from jlrp.typing import Array, PyTree

# Arrays by value; what loops record, by equation.
Residuals = dict[Any, PyTree]


class Recompute(Protocol):
    """Activations that the forward pass did not keep, made when asked for."""

    after: Array | None

    def __getitem__(self, value: Value) -> Array: ...

    def recorded(self, equation: Equation) -> PyTree:
        """What a loop's rule records when it runs."""
        ...


class Context:
    """Values, in the dtype in which relevance is computed.

    Low-precision programs are read and run again in float32 here, so that relevance
    accumulates in float32.

    Attributes:
      kept: what the forward pass kept.
      masks: of conditions, by name.
      reference: the same at the reference point, if relevance is relative to one.
    """

    def __init__(
        self,
        program: Program,
        kept: Residuals,
        recompute: Recompute,
        masks: Mapping[str, Array] | None = None,
        reference: Context | None = None,
    ):
        self.program, self.kept, self.reference = program, kept, reference
        self.masks: Mapping[str, Array] = masks or {}
        self._recompute = recompute

    def read(self, atom: Atom) -> Array:
        """The number that the atom had in the forward pass."""
        number = self.original(atom)
        if str(getattr(number, "dtype", "")) in jax_compat.LOW_PRECISION:
            number = jnp.asarray(number, jnp.float32)
        return number

    def original(self, atom: Atom) -> Array:
        """The number in the program's own dtype."""
        if isinstance(atom, Literal) or atom in self.kept:
            return jax_compat.on_device(read(self.kept, atom))
        return self._recompute[atom]

    def recorded(self, equation: Equation) -> PyTree:
        """What a loop's rule recorded in the forward pass."""
        if equation in self.kept:
            return self.kept[equation]
        return self._recompute.recorded(equation)

    def difference(self, value: Value) -> Array:
        """What multipliers are of: x - x0 with a reference, else x."""
        number = self.read(value)
        if self.reference is None:
            return number
        return difference(number, self.reference.read(value))

    @property
    def there(self) -> Context:
        """The context at the reference point, which there is."""
        assert self.reference is not None
        return self.reference

    def varies(self, atom: Atom) -> bool:
        """Whether an atom may be another one at another x."""
        return not self.program.is_parameter(atom)

    def run(
        self,
        equations: Sequence[Equation],
        constants: Sequence[Value],
        inputs: Mapping[Value, Array],
    ) -> dict[Value, Array]:
        """Every value of some equations, for other inputs."""
        env = {value: self.read(value) for value in constants}
        env.update(inputs)
        for equation in equations:
            args = [
                env[a] if isinstance(a, Value) else self.read(a)
                for a in equation.inputs
            ]
            outs = (decomposition_of(equation) or bound(equation))(*args)
            env.update(zip(equation.outputs, outs, strict=True))
        return env

    def replaced(self, numbers: Mapping[Value, Array]) -> Context:
        """The same context with other numbers for some values."""
        return self._with({**self.kept, **numbers}, self.reference)

    def with_reference(self, reference: Context | None) -> Context:
        """The same context with another reference point."""
        return self._with(self.kept, reference)

    def _with(self, kept: Residuals, reference: Context | None) -> Context:
        return type(self)(self.program, kept, self._recompute, self.masks, reference)

    # For the compiler's sake: see ``tactics``.

    @property
    def after(self) -> Array | None:
        """Relevance of the outputs: what is made of residuals alone depends on it."""
        return self._recompute.after

    def make_after(self, promises: Sequence[Promise | None]) -> None:
        """Let what is made of residuals from now on depend on these promises."""
        self._recompute.after = next(iter(jax.tree.leaves(promises)), self.after)
        if self.reference is not None:
            self.reference.make_after(promises)


def computed(
    program: Program, wanted: Sequence[Value], given: Mapping[Value, Array]
) -> dict[Value, Array]:
    """Values of a program, from its constants and those of its inputs."""
    env: dict[Value, Array] = {**program.constants, **given}
    equations, _ = computing(program, wanted, lambda _: True)
    evaluate(equations, env)
    return {v: env[v] for v in wanted}


def widened(value: Value) -> jax.ShapeDtypeStruct:
    """Shape and dtype of a value as a context reads it, and of its relevance."""
    low = str(value.dtype) in jax_compat.LOW_PRECISION
    return jax.ShapeDtypeStruct(value.shape, jnp.float32 if low else value.dtype)


def zeros(values: Sequence[Value]) -> list[Array]:
    return [jnp.zeros_like(widened(v)) for v in values]

"""Movement in the primitives that JAX had first, for ``unstack`` and ``tile``.

Newer versions of JAX have primitives for what older ones write with several. The older
words stand for the newer, bit for bit, so that nothing else need know both. Not for
``stack``: what a loop that is written out stacks is what the loop hands on, one value
that is summed or averaged as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax import lax

from jlrp.ir.program import Equation, Program
from jlrp.ir.rewriting import Rewriting
from jlrp.typing import Array


def with_plain_moves(program: Program, opaque: Iterable[Any]) -> None:
    """Write a program again in the older words of movement."""
    opaque = frozenset(opaque)
    if any(_plain(equation, opaque) for equation in program.equations):
        _PlainMoves(program, opaque).run()


class _PlainMoves(Rewriting):
    def __init__(self, program: Program, opaque: frozenset[Any]):
        super().__init__(program)
        self.opaque = opaque

    def visit(self, kept: Equation) -> None:
        function = _plain(kept, self.opaque)
        if function is not None:
            outs = self.insert(kept, lambda *x: function(x, kept), *kept.inputs)
            self.renamed.update(zip(kept.outputs, outs, strict=True))


def _plain(
    equation: Equation, opaque: frozenset[Any]
) -> Callable[[Sequence[Array], Equation], Sequence[Array]] | None:
    found = _PLAIN.get(equation.primitive.name)
    return None if found is None or equation.primitive in opaque else found


def _unstacked(x: Sequence[Array], equation: Equation) -> list[Array]:
    (whole,), axis = x, equation.params["axis"]
    count = whole.shape[axis]
    return [lax.index_in_dim(whole, i, axis, keepdims=False) for i in range(count)]


def _tiled(x: Sequence[Array], equation: Equation) -> list[Array]:
    (part,), (out,) = x, equation.outputs  # (a, b), by reps (m, n), is (m a, n b)
    repetitions = equation.params["reps"]
    sizes = [n for pair in zip(repetitions, part.shape, strict=True) for n in pair]
    repeated = lax.broadcast_in_dim(part, sizes, range(1, 2 * part.ndim, 2))
    return [lax.reshape(repeated, out.shape)]


_PLAIN = {"tile": _tiled, "unstack": _unstacked}

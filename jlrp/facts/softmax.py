"""Softmax: a quotient of an exp by its own sum, with or without the max shift.

Found by data flow, so transposes, masks and broadcasts inside do not matter.
"""

from __future__ import annotations

from jax.extend.core import primitives as p

from jlrp.graph import Atom, Program, Value

_MOVES = {
    p.broadcast_in_dim_p,
    p.convert_element_type_p,
    p.copy_p,
    p.reshape_p,
    p.squeeze_p,
    p.stop_gradient_p,
    p.transpose_p,
}


def softmax_input(program: Program, end: Value) -> Value | None:
    """The scores of the softmax that ends at ``end`` (before the shift), or None."""
    quotient = end.producer
    if quotient is None or quotient.primitive is not p.div_p:
        return None
    exponential, total = quotient.inputs
    if not _produced_by(exponential, p.exp_p):
        return None
    total = _unmoved(total)
    if not _produced_by(total, p.reduce_sum_p):
        return None
    assert isinstance(total, Value) and total.producer is not None
    if _unmoved(total.producer.inputs[0]) is not _unmoved(exponential):
        return None
    assert isinstance(exponential, Value) and exponential.producer is not None
    scores = exponential.producer.inputs[0]
    if _produced_by(scores, p.sub_p):
        assert isinstance(scores, Value) and scores.producer is not None
        unshifted, shift = scores.producer.inputs
        if _is_max_of(shift, unshifted):
            scores = unshifted
    if not isinstance(scores, Value) or scores not in program.active:
        return None
    return scores


def _produced_by(atom: Atom, primitive: object) -> bool:
    return (
        isinstance(atom, Value)
        and atom.producer is not None
        and atom.producer.primitive is primitive
    )


def _unmoved(atom: Atom) -> Atom:
    while isinstance(atom, Value) and atom.producer is not None:
        if atom.producer.primitive not in _MOVES:
            break
        atom = atom.producer.inputs[0]
    return atom


def _is_max_of(shift: Atom, scores: Atom) -> bool:
    shift = _unmoved(shift)
    if _produced_by(shift, p.max_p):  # max(-inf, max(scores))
        assert isinstance(shift, Value) and shift.producer is not None
        operands = [a for a in shift.producer.inputs if isinstance(a, Value)]
        shift = _unmoved(operands[-1]) if operands else shift
    if not _produced_by(shift, p.reduce_max_p):
        return False
    assert isinstance(shift, Value) and shift.producer is not None
    return _unmoved(shift.producer.inputs[0]) is _unmoved(scores)

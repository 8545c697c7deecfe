"""The audit: both passes, with the amounts of relevance at every operation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlrp.caching import Call, Key
from jlrp.ir import jax_compat
from jlrp.ir.program import Value
from jlrp.notices import warn_of
from jlrp.ops.context import Context
from jlrp.plan.planning import Plan, Step, is_float
from jlrp.promise import Promise
from jlrp.references import mean_over
from jlrp.reports.ledger import Ledger, LedgerRow
from jlrp.request import AtX
from jlrp.rules.base import Propagation
from jlrp.typing import Array, ArrayLike, PyTree


@dataclass(frozen=True)
class Row:
    """What is known of a row of the ledger before any number is."""

    kind: str
    scope: str
    rule: str
    where: str
    causes: tuple[str, ...]

    @property
    def size(self) -> int:
        """How many amounts it has: in, out, and one for each cause."""
        return 2 + len(self.causes)


@dataclass(frozen=True)
class Checked:
    """Which extremes tell whether an operation's inputs and outputs are numbers."""

    where: str
    has_offset: bool
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("amounts", "lowest", "highest"),
    meta_fields=("rows", "checked", "limits"),
)
@dataclass(frozen=True)
class Audited:
    """The numbers of an audit, and what they are of, which is part of the program.

    Attributes:
      amounts: the seed, the relevance of x, then those of each row in turn.
      lowest, highest: of each floating-point value of the forward pass.
      limits: a mask's scores are below these, for each of these values.
    """

    amounts: Array
    lowest: Array
    highest: Array
    rows: tuple[Row, ...]
    checked: tuple[Checked, ...]
    limits: tuple[float, ...]


def audited(call: Call) -> Ledger:
    """The ledger of a call, by one compiled program for its shapes."""
    found = jax.device_get(_audited(call.key, *call.arrays))
    seed, relevance, *amounts = found.amounts.tolist()
    rows, start = [], 0
    for row in found.rows:
        rows.append(_ledger_row(row, amounts[start : start + row.size]))
        start += row.size
    starts = _where_numbers_end(found)
    if not starts:  # the activations are finite: where relevance itself began not to be
        starts = [
            of.where
            for of, row in zip(found.rows, rows, strict=True)
            if np.isfinite(row.arrived) and not np.isfinite(row.handed)
        ]
    return Ledger(seed, relevance, tuple(rows), tuple(starts[::-1]))


@partial(jax.jit, static_argnums=0)
def _audited(
    key: Key,
    params: PyTree,
    x: PyTree,
    traced: PyTree,
    masks: dict[str, Array],
    reference: list[Array] | None,
) -> Audited:
    request = key.request(params, x, traced, reference)
    plan = request.plan(for_ledger=True)
    warn_of(plan.stops)
    known: dict[str, Any] = {}

    def amounts(
        at_x: AtX, reference: Sequence[Array] | None
    ) -> tuple[Array, Array, Array]:
        auditor = _Auditor()  # holds tracers: it must not outlive the trace
        explained = request.back(at_x, reference, auditor.observe)
        ctx, sources = explained.ctx, explained.delivered.sources
        of_x = zip(request.sources, sources, strict=True)
        totals = [
            _relevance_at(explained.seeds.items(), ctx),
            _relevance_at(of_x, ctx),
        ]
        known["rows"] = tuple(auditor.rows)
        values, known["checked"] = _checked(plan)
        arrays = [_real(ctx.read(v)) for v in values]
        known["limits"] = tuple(float(jnp.finfo(a.dtype).min) / 2 for a in arrays)
        return (
            _stacked([*totals, *auditor.amounts]),
            _stacked([jnp.min(a, initial=0) for a in arrays]),
            _stacked([jnp.max(a, initial=0) for a in arrays]),
        )

    def run(given: PyTree, masks: dict[str, Array]) -> tuple[Array, Array, Array]:
        with request.at(given):
            at_x = request.forward(plan, request.arguments, masks)
            rows, chunk = request.reference, request.background
            if rows is None or not chunk:
                return amounts(at_x, rows)
            return mean_over(lambda row: amounts(at_x, row), rows, chunk)

    numbers = jax_compat.untyped(run, 0.0, request.given, masks)
    return Audited(*numbers, **known)


@dataclass
class _Auditor:
    """Collects the amounts of each step while the reverse pass is traced."""

    rows: list[Row] = field(default_factory=list)
    amounts: list[ArrayLike] = field(default_factory=list)

    def observe(
        self,
        step: Step,
        r_out: Sequence[Promise | None],
        propagation: Propagation,
        ctx: Context,
    ) -> None:
        op, causes = step.operation, propagation.causes()
        row = Row(op.kind, op.scope, repr(step.rule), repr(op), tuple(causes))
        self.rows.append(row)
        self.amounts += [
            _relevance_at(zip(op.outputs, r_out, strict=True), ctx),
            _relevance_at(zip(op.inputs, propagation.promises, strict=True), ctx),
            *causes.values(),
        ]


def _ledger_row(row: Row, amounts: Sequence[float]) -> LedgerRow:
    arrived, handed, *shares = amounts
    causes = dict(zip(row.causes, shares, strict=True))
    unexplained = arrived - handed - sum(causes.values())
    return LedgerRow(
        row.kind, row.scope, row.rule, arrived, handed, causes, unexplained
    )


def _relevance_at(
    pairs: Iterable[tuple[Value, Promise | None]], ctx: Context
) -> ArrayLike:
    amounts = [
        jnp.sum(promise.resolve(ctx.difference(value)))
        for value, promise in pairs
        if promise is not None
    ]
    return sum(amounts, start=0.0)


def _stacked(numbers: Sequence[ArrayLike]) -> Array:
    dtype = jnp.result_type(float)
    if not numbers:
        return jnp.zeros(0, dtype)
    return jnp.stack([jnp.asarray(_real_part(n), dtype) for n in numbers])


def _real_part(number: ArrayLike) -> ArrayLike:
    return jnp.real(number) if jnp.iscomplexobj(number) else number


def _real(number: Array) -> Array:
    """The real numbers that an array is made of."""
    if not jnp.iscomplexobj(number):
        return number
    return jnp.stack([jnp.real(number), jnp.imag(number)])


def _checked(plan: Plan) -> tuple[list[Value], tuple[Checked, ...]]:
    """The floats that operations read and make, and which are whose."""
    places: dict[Value, int] = {}

    def of(values: Sequence[Value]) -> tuple[int, ...]:
        return tuple(places.setdefault(v, len(places)) for v in values if is_float(v))

    checked = [
        Checked(repr(op), op.has_offset, of(op.inputs), of(op.outputs))
        for op in (step.operation for step in plan.steps)
    ]
    return list(places), tuple(checked)


def _where_numbers_end(found: Audited) -> list[str]:
    """The operations whose inputs are numbers and whose outputs are not.

    -inf is one where a constant put it, or it was there before: a mask's. So is what a
    cast makes of a mask that is as low as its own dtype goes.
    """
    never = ~(found.highest < np.inf)  # NaN is not
    infinite = never | np.isneginf(found.lowest)
    low = found.lowest < np.asarray(found.limits)

    def ends(op: Checked) -> bool:
        masked = op.has_offset or any(low[i] for i in op.inputs)
        bad = never if masked else infinite
        return any(bad[i] for i in op.outputs) and not any(never[i] for i in op.inputs)

    return [op.where for op in found.checked if ends(op)]

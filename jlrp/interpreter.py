"""The two loops: forward records activations, reverse hands relevance back.

Both are ordinary JAX code: under jit they become one XLA program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import reduce

import jax

from jlrp.delivered import Delivered, of_constants
from jlrp.ir import jax_compat
from jlrp.ir.program import Equation, Value, evaluate, read
from jlrp.ops.captures import Captured
from jlrp.ops.context import Context
from jlrp.ops.decompositions import with_derivative
from jlrp.ops.kinds.affine import AffineOp
from jlrp.plan.planning import Plan, Step
from jlrp.promise import Promise
from jlrp.rules.base import Propagation, Recorder, Residuals

Array = jax.Array
_NONE: Mapping[Value, Array] = {}
Observer = Callable[[Step, Sequence[Promise | None], Propagation, Context], None]


def forward(plan: Plan, arguments: Sequence[Array]) -> tuple[list[Array], Residuals]:
    """Run the program; its outputs, and the activations that the plan keeps.

    What the rules of loops record is kept under their equation.
    """
    program = plan.program
    env: Residuals = dict(program.constants)
    env.update(zip(program.inputs, arguments, strict=True))
    recorded = {e: r for e, r in plan.recorders.items() if e not in plan.repeated}
    run(program.own or program.equations, env, recorded)
    outputs = [read(env, atom) for atom in program.outputs]
    kept = {key: env[key] for key in (*plan.kept, *recorded)}
    kept |= {value: jax_compat.OnHost(env[value]) for value in plan.offloaded}
    return outputs, kept


def run(
    equations: Iterable[Equation],
    env: Residuals,
    recorders: Mapping[Equation, Recorder],
) -> None:
    for equation in equations:
        rule = recorders.get(equation)
        if rule is None and (function := with_derivative(equation)) is not None:
            outs = function(*(read(env, a) for a in equation.inputs))
            env.update(zip(equation.outputs, equation.placed(outs), strict=True))
        elif rule is None:
            evaluate([equation], env)
        else:
            operands = [read(env, a) for a in equation.inputs]
            outs, env[equation] = rule.record(equation, operands, forward)
            env.update(zip(equation.outputs, equation.placed(outs), strict=True))


def reverse(
    plan: Plan,
    ctx: Context,
    seeds: Mapping[Value, Promise],
    observe: Observer | None = None,
    explained: Mapping[Value, Array] = _NONE,
) -> Delivered:
    """Hand promises from the explained outputs back to the sources.

    ``explained`` are the multipliers of parameters among the explained outputs.
    """
    pending = {value: [promise] for value, promise in seeds.items()}
    watched = plan.watched
    captured: dict[Value, Promise] = {}
    inside: dict[Equation, Mapping[int, Captured]] = {}
    parameters: dict[Value, Array] = dict(explained)
    for step in plan.steps:
        op = step.operation
        r_out = [_added(pending.pop(v, ())) for v in op.outputs]
        if all(promise is None for promise in r_out):
            continue
        if ctx.after is None:
            ctx.make_after(r_out)
        propagation = step.rule.propagate(op, r_out, ctx)
        if observe is not None:
            observe(step, r_out, propagation, ctx)
        if propagation.captured:
            inside[op.equations[0]] = propagation.captured
        if isinstance(op, AffineOp):
            ctx.make_after(propagation.promises)
        for value, promise in zip(op.inputs, propagation.promises, strict=True):
            if promise is not None:
                pending.setdefault(value, []).append(promise)
        for value, promise in zip(op.outputs, r_out, strict=True):
            if promise is not None and value in watched and value not in op.inputs:
                captured[value] = promise
        wanted = plan.wanted(op)
        multipliers = of_constants(op, r_out, propagation, ctx, wanted)
        for value, m in zip(wanted, multipliers, strict=True):
            parameters[value] = m + parameters[value] if value in parameters else m
    sources = [_added(pending.get(value, ())) for value in plan.program.sources]
    for value, promise in zip(plan.program.sources, sources, strict=True):
        if promise is not None and value in watched:
            captured[value] = promise
    return Delivered(sources, captured, parameters, inside)


def _added(promises: Sequence[Promise]) -> Promise | None:
    """The promises of one value, summed from the last to the first.

    Along a residual stream the first is all that came from behind. Were the others
    added to it one by one, XLA would write the whole stream into each fusion.
    """
    if not promises:
        return None
    return reduce(lambda total, one: one + total, reversed(promises))

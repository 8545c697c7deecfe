"""One explanation, from the traced program to the relevance that is handed out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from jlrp.analysis.activity import Levels, activate
from jlrp.analysis.dataflow import dependent
from jlrp.analysis.integers import with_numbers
from jlrp.analysis.plain_moves import with_plain_moves
from jlrp.analysis.quantised import straighten
from jlrp.analysis.trips import without_trips
from jlrp.arguments import check_array, leaves_of
from jlrp.composites import assign
from jlrp.context import context_of
from jlrp.delivered import Delivered, captured, resolved, to_inputs
from jlrp.errors import InputError, NoRelevanceError, SelectorError
from jlrp.interpreter import Observer, forward, reverse
from jlrp.ir import jax_compat, names
from jlrp.ir.declared import Declared
from jlrp.ir.primitives import names_where, primitives_where, traits
from jlrp.ir.program import Equation, Program, Value, trace, unchanged
from jlrp.ops import captures
from jlrp.ops.context import Context
from jlrp.ops.embedding import embeddings
from jlrp.ops.lower import find_operations, stops
from jlrp.options import Options
from jlrp.plan import residuals, targets
from jlrp.plan.planning import Plan, is_float, make_plan, no_path, parameters_of
from jlrp.promise import Promise
from jlrp.rules import registered
from jlrp.rules.base import Residuals
from jlrp.typing import Array, Function, PyTree, Target


class Request:
    """A traced function with its arguments and what of its output is explained.

    Args:
      params, x: pytrees of arrays, tracers or ``ShapeDtypeStruct``.
      target: None for that of the options.
      masked: names of the values that masks are set on.
    """

    def __init__(
        self,
        fn: Function,
        params: PyTree,
        x: PyTree,
        options: Options,
        target: Target = None,
        masked: Sequence[str] = (),
        reference: Sequence[Array] | None = None,
    ):
        self.background = 0  # how many references are run at once, if there are several
        if options.baseline is not None:
            self.background = getattr(options.baseline, "chunk", 0)
            options = replace(options, composite=options.composite.from_reference())
        self.options, self.masked = options, masked
        self.target = options.target if target is None else target
        scored = targets.scored(fn, self.target)
        as_differentiated = options.composite.view.as_differentiated
        self.program, (scores, output) = trace(
            scored,
            params,
            x,
            declared=_declared(as_differentiated),
            rewrite=unchanged if as_differentiated else _rewritten,
        )
        self.batch = batch_of(x)
        self.target = targets.fitting(scores, self.target)
        targets.check(scores, self.target, self.batch)
        self.n_scores = len(jax.tree.leaves(scores))
        self.output_tree = jax.tree.structure(output)
        self.arguments = jax.tree.leaves((params, x))
        self.reference = reference
        self.x_tree = jax.tree.structure(x)
        self.params_tree = jax.tree.structure(params)
        n_params = self.params_tree.num_leaves
        self.parameters = self.program.inputs[:n_params]
        self.sources = self.program.inputs[n_params:]
        with_numbers(self.program, self.sources)
        self.scores = self.program.outputs[: self.n_scores]

    @property
    def given(self) -> PyTree:
        """All arrays that come from outside."""
        constants = list(self.program.constants.values())
        return self.arguments, self.target, constants, self.reference

    @contextlib.contextmanager
    def at(self, given: PyTree) -> Iterator[None]:
        """With other arrays from outside; not for longer, since they may be tracers."""
        before = self.given
        try:
            self._take(given)
            yield
        finally:
            self._take(before)

    def _take(self, given: PyTree) -> None:
        self.arguments, self.target, constants, self.reference = given
        names = self.program.constants
        self.program.constants = dict(zip(names, constants, strict=True))

    def output_of(self, outputs: Sequence[Array]) -> PyTree:
        """The function's output among the program's."""
        return jax.tree.unflatten(self.output_tree, outputs[self.n_scores :])

    def output_like(self) -> PyTree:
        """The output, as values of the program."""
        leaves = self.program.outputs[self.n_scores :]
        return jax.tree.unflatten(self.output_tree, leaves)

    def plan(self, strict: bool = True, for_ledger: bool = False) -> Plan:
        """Annotate the program, assign the rules, decide what is kept."""
        program, options = self.program, self.options
        found = embeddings(program, self.sources)
        entries = {end: embedding.sources for end, embedding in found.items()}
        levels = Levels(_carries)
        activate(program, self.sources, self.scores, levels, entries)
        reached = program.active | program.entered
        if reached.isdisjoint(self.sources):
            raise NoRelevanceError(_why_none(program))
        at_names = self._at_names()
        captures.split_at(program, at_names)
        operations = find_operations(
            program, set(registered()), options.composite.view, levels, found
        )
        asked = self.parameters if "params" in options.asked else ()
        parameters = parameters_of(program, asked)
        policy = None if for_ledger else residuals.resolve(options.residuals)
        steps = assign(
            options.composite,
            program,
            operations,
            options.fallback,
            strict,
            parameters,
            policy,
            at_names,
        )
        plan = make_plan(program, steps, at_names, parameters, policy)
        for name in self.masked:
            if name not in plan.masks:
                raise SelectorError(no_path(name))
        if plan.offloaded and not jax_compat.has_host_memory():
            raise InputError(
                "residuals asks for the memory of the host, which this backend does "
                'not offer. Take residuals="sqrt", or a memory_limit.'
            )
        return replace(plan, stops=tuple(stops(program, operations)))

    def _at_names(self) -> captures.Asked:
        """What is asked for at names, in the whole program."""
        options = self.options
        self.conditions: dict[str, names.Place] = {}
        if not options.capture and not self.masked:
            return captures.Asked()
        named = names.places(self.program)
        found = names.matching(named, options.capture)
        names.check_steps(found, options.capture_steps)
        masked: dict[str, tuple[str, ...]] = {}
        for mask, (name, place) in names.conditioned(named, self.masked).items():
            self.conditions[mask] = place
            masked[name] = (*masked.get(name, ()), mask)
        return captures.Asked(frozenset(found), masked, options.capture_steps)

    def run(
        self,
        plan: Plan,
        arguments: Sequence[Array],
        masks: Mapping[str, Array],
        observe: Observer | None = None,
    ) -> Explained:
        """Both passes, on these arguments."""
        at_x = self.forward(plan, arguments, masks)
        return self.back(at_x, self.reference, observe)

    def forward(
        self, plan: Plan, arguments: Sequence[Array], masks: Mapping[str, Array]
    ) -> AtX:
        """The forward pass at x."""
        for name, place in self.conditions.items():
            shape, steps = np.shape(masks[name]), self.options.capture_steps
            names.check_mask(name, shape, place, steps)
        outputs, kept = forward(plan, arguments)
        return AtX(plan, arguments, masks, outputs, kept)

    def back(
        self,
        at_x: AtX,
        reference: Sequence[Array] | None = None,
        observe: Observer | None = None,
    ) -> Explained:
        """The reverse pass; with the forward pass at a reference, if there is one."""
        plan, outputs = at_x.plan, at_x.outputs
        ctx = context_of(plan, at_x.kept, at_x.masks)
        if reference is not None:
            ctx = ctx.with_reference(self._at_reference(at_x, reference))
        seeds = self._seeds(outputs)
        delivered = reverse(plan, ctx, seeds, observe)
        return Explained(self, plan, ctx, outputs, seeds, delivered)

    def _at_reference(self, at_x: AtX, reference: Sequence[Array]) -> Context:
        """The context of the program at the reference point."""
        n_params = self.params_tree.num_leaves
        leaves = [
            number if jax_compat.is_key(v.dtype) else jnp.broadcast_to(number, v.shape)
            for number, v in zip(reference, self.sources, strict=True)
        ]
        _, kept = forward(at_x.plan, [*at_x.arguments[:n_params], *leaves])
        return context_of(at_x.plan, kept, at_x.masks)

    def _seeds(self, outputs: Sequence[Array]) -> dict[Value, Promise]:
        scores = [jax_compat.at_least_float32(out) for out in outputs[: self.n_scores]]
        starts = targets.seeds(scores, self.target, self.batch, self.options.seed)
        seeds: dict[Value, Promise] = {}
        for atom, start in zip(self.scores, starts, strict=True):
            if self.program.is_active(atom):
                assert isinstance(atom, Value)
                seeds[atom] = start + seeds.get(atom)
        return seeds


@dataclass(frozen=True)
class AtX:
    """The forward pass at x: the outputs, and what the plan keeps."""

    plan: Plan
    arguments: Sequence[Array]
    masks: Mapping[str, Array]
    outputs: Sequence[Array]
    kept: Residuals


@dataclass(frozen=True)
class Explained:
    """What both passes found, as pytrees on demand."""

    request: Request
    plan: Plan
    ctx: Context
    outputs: Sequence[Array]
    seeds: Mapping[Value, Promise]
    delivered: Delivered

    def output(self) -> PyTree:
        return self.request.output_of(self.outputs)

    def relevance(self) -> PyTree:
        pairs = zip(self.request.sources, self.delivered.sources, strict=True)
        leaves = [self._resolved(source, promise) for source, promise in pairs]
        return jax.tree.unflatten(self.request.x_tree, leaves)

    def captured(self) -> dict[str, Array | list[Array]]:
        """One array for each name; a list if the name has several values."""
        return {
            name: arrays[0] if len(arrays) == 1 else arrays
            for name, arrays in self._captured.items()
            if name != captures.COUNTS
        }

    def counts(self) -> list[Array]:
        """How often while loops ran of which iterations are recorded."""
        return self._captured.get(captures.COUNTS, [])

    @cached_property
    def _captured(self) -> captures.Captured:
        return captured(self.plan, self.delivered, self.ctx)

    def _resolved(self, value: Value, promise: Promise | None) -> PyTree:
        return resolved(value, promise, self.ctx)

    def parameters(self) -> PyTree:
        """Relevance of the parameters: each times its multiplier."""
        request = self.request
        n_params = request.params_tree.num_leaves
        given = dict(zip(request.parameters, request.arguments[:n_params], strict=True))
        floats = [v for v in request.parameters if is_float(v)]
        known = {**self.ctx.kept, **given}
        of_floats = to_inputs(self.plan, self.delivered, floats, known)
        multipliers = dict(zip(floats, of_floats, strict=True))
        leaves = []
        for v, number in given.items():
            if v not in multipliers:
                leaves.append(self._resolved(v, None))
            else:
                leaves.append(
                    Promise(None, multipliers[v]).resolve(
                        jax_compat.at_least_float32(number)
                    )
                )
        return jax.tree.unflatten(request.params_tree, leaves)


def _rewritten(program: Program) -> None:
    straighten(program)
    with_plain_moves(program, registered())
    without_trips(program, registered())


def _declared(always: bool) -> Declared:
    """Which derivatives are taken; a primitive's registered rule goes before them."""
    kernels = names_where(lambda row: row.kernel)
    kernels -= {primitive.name for primitive in registered()}
    stops = primitives_where(lambda row: row.stops).difference(registered())
    return Declared(kernels, stops, always)


def _carries(equation: Equation) -> bool:
    return not traits(equation).stops or equation.primitive in registered()


def _why_none(program: Program) -> str:
    reached = dependent(program, program.sources)
    stops = [
        f"{equation} ({traits(equation).how})"
        for equation in program.equations
        if traits(equation).stops and not reached.isdisjoint(equation.inputs)
    ]
    why = f" Paths from x end at: {'; '.join(stops[:3])}." if stops else ""
    return (
        "The explained output does not depend on x through floating-point values."
        f"{why} Check the argument order, fn(params, x), and stop_gradient."
    )


def check_arrays(params: PyTree, x: PyTree, abstract: bool = False) -> None:
    """Refuse what cannot be explained, before any work is done.

    Raises:
      InputError: for leaves that are no arrays, an empty or a complex x.
    """
    for name, tree in (("params", params), ("x", x)):
        for where, leaf in leaves_of(name, tree):
            check_array(where, leaf, abstract)
    if not jax.tree.leaves(x):
        raise InputError(
            "x has no arrays: there is nothing to explain. Call it as fn, params, x."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(x):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise InputError(
                f"x{jax.tree_util.keystr(path)} is complex; explain its real and "
                "imaginary parts as two real leaves."
            )


def batch_of(x: PyTree) -> int | None:
    """The size of the leading axis of x, if all its leaves share one.

    A single vector is one example with features, not a batch of numbers.
    """
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(x)]
    if not shapes or any(not shape for shape in shapes):
        return None
    if all(len(shape) == 1 for shape in shapes):
        return None
    sizes = {shape[0] for shape in shapes}
    return sizes.pop() if len(sizes) == 1 else None

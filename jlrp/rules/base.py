"""What a rule is, what it may ask for, and what it gives back."""

# JAX types its functions in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax

from jlrp import arguments
from jlrp.errors import InputError, RuleError, SelectorError
from jlrp.ir.program import Equation, Value
from jlrp.ops.base import Operation
from jlrp.ops.captures import Captured, Entries
from jlrp.ops.context import Context, Residuals
from jlrp.promise import Parts, Promise
from jlrp.rules.bias import BIASES
from jlrp.typing import PyTree

Array = jax.Array
Causes = dict[str, Array]


@dataclass(frozen=True)
class Propagation:
    """The promises of an operation's inputs, and the relevance that they do not hold.

    Attributes:
      promises: one per input, None for none.
      causes: computes the relevance absorbed, by cause, each from its own formula
        (``"bias"``, ``"stabilizer"``, ``"taylor"``, ``"constants"``, ``"stopped"``,
        ``"blocked"``); called by ``jlrp.audit`` only.
      shares: relevance per unit of each output, from which the multipliers of constants
        follow by the chain rule; None: the promises of the outputs, over these.
      constants: computes the multipliers of some constants, where that is not so;
        called if relevance of parameters is asked for.
      captured: of a loop or branch, by the number of a body: what was captured in it.
    """

    promises: Sequence[Promise | None]
    causes: Callable[[], Causes] = dict
    shares: Sequence[Array | None] | None = None
    constants: Callable[[Sequence[Value]], Sequence[Array]] | None = None
    captured: Mapping[int, Captured] = field(default_factory=dict[int, Captured])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Both:
    """The same at the two points of an explanation from a reference: a pytree."""

    here: PyTree
    there: PyTree


class LoopContext(Context):
    """A context that also runs the bodies of loops and branches."""

    def forward_body(
        self, plan: BodyPlan, inputs: Sequence[Array]
    ) -> tuple[list[Array], Residuals]:
        """Run a body; its outputs, and what its plan keeps."""
        raise NotImplementedError

    def reverse_body(
        self,
        plan: BodyPlan,
        residuals: Residuals | Both,
        seeds: Mapping[Value, Promise],
        observe: Callable[..., None] | None,
        wanted: Sequence[Value],
        explained: Mapping[Value, Array],
        masks: Mapping[str, Array],
        captures: bool,
    ) -> tuple[list[Promise | None], Sequence[Array], Captured]:
        """Promises of a body's sources, multipliers of some other inputs, captures.

        ``explained`` are the multipliers of its outputs that are parameters. ``masks``
        are those of this iteration, where they differ. Without ``captures`` there are
        none.
        """
        raise NotImplementedError


Forward = Callable[[Any, Sequence[Array]], tuple[list[Array], Residuals]]


@runtime_checkable
class Recorder(Protocol):
    """A rule that runs its equation itself in the forward pass."""

    def record(
        self, equation: Equation, operands: Sequence[Array], forward: Forward
    ) -> tuple[list[Array], PyTree]:
        """Its outputs, and what is kept for the reverse pass."""
        ...


class BodyStep(Protocol):
    """A step of such a plan (``planning.Step``)."""

    @property
    def operation(self) -> Operation: ...

    @property
    def rule(self) -> Rule: ...


class BodyPlan(Protocol):
    """The plan of a loop's or branch's body (``planning.Plan``)."""

    @property
    def steps(self) -> Sequence[BodyStep]: ...

    @property
    def kept(self) -> tuple[Value, ...]: ...

    @property
    def parameters(self) -> frozenset[Value]: ...

    @property
    def recorders(self) -> Mapping[Equation, Recorder]: ...

    @property
    def repeated(self) -> frozenset[Equation]: ...

    @property
    def captured(self) -> Entries: ...

    @property
    def masks(self) -> Mapping[str, int]: ...

    @property
    def masks_of_next(self) -> frozenset[str]: ...


class Rule:
    """A propagation rule: a frozen, hashable, printable value.

    Subclasses are frozen dataclasses whose fields are the published parameters in
    order.
    """

    def __post_init__(self) -> None:
        """Refuse parameters that are not in their range, by their type.

        A rule of the user's own says itself what its parameters are.
        """
        if not type(self).__module__.startswith("jlrp.rules."):
            return
        for parameter in fields(self):  # type: ignore[arg-type]
            _check_parameter(self, parameter.name, str(parameter.type))

    def needs(self, op: Operation) -> tuple[Value, ...]:
        """The activations the rule reads, besides the operation's constants."""
        raise NotImplementedError

    def parts(self, op: Operation, r: Sequence[Parts]) -> Sequence[Parts]:
        """Which parts the promises of the inputs have, by those of the outputs.

        ``propagate`` returns no others. Where it returns fewer, a loop has zeros, since
        all its iterations hand on the same parts: a rule that says which saves these.
        """
        return [Parts.BOTH] * len(op.inputs)

    def propagate(
        self, op: Operation, r: Sequence[Promise | None], ctx: Context
    ) -> Propagation:
        """Turn the promises of the outputs into promises of the inputs."""
        raise NotImplementedError

    def check(self, op: Operation) -> None:
        """Raise ``SelectorError`` if the rule does not fit the operation."""

    def is_exact(self, op: Operation) -> bool:
        """Whether this is the operation kind's own rule, or a fallback."""
        return True

    def from_reference(self, op: Operation) -> Rule:
        """The rule that does the same relative to a reference (``baseline=``).

        Raises:
          RuleError: there is none.
        """
        raise RuleError(
            f"{self!r} has no meaning relative to a baseline, at the {op!r}: "
            f"{self._why_no_reference}. Leave the baseline out, or explain with "
            'composite="deep_lift", jlrp.rules.Gamma, ZPlus, AlphaBeta or Epsilon.'
        )

    _why_no_reference: ClassVar[str] = (
        "what it hands on is not known to be a multiple of x - x0"
    )


def _check_parameter(rule: Rule, name: str, kind: str) -> None:
    value = getattr(rule, name)
    if "None" in kind and value is None:
        return
    try:
        if kind.startswith("float"):
            arguments.number(0)(name, value)
        elif kind == "bool":
            arguments.flag(name, value)
        elif name == "bias":
            arguments.check_choice(name, value, BIASES)
    except InputError as error:
        why = " Parameters are non-negative." if kind.startswith("float") else ""
        raise RuleError(f"{type(rule).__name__}: {error}{why}") from None


def refuse(rule: Rule, op: Operation, why: str) -> None:
    raise SelectorError(
        f"{rule!r} cannot explain the {op!r}: {why}. Give that operation another rule: "
        "list a pair with a narrower selector before this one."
    )

"""The options of an explanation: one field each.

What is a field here is a keyword of ``jlrp.explain`` and, by the class it is in, of
``relevance``, ``inspect`` and ``audit``, with its documentation there; an attribute of
the explainer; an option of the command, if a command line can say it; and part of what
a job records.
"""

# JAX types its functions in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import jax.numpy as jnp

from jlrp import references
from jlrp.arguments import check_array, choice, optional, shown
from jlrp.composites import FALLBACKS, Composite, resolve
from jlrp.errors import InputError
from jlrp.fields import Option, checked
from jlrp.plan import residuals as policies
from jlrp.plan import targets
from jlrp.plan.residuals import KeepWhere
from jlrp.references import Baseline
from jlrp.typing import Array, ArrayLike, Target

Conditions = Mapping[str, ArrayLike] | None
Residuals = str | KeepWhere | Callable[..., object]


def masks_of(condition: object) -> dict[str, Array]:
    """The masks by name, as arrays.

    Raises:
      InputError: for what maps no names to arrays.
    """
    if condition is None:
        return {}
    if not isinstance(condition, Mapping):
        raise InputError(
            f"condition maps names of scopes or tags to masks; got {shown(condition)}."
        )
    masks: dict[str, Array] = {}
    for name, mask in cast("Mapping[object, ArrayLike]", condition).items():
        check_array(f"condition[{name!r}]", mask)
        if not isinstance(name, str):
            raise InputError(f"condition has the key {name!r}; names are strings.")
        masks[name] = jnp.asarray(mask)
    return masks


def _composite(name: str, given: str | Composite) -> Composite:
    return resolve(given, name)


def _condition(name: str, given: Conditions) -> Conditions:
    masks_of(given)  # at each call, since they may change in place
    return given


def _residuals(name: str, given: Residuals) -> Residuals:
    policies.resolve(given)
    return given


def _target(name: str, given: Target) -> Target:
    return targets.given(given)


def _wrt(name: str, given: str | Sequence[str]) -> str | tuple[str, ...]:
    words = _words(name, given, 'it is "x", "params" or both')
    if not words or not set(words) <= {"x", "params"}:
        raise InputError(f'{name} is "x", "params" or both; got {words!r}.')
    return given if isinstance(given, str) else words


def _capture(name: str, given: str | Iterable[str]) -> tuple[str, ...]:
    return _words(name, given, "globs of name scopes and tags")


def _words(name: str, given: object, meaning: str) -> tuple[str, ...]:
    if isinstance(given, str):
        return (given,)
    text, is_array = shown(given), hasattr(given, "dtype")
    if (
        is_array
        or not isinstance(given, Iterable)
        or isinstance(given, bytes | Mapping)
    ):
        raise InputError(f"{name} is {text}; give strings: {meaning}.")
    found = tuple(cast("Iterable[object]", given))
    words = tuple(word for word in found if isinstance(word, str))
    if len(words) < len(found):
        raise InputError(f"{name} has {text}; give strings: {meaning}.")
    return words


def _number_of(what: str) -> Callable[[str, object], int | None]:
    def read(name: str, given: object) -> int | None:
        if given is None:
            return None
        if not isinstance(given, int) or isinstance(given, bool) or given < 1:
            raise InputError(
                f"{name} is a number of {what}, at least 1; got {given!r}."
            )
        return given

    return read


@dataclass(frozen=True, kw_only=True)
class RuleOptions:
    """What all four functions take."""

    composite: Option[str | Composite, Composite] = Option(
        "auto",
        "name of a preset of ``jlrp.composites``, or a ``Composite``.",
        _composite,
        brief="Name of a composite.",
    )
    fallback: Option[str | None, str | None] = Option(
        None,
        'for operations without a rule: None raises, ``"gradient"`` takes first-order '
        'Taylor, ``"stop"`` absorbs their relevance.',
        checked(optional(choice(*FALLBACKS))),
        brief="For operations without a rule.",
        choices=tuple(FALLBACKS),
    )
    baseline: Option[Baseline, Baseline] = Option(
        None,
        "what relevance is relative to: it then sums to ``fn(params, x) - fn(params, "
        "baseline)``. None: to nothing, as LRP is. A number, an array or a pytree that "
        "broadcasts to x; a function of x, such as ``metrics.Blur(...)``; of token "
        "ids, ids; or ``jlrp.Background(data)``, the mean over its rows. ``auto`` is "
        "``deep_lift`` then, with small gammas where convolutions are many.",
        references.check,
        word=float,
        brief="A number that relevance is relative to, such as 0.",
    )

    def __post_init__(self) -> None:
        if self.baseline is None and self.composite.view.relative:
            # As Captum's DeepLift does. Rejected: an error, for a preset by name alone.
            object.__setattr__(self, "baseline", 0.0)


@dataclass(frozen=True, kw_only=True)
class InspectOptions(RuleOptions):
    """What ``jlrp.inspect`` takes."""

    residuals: Option[Residuals, Residuals] = Option(
        "keep",
        "which activations the reverse pass gets from the forward pass: "
        '``"keep"``: those that rules read; ``"promise"``: those of them that cheap '
        'operations cannot make from others again; ``"sqrt"``: what is alive at about '
        "sqrt(n) places of a program of n operations, all else is run again, once; "
        '``"offload"``: all in the memory of the host until then; '
        "``jlrp.KeepWhere(...)``: by operation; or a policy of "
        "``jax.checkpoint_policies``. Relevance is the same, to rounding.",
        _residuals,
        brief="Which activations are kept.",
        choices=tuple(policies.POLICIES),
        changes_results=False,
    )


@dataclass(frozen=True, kw_only=True)
class AuditOptions(RuleOptions):
    """What ``jlrp.audit`` takes."""

    seed: Option[str, str] = Option(
        "score",
        '``"score"``: relevance starts at, and sums to, the explained score; '
        '``"one"``: it starts at 1.',
        checked(choice(*targets.SEEDS)),
        brief="Where relevance starts.",
        choices=targets.SEEDS,
    )
    condition: Option[Conditions, Conditions] = Option(
        None,
        "masks by the name of a scope or tag; relevance is multiplied by them there, "
        "then goes on (CRP). Arrays that broadcast to the value named.",
        _condition,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.baseline is not None and self.seed != "score":
            raise InputError(
                "With a baseline, relevance starts at a difference of scores: "
                f'seed="score", not {self.seed!r}.'
            )


@dataclass(frozen=True, kw_only=True)
class RelevanceOptions(InspectOptions, AuditOptions):
    """What ``jlrp.relevance`` takes."""

    wrt: Option[str | Sequence[str], str | tuple[str, ...]] = Option(
        "x",
        '``"x"``; ``"params"``: the relevance of parameters, each times its '
        'multiplier, for pruning; or both, ``("x", "params")``. Parameters are side '
        "outputs: asking for them does not change the relevance of x.",
        _wrt,
        changes_results=False,
    )
    memory_limit: Option[int | None, int | None] = Option(
        None,
        "bytes of temporary memory that the compiled explanation may take, on each "
        "device: the residuals are chosen that run least again and keep it. Some "
        "programs are compiled for this at the first call with new shapes.",
        _number_of("bytes"),
        word=int,
        brief="Bytes of temporary memory that an explanation may take.",
        changes_results=False,
    )

    @property
    def asked(self) -> tuple[str, ...]:
        """``wrt``, as several."""
        return (self.wrt,) if isinstance(self.wrt, str) else self.wrt

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory_limit is not None and self.residuals != "keep":
            raise InputError(
                "memory_limit chooses the residuals itself: leave residuals out, or "
                "the limit."
            )


@dataclass(frozen=True, kw_only=True)
class Options(RelevanceOptions):
    """All options: what ``jlrp.explain`` takes."""

    target: Option[Target, Target] = Option(
        None,
        "as in ``relevance``. An array is traced, so that labels may vary without "
        "recompiling; ints and functions are static.",
        _target,
    )
    capture: Option[str | Iterable[str], tuple[str, ...]] = Option(
        (),
        "globs of name scopes and tags, ``*`` within one component of a path, ``**`` "
        "any number: what relevance their outputs have is returned. A value inside an "
        "operation (between a convolution and its batch norm) is reported at the "
        "operation's output: naming never changes an explanation. One in the body of "
        "a loop has a first axis of iterations, in the order of the loop's stacked "
        "arrays; one in a branch is zeros where another ran.",
        _capture,
        brief="Relevance at these scopes and tags too; repeatable.",
    )
    capture_steps: Option[int | None, int | None] = Option(
        None,
        "how many iterations of a ``while_loop`` are recorded, for names in its body: "
        "rows behind the last are zeros. More iterations are an error, or NaN where "
        "the call is traced, as in a user's ``jit``.",
        _number_of("iterations"),
        word=int,
        brief="Iterations of a while loop that are recorded.",
    )

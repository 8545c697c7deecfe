"""Composites assign rules to operations: pairs of selector and rule, first match wins.

A selector is a kind (``"conv"``), a position (``"first"``, ``"last"``), a primitive
(the object or its name), a glob over name scopes (``"encoder/*"``), ``"*"`` for all, a
predicate of the operation, such as ``Depth(0.0, 0.15)``, or a tuple of selectors that
must all match.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from jax.extend.core import Primitive

from jlrp import arguments
from jlrp.analysis.stopped import choices_of
from jlrp.arguments import first_lines, shown, takes
from jlrp.errors import (
    InputError,
    JlrpError,
    RuleError,
    SelectorError,
    UnsupportedPrimitiveError,
)
from jlrp.ir.families import why_missing
from jlrp.ir.primitives import KINDS, traits
from jlrp.ir.program import Program, Value
from jlrp.ops.base import Operation, View, with_inner
from jlrp.ops.captures import Asked
from jlrp.ops.kinds.affine import AffineOp
from jlrp.ops.kinds.embedding import EmbeddingOp
from jlrp.ops.kinds.generic import RoundingOp, UnsupportedOp
from jlrp.ops.kinds.loop import LoopOp
from jlrp.plan.networks import Network, network_of
from jlrp.plan.planning import Plan, Step, parameters_inside, plan_body
from jlrp.plan.residuals import Policy, in_chunks, keep, within
from jlrp.rules import (
    Absolute,
    AlphaBeta,
    Difference,
    Epsilon,
    Flat,
    Gamma,
    Gate,
    Gradient,
    NativeGradient,
    Pass,
    Rule,
    Selective,
    Stop,
    ZBox,
    Zero,
    ZPlus,
    default_rule,
)
from jlrp.rules.kernel import Bound
from jlrp.rules.loops import CONTROL_FLOW

__all__ = [
    "PRESETS",
    "Composite",
    "Depth",
    "Pair",
    "attnlrp",
    "auto",
    "cp_lrp",
    "deep_lift",
    "dynamic_lrp",
    "epsilon",
    "epsilon_alpha2_beta1",
    "epsilon_alpha2_beta1_flat",
    "epsilon_gamma_box",
    "epsilon_plus",
    "epsilon_plus_flat",
    "excitation_backprop",
    "gamma_by_depth",
    "gradient_input",
    "mamba_lrp",
]

T = TypeVar("T", bound="Callable[..., Composite]")
Selector = str | Primitive | Callable[[Operation], bool] | tuple[Any, ...]


@dataclass(frozen=True)
class Depth:
    """Selects dense and convolutions by where they lie between x and the output.

    The depth of one is the number of others before it on the longest path from x, as a
    share of the most that are before any: 0 for the first, 1 for the last. The body of
    a loop counts once, and its operations keep their depth in every iteration.

    Args:
      low: the least depth that matches.
      high: the depth from which on none matches; 1 includes the last.

    Example:
      >>> import jlrp
      >>> from jlrp.composites import Depth
      >>> near_x = (("conv", Depth(0.0, 0.15)), jlrp.rules.Flat())
      >>> composite = jlrp.Composite([near_x], base="epsilon_plus")
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        arguments.number()("low", self.low)
        arguments.number()("high", self.high)

    def __call__(self, op: Operation) -> bool:
        if not isinstance(op, AffineOp):
            return False
        return self.low <= op.depth < self.high or op.depth == self.high == 1.0


@dataclass(frozen=True)
class Pair:
    """One selector and its rule; an optional pair may match nothing."""

    selector: Selector
    rule: Rule
    optional: bool = False


@dataclass(frozen=True, init=False)
class Composite:
    """An ordered list of (selector, rule) over a base.

    Args:
      pairs: the first pair whose selector matches an operation gives its rule. A pair
        that matches nothing is an error.
      base: name of a preset or a Composite for the operations that no pair matches.
      merge_batch_norm: whether an inference batch norm behind a dense or convolution is
        part of it (its scale merged into the kernel), or a ``"batch_norm"`` of its own.
        None: as in the base.
      hold_statistics: whether what a norm divides by is a constant, or a factor like
        any other. None: as in the base.
      find_signals: whether to look, among the factors of a product, for the one that
        the others were computed from, for ``Selective``. None: as in the base.
      as_differentiated: whether the program is read as JAX's gradient reads it, with
        the derivative of every ``custom_jvp`` and ``custom_vjp`` in place of its body.
        None: as in the base.
      relative: whether it is for relevance from a ``baseline`` alone. None: as in the
        base.

    Raises:
      SelectorError: if a pair holds no rule, or the base is unknown.

    Example:
      >>> import jlrp
      >>> rules = jlrp.rules
      >>> composite = jlrp.Composite([("conv", rules.Gamma(0.25))], base="epsilon_plus")
    """

    pairs: tuple[Pair, ...]
    view: View
    rest: Callable[[Sequence[Operation]], Choice] | None

    def __init__(
        self,
        pairs: Iterable[tuple[Selector, Rule] | Pair],
        base: str | Composite | None = "auto",
        merge_batch_norm: bool | None = None,
        hold_statistics: bool | None = None,
        find_signals: bool | None = None,
        as_differentiated: bool | None = None,
        relative: bool | None = None,
    ):
        own = _pairs(pairs)
        for pair in own:
            _check_selector(pair.selector)
            if not isinstance(pair.rule, Rule):
                raise SelectorError(
                    f"The pair of {pair.selector!r} holds {shown(pair.rule)}, no "
                    "rule value; give an instance, such as jlrp.rules.ZPlus()."
                )
        below = None if base is None else resolve(base, "base")
        inherited = (
            ()
            if below is None
            else tuple(replace(pair, optional=True) for pair in below.pairs)
        )
        chosen = {
            "merge_batch_norm": merge_batch_norm,
            "hold_statistics": hold_statistics,
            "find_signals": find_signals,
            "as_differentiated": as_differentiated,
            "relative": relative,
        }
        for name, is_so in chosen.items():
            arguments.optional(arguments.flag)(name, is_so)
        chosen = {name: is_so for name, is_so in chosen.items() if is_so is not None}
        if any(_asks_for_first(pair.selector) for pair in own):
            chosen["peel_first"] = True
        view = replace(View() if below is None else below.view, **chosen)
        object.__setattr__(self, "pairs", (*own, *inherited))
        object.__setattr__(self, "view", view)
        object.__setattr__(self, "rest", None if below is None else below.rest)

    def from_reference(self) -> Composite:
        """The composite for relevance from a reference.

        What ``auto`` chooses by a program absorbs relevance, so that ``deep_lift``
        takes its place, or gammas on differences, which absorb nothing either.
        """
        found = object.__new__(Composite)
        view = replace(self.view, relative=True)
        if self.rest is not None:
            view = replace(view, hold_statistics=False, find_signals=False)
        object.__setattr__(found, "pairs", self.pairs)
        object.__setattr__(found, "view", view)
        object.__setattr__(found, "rest", self.rest and _from_a_baseline)
        return found

    def for_program(self, operations: Sequence[Operation]) -> tuple[Pair, ...]:
        """The pairs, and those that the base chooses by what the program holds."""
        if self.rest is None:
            return self.pairs
        return (*self.pairs, *self.rest(operations).composite.pairs)

    def why(self, operations: Sequence[Operation]) -> str:
        """What the base chose for a program, and why; empty if it chooses nothing."""
        return "" if self.rest is None else f"auto: {self.rest(operations).why}"


@dataclass(frozen=True)
class Choice:
    """What a default takes for one program, and why: a line."""

    composite: Composite
    why: str


def _pairs(pairs: Any) -> list[Pair]:
    given = [] if isinstance(pairs, str | Mapping) else pairs
    is_list = isinstance(given, Iterable) and not hasattr(given, "dtype")
    if not is_list or given is not pairs:
        raise SelectorError(
            f"pairs is {shown(pairs)}; give a list of (selector, rule), such as "
            '[("conv", jlrp.rules.ZPlus())].'
        )
    found = []
    for pair in given:
        is_pair = isinstance(pair, tuple | list) and len(pair) == 2
        if not is_pair and not isinstance(pair, Pair):
            raise SelectorError(
                f"pairs holds {shown(pair)}; each is a (selector, rule), such as "
                '("conv", jlrp.rules.ZPlus()).'
            )
        found.append(pair if isinstance(pair, Pair) else Pair(*pair))
    return found


def _check_selector(selector: object) -> None:
    if isinstance(selector, tuple):
        for part in selector:
            _check_selector(part)
    elif not isinstance(selector, str | Primitive) and not callable(selector):
        raise SelectorError(
            f"The selector {shown(selector)} is a {type(selector).__name__}. "
            f"{_SELECTORS}"
        )


def _asks_for_first(selector: Selector) -> bool:
    if isinstance(selector, tuple):
        return any(map(_asks_for_first, selector))
    return selector == "first" or selector is _first_affine


def _preset(*pairs: tuple[Selector, Rule], **view: bool) -> Composite:
    optional = [Pair(selector, rule, optional=True) for selector, rule in pairs]
    return Composite(optional, base=None, **view)


def _shared_by_contribution(stabilizer: float) -> list[tuple[Selector, Rule]]:
    norm = Epsilon(stabilizer)
    return [(kind, norm) for kind in ("add", "sum", "mean", "avg_pool")]


def _zennit_base(stabilizer: float) -> list[tuple[Selector, Rule]]:
    """What Zennit's layer map composites share (activations, sums, pooling, norms)."""
    return [
        ("activation", Pass()),
        ("batch_norm", Pass()),
        *_shared_by_contribution(stabilizer),
    ]


def _parameters(**checks: arguments.Check) -> Callable[[T], T]:
    """Parameters of a preset, checked by their names."""

    def refused(check: arguments.Check) -> arguments.Check:
        def checked(name: str, value: object) -> None:
            try:
                check(name, value)
            except InputError as error:
                raise RuleError(str(error)) from None

        return checked

    return takes(**{name: refused(check) for name, check in checks.items()})


_AMOUNT = arguments.number(0)
_OPTIONAL = arguments.optional(_AMOUNT)


@_parameters(epsilon=_AMOUNT, stabilizer=_OPTIONAL)
def epsilon(epsilon: float = 1e-6, stabilizer: float | None = None) -> Composite:
    """LRP-epsilon on dense and conv; ``stabilizer`` (None: epsilon) on sums and means.

    Activations pass, max pooling goes to the winner; ``epsilon(0.0)`` divides nowhere.
    """
    stabilizer = epsilon if stabilizer is None else stabilizer
    return _preset(
        ("conv", Epsilon(epsilon)),
        ("dense", Epsilon(epsilon)),
        *_shared_by_contribution(stabilizer),
    )


@_parameters(epsilon=_AMOUNT, stabilizer=_AMOUNT)
def epsilon_plus(epsilon: float = 1e-6, stabilizer: float = 1e-6) -> Composite:
    """z+ on convolutions, epsilon on dense (Zennit ``EpsilonPlus``)."""
    return _preset(
        ("conv", ZPlus(stabilizer=stabilizer)),
        ("dense", Epsilon(epsilon)),
        *_zennit_base(stabilizer),
    )


@_parameters(epsilon=_AMOUNT, stabilizer=_AMOUNT)
def epsilon_plus_flat(epsilon: float = 1e-6, stabilizer: float = 1e-6) -> Composite:
    """``epsilon_plus`` with Flat on the first dense or conv (``EpsilonPlusFlat``)."""
    flat = (_first_affine, Flat(stabilizer))
    return _on_top(epsilon_plus(epsilon, stabilizer), flat)


@_parameters(epsilon=_AMOUNT, gamma=_AMOUNT, stabilizer=_AMOUNT)
def epsilon_gamma_box(
    low: Bound,
    high: Bound,
    epsilon: float = 1e-6,
    gamma: float = 0.25,
    stabilizer: float = 1e-6,
) -> Composite:
    """ZBox on the first convolution, gamma on the others, epsilon on dense.

    Zennit ``EpsilonGammaBox``. ``low`` and ``high`` bound x: scalars or arrays that
    broadcast to it.
    """
    return _preset(
        (("first", "conv"), ZBox(low, high, stabilizer)),
        ("conv", Gamma(gamma, stabilizer=stabilizer)),
        ("dense", Epsilon(epsilon)),
        *_zennit_base(stabilizer),
    )


@_parameters(epsilon=_AMOUNT, stabilizer=_AMOUNT)
def epsilon_alpha2_beta1(epsilon: float = 1e-6, stabilizer: float = 1e-6) -> Composite:
    """alpha2-beta1 on convolutions, epsilon on dense (``EpsilonAlpha2Beta1``)."""
    return _preset(
        ("conv", AlphaBeta(2.0, 1.0, stabilizer=stabilizer)),
        ("dense", Epsilon(epsilon)),
        *_zennit_base(stabilizer),
    )


@_parameters(epsilon=_AMOUNT, stabilizer=_AMOUNT)
def epsilon_alpha2_beta1_flat(
    epsilon: float = 1e-6, stabilizer: float = 1e-6
) -> Composite:
    """``epsilon_alpha2_beta1`` with Flat on the first dense or conv."""
    flat = (_first_affine, Flat(stabilizer))
    return _on_top(epsilon_alpha2_beta1(epsilon, stabilizer), flat)


@_parameters(
    flat=arguments.number(0, 1),
    steps=arguments.whole(1, 64),
    gammas=arguments.numbers(2),
    epsilon=_AMOUNT,
    stabilizer=_AMOUNT,
)
def gamma_by_depth(
    flat: float = 0.15,
    gammas: tuple[float, float] = (0.6, 0.03),
    steps: int = 8,
    epsilon: float = 1e-6,
    stabilizer: float = 1e-6,
) -> Composite:
    """Flat near x, Gamma that falls with depth, epsilon on dense layers.

    Near the output units stand for classes, and what speaks against one is to be kept:
    small gammas. Near x of a large image nothing is claimed below a few pixels: Flat.
    Rules and order are those of Montavon et al. 2019 and Kohlbrenner et al. 2020 (arXiv
    1910.09840); the numbers were measured on one network, see
    ``docs/choosing-a-composite.md``. ``auto`` takes gammas like these for convolutions,
    and Flat by the size of the image.

    Args:
      flat: convolutions of less depth (see ``Depth``) are Flat.
      gammas: at that depth, and at the output; in between by equal factors.
      steps: different gammas.
      epsilon: of dense layers.
      stabilizer: of the other rules.
    """
    return _preset(
        (("conv", Depth(0.0, flat)), Flat(stabilizer)),
        *_falling_gammas(flat, gammas, steps, stabilizer),
        ("dense", Epsilon(epsilon)),
        *_zennit_base(stabilizer),
    )


def _falling_gammas(
    start: float, gammas: tuple[float, float], steps: int, stabilizer: float
) -> list[tuple[Selector, Rule]]:
    """Gammas on convolutions that fall by equal factors from a depth to the output."""
    near, far = gammas
    bounds = [*(start + (1 - start) * i / steps for i in range(steps)), 1.0]
    return [
        (
            ("conv", Depth(bounds[i], bounds[i + 1])),
            Gamma(near * (far / near) ** ((i + 0.5) / steps), stabilizer=stabilizer),
        )
        for i in range(steps)
    ]


@_parameters(stabilizer=_AMOUNT)
def excitation_backprop(stabilizer: float = 1e-6) -> Composite:
    """z+ on dense and conv, the native gradient on activations (Zhang et al. 2016)."""
    return _preset(
        ("conv", ZPlus(stabilizer=stabilizer)),
        ("dense", ZPlus(stabilizer=stabilizer)),
        ("activation", NativeGradient()),
        ("batch_norm", NativeGradient()),
        *_shared_by_contribution(stabilizer),
    )


def gradient_input() -> Composite:
    """Gradient x input: the first-order Taylor rule on every operation.

    Every ``custom_jvp`` and ``custom_vjp`` takes the derivative declared for it.
    """
    return _preset(("*", Gradient()), hold_statistics=False, as_differentiated=True)


@_parameters(gamma_conv=_OPTIONAL, gamma_dense=_OPTIONAL)
def attnlrp(
    gamma_conv: float | None = None, gamma_dense: float | None = None
) -> Composite:
    """AttnLRP (Achtibat et al. 2024, arXiv 2402.05602): no stabiliser anywhere.

    Linear maps by LRP-0, each factor of a product gets an equal share, softmax by its
    Taylor form, activations pass, a norm's statistic is a constant.

    Args:
      gamma_conv: Gamma on convolutions; LXT's published value for ViT is 0.25.
      gamma_dense: Gamma on dense layers; LXT's published value for ViT is 0.05.
    """
    return _preset(*_gammas(gamma_conv, gamma_dense))


@_parameters(gamma_conv=_OPTIONAL, gamma_dense=_OPTIONAL)
def cp_lrp(
    gamma_conv: float | None = None, gamma_dense: float | None = None
) -> Composite:
    """CP-LRP (Ali et al. 2022, arXiv 2202.07304): gates and attention are constants.

    As ``attnlrp``, but the signal of a product gets all: the values of an attention,
    ``u`` in ``silu(g) * u``.
    """
    gates = ("product", Gate())
    return _preset(*_gammas(gamma_conv, gamma_dense), gates)


def mamba_lrp() -> Composite:
    """MambaLRP (Jafari et al. 2024, arXiv 2406.07592): selective models made linear.

    As ``attnlrp``, but a selective recurrence's coefficient, step size, input and
    read-out matrices are constants, and its carry and signal get all.
    """
    return _preset(("product", Selective()), find_signals=True)


def auto() -> Composite:
    """The default: each part of a program by what it is, in any spelling.

    1. *Convolutions*: ``Gamma(0.2)``, on images below 96 pixels, signals and volumes.
       ``ZPlus`` where the output is a map of such an image (a U-Net's logits at one
       place): neither a mean over places nor a dense layer is behind a convolution.
    2. *Of large images*: ``Gamma``, 0.6 near x, falling by equal factors with depth to
       ``0.1 * 0.3 ** min(1, (n / 49) ** 2)`` at the output, of n convolutions: 0.03
       from 49 on. ``Flat`` on those of which an output sees at most a 32nd of the
       image's shorter side: none below 96 pixels with kernels of 3.
    3. *Patches*: a first convolution whose windows do not overlap (stride >= kernel) is
       a dense layer on patches: LRP-0, as where a reshape cuts them. So is a
       convolution with one position to be at.
    4. *Gated recurrences*, whose gates are maps of what they have made before (LSTM,
       GRU, by a loop or unrolled): gates of what is carried are constants, ``f c`` and
       ``o tanh(c)``, ``z h`` and ``(1 - z) n``, as in ``cp_lrp``; other gates share
       half, ``i g`` and ``r (U h)``, as in ``attnlrp``.
    5. *Selective recurrences*, whose step sizes and matrices are learned maps of the
       signal that they multiply: ``mamba_lrp``, also on convolutions.
    6. All else (attention, gates, mixers, dense layers): ``attnlrp``, which is LRP-0
       where no values are multiplied by values.

    With a ``baseline`` it is ``deep_lift``; in networks of at least 8 convolutions
    these have ``Gamma`` on differences, 0.03 near x to 0.003 at the output, which
    absorbs nothing either; 0.1 to 0.01 in maps, 0.6 to 0.01 of large images.

    Several clauses may hold for one program; ``jlrp.inspect`` says in a line which were
    taken, and why. 0.2, 8, 0.03 and 0.003 were chosen on seven small networks of 2 to
    20 convolutions and checked on six others, what maps have on a U-Net and a stack of
    convolutions (``docs/league.md``). Clause 2 rests on
    one network alone, EfficientNet-Lite0 with ImageNet's weights; clause 4 on small
    LSTMs and GRUs of ours. ``docs/choosing-a-composite.md`` has what was measured, and
    ``jlrp.choose`` measures on a model of one's own.

    Example:
      >>> import jax.numpy as jnp, jlrp
      >>> report = jlrp.inspect(lambda w, x: x @ w, jnp.ones((2, 3)), jnp.ones((1, 2)))
      >>> report.why
      'auto: neither convolutions nor products: LRP-0'
    """
    composite = _preset(find_signals=True)
    object.__setattr__(composite, "rest", _by_what_it_is)
    return composite


def _from_a_baseline(operations: Sequence[Operation]) -> Choice:
    """``deep_lift``, and small gammas on differences where convolutions are many."""
    network = network_of(operations)
    is_map, is_many = _is_small_map(network), network.count >= _MANY
    if network.selective or not (is_map or is_many):
        return Choice(deep_lift(), "from a baseline: deep_lift")
    is_large = network.side >= _LARGE
    near, far = _OF_A_MAP if is_map else _OF_LARGE if is_large else _ON_DIFFERENCES
    of_what = " of a map" if is_map else ""
    pairs = _on_convolutions(network, (near, far), Difference())
    why = (
        f"from a baseline: deep_lift, on convolutions ({network.count}){of_what} Gamma "
        f"{near:g} to {far:g}"
    )
    return Choice(_preset(*pairs, ("*", Difference()), relative=True), why)


@_parameters(hold_statistics=arguments.flag)
def deep_lift(hold_statistics: bool = False) -> Composite:
    """Exact finite differences of every operation, for a ``baseline=``.

    Relevance sums to f(x) - f(baseline), with nothing absorbed; without a baseline, to
    f(x) - f(0). Activations by their
    secants (DeepLIFT's Rescale), products by Shapley values, softmax by logarithmic
    means, maxima by cross-max: see ``jlrp.rules.Difference``. With a
    ``jlrp.Background`` it is DeepSHAP. Sources: Shrikumar et al. 2017 (arXiv
    1704.02685); Lundberg and Lee 2017.

    Args:
      hold_statistics: whether what a norm divides by is a constant; what it would have
        got is the ledger's cause ``statistic``.
    """
    pairs = [("*", Difference())]
    return _preset(*pairs, hold_statistics=hold_statistics, relative=True)


_GAMMA = 0.2  # of convolutions
_LARGE = 96  # pixels of a side: from here on as EfficientNet was measured
_NEAR, _FAR = 0.6, 0.1  # there, at x and at the output
_DEEP, _FURTHER = 49, 0.3  # in networks as deep as this, the latter is less
_MANY, _ON_DIFFERENCES = 8, (0.03, 0.003)  # convolutions; gammas from a baseline
_OF_A_MAP = 0.1, 0.01  # gammas from a baseline where the output is of one place
_OF_LARGE = 0.6, 0.01  # and where these are so many, of large images
_SMALL = 1 / 32  # of a side: Flat claims nothing below this


def _by_what_it_is(operations: Sequence[Operation]) -> Choice:
    """The clauses of ``auto`` that a program meets."""
    network = network_of(operations)
    parts = (_convolutional, _patched, _recurrent, _multiplying)
    found = [clause for part in parts for clause in part(network)]
    pairs = [pair for taken, _ in found for pair in taken]
    why = [line for _, line in found] or ["neither convolutions nor products: LRP-0"]
    return Choice(_preset(*pairs), "; ".join(why))


_Clause = tuple[list[tuple[Selector, Rule]], str]


def _convolutional(network: Network) -> Iterator[_Clause]:
    """Gamma by depth, Flat where little of a large image is seen."""
    count = network.count
    if not count or network.selective:
        return
    flat = frozenset(
        op
        for op, c in network.convolutions.items()
        if not c.dense and c.field is not None and c.field <= c.side * _SMALL
    )
    pairs: list[tuple[Selector, Rule]]
    if _is_small_map(network):
        pairs = [(_dense_ones(network), Zero()), ("conv", ZPlus())]
        yield pairs, f"convolutions ({count}) of which a map is the output: z+"
        return
    side, near, far = network.side, _GAMMA, _GAMMA
    if side >= _LARGE:
        near, far = _NEAR, _FAR * _FURTHER ** min(1.0, (count / _DEEP) ** 2)
    pairs = [(flat.__contains__, Flat())] if flat else []
    pairs += _on_convolutions(network, (near, far), Zero())
    if flat:
        seen = f"Flat on {len(flat)} that see at most 1/32 of {side:g}"
    elif side:
        seen = f"no Flat, since all see more than 1/32 of {side:g}"
    else:
        seen = "no Flat on signals"
    gammas = f"Gamma {near:g}" if near == far else f"Gamma {near:g} to {far:.2g}"
    yield pairs, f"convolutions ({count}): {gammas}, {seen}"


def _on_convolutions(
    network: Network, gammas: tuple[float, float], dense: Rule
) -> list[tuple[Selector, Rule]]:
    """Falling gammas, and a rule for those that are dense layers."""
    falling = _falling_gammas(0.0, gammas, 8, 1e-6)
    return [(_dense_ones(network), dense), *falling]


def _is_small_map(network: Network) -> bool:
    return network.is_map and network.side < _LARGE


def _dense_ones(network: Network) -> Selector:
    """The convolutions that are dense layers."""
    found = (op for op, c in network.convolutions.items() if c.dense)
    return frozenset(found).__contains__


def _patched(network: Network) -> Iterator[_Clause]:
    if network.patches:
        yield [], "patches that do not overlap: LRP-0"


def _recurrent(network: Network) -> Iterator[_Clause]:
    if network.selective:
        line = "a selective recurrence (maps of the signal multiply it): mamba_lrp"
        yield [("product", Selective())], line
    elif network.gated:
        line = (
            "a gated recurrence (gates of what they made): constant on what it carries"
        )
        yield [(network.coefficients.__contains__, Gate())], line


def _multiplying(network: Network) -> Iterator[_Clause]:
    if network.multiplies and not (network.selective or network.gated):
        kind = "attention" if network.attends else "values times values"
        yield [], f"{kind}: attnlrp"


def _gammas(conv: float | None, dense: float | None) -> list[tuple[Selector, Rule]]:
    gammas = {"conv": conv, "dense": dense}
    return [
        (kind, Gamma(gamma, stabilizer=0.0))
        for kind, gamma in gammas.items()
        if gamma is not None
    ]


@_parameters(gamma_conv=_OPTIONAL, gamma_dense=_OPTIONAL)
def dynamic_lrp(
    gamma_conv: float | None = None, gamma_dense: float | None = None
) -> Composite:
    """The reference engine's own rules (DynamicLRP, arXiv 2512.07010).

    Sums and products are shared by absolute value, biases take theirs the same way,
    batch norm passes, windowed average pooling shares equally.
    """
    stabilizer = 1e-11

    def affine(gamma: float | None) -> Rule:
        if gamma is None:
            return Epsilon(stabilizer, bias="split")
        return Gamma(gamma, bias="split", stabilizer=stabilizer)

    absolute = Absolute(stabilizer)
    return _preset(
        ("conv", affine(gamma_conv)),
        ("dense", affine(gamma_dense)),
        ("add", absolute),
        ("sum", absolute),
        ("mean", absolute),
        ("avg_pool", Flat(0.0)),
        (("product", _is_elementwise), absolute),
        ("activation", Pass()),
        ("batch_norm", Pass()),
        ("norm", Pass()),
        ("softmax", Pass()),
        merge_batch_norm=False,
    )


def _first_affine(op: Operation) -> bool:
    return "first" in op.facts


def _is_elementwise(op: Operation) -> bool:
    return op.primitive.name in ("mul", "div")


def _on_top(base: Composite, *pairs: tuple[Selector, Rule]) -> Composite:
    return Composite([Pair(*pair, optional=True) for pair in pairs], base)


PRESETS: dict[str, Callable[..., Composite]] = {
    "attnlrp": attnlrp,
    "auto": auto,
    "cp_lrp": cp_lrp,
    "dynamic_lrp": dynamic_lrp,
    "epsilon": epsilon,
    "epsilon_alpha2_beta1": epsilon_alpha2_beta1,
    "epsilon_alpha2_beta1_flat": epsilon_alpha2_beta1_flat,
    "epsilon_gamma_box": epsilon_gamma_box,
    "epsilon_plus": epsilon_plus,
    "epsilon_plus_flat": epsilon_plus_flat,
    "excitation_backprop": excitation_backprop,
    "gamma_by_depth": gamma_by_depth,
    "gradient_input": gradient_input,
    "mamba_lrp": mamba_lrp,
}
# Relative to a baseline: with ``seed="one"`` or bounds of kernels they have no
# meaning, so that they are no choice where any preset would do.
FROM_A_BASELINE: dict[str, Callable[..., Composite]] = {"deep_lift": deep_lift}
_NAMED = {**PRESETS, **FROM_A_BASELINE}


def resolve(composite: str | Composite, name: str = "composite") -> Composite:
    """The composite of a preset's name; a composite is returned as it is."""
    if isinstance(composite, Composite):
        return composite
    if not isinstance(composite, str) or composite not in _NAMED:
        _refuse_what_is_near(composite, name)
        near = difflib.get_close_matches(str(composite), _NAMED, n=3, cutoff=0.4)
        raise SelectorError(
            f"{name} is {shown(composite)}, and there is no composite of that name. "
            + (f"Did you mean {' or '.join(map(repr, near))}? " if near else "")
            + f"The presets are {', '.join(sorted(_NAMED))}."
        )
    if composite == "epsilon_gamma_box":
        raise SelectorError(
            "epsilon_gamma_box needs the bounds of x: pass "
            "jlrp.composites.epsilon_gamma_box(low=0.0, high=1.0)."
        )
    return _NAMED[composite]()


def _refuse_what_is_near(composite: object, argument: str) -> None:
    """Say how what was given becomes a composite."""
    name = getattr(composite, "__name__", None)
    if name in _NAMED and _NAMED[name] is composite:
        raise SelectorError(
            f"{argument} is the function jlrp.composites.{name}: call it, "
            f"jlrp.composites.{name}(), or give its name, {name!r}."
        )
    if isinstance(composite, Rule):
        raise SelectorError(
            f"{argument} is the rule {composite!r}: say of which operations, as in "
            f'jlrp.Composite([("dense", {composite!r})]). The presets are '
            f"{', '.join(sorted(_NAMED))}."
        )
    if isinstance(composite, tuple | list):
        raise SelectorError(
            f"{argument} is a {type(composite).__name__}: make a composite of its "
            "pairs with jlrp.Composite(pairs)."
        )


def matches(selector: Selector, op: Operation) -> bool:
    """Whether a selector matches an operation."""
    if isinstance(selector, tuple):
        return all(matches(part, op) for part in selector)
    if isinstance(selector, Primitive):
        return any(e.primitive is selector for e in op.equations)
    if not isinstance(selector, str):
        return _says(selector, op)
    if selector in op.facts or selector == op.kind:
        return True
    if selector == "*":  # integers are summed, rounding passes, whatever the composite
        return not isinstance(op, EmbeddingOp | RoundingOp)
    if selector in KINDS or selector in _POSITIONS:
        return False
    if any(e.primitive.name == selector for e in op.equations):
        return True
    return fnmatch.fnmatchcase(op.scope, selector)


def _says(predicate: Callable[[Operation], object], op: Operation) -> bool:
    try:
        return bool(predicate(op))
    except JlrpError:
        raise
    except Exception as error:
        raise SelectorError(
            f"The selector {predicate!r} raised {type(error).__name__} at the {op!r}: "
            f"{first_lines(error)} It is called with every operation; it looks at "
            "op.kind, op.scope, op.primitive or op.facts."
        ) from error


_POSITIONS = ("first", "last")


def assign(
    composite: Composite,
    program: Program,
    operations: list[Operation],
    fallback: str | None = None,
    strict: bool = True,
    parameters: frozenset[Value] = frozenset(),
    policy: Policy | None = keep,
    asked: Asked = Asked(),  # noqa: B008
) -> list[Step]:
    """Give each operation of a program its rule.

    An operation without one gets the ``fallback`` (``"gradient"`` or ``"stop"``);
    without fallback it is an error, or, if not ``strict``, a step that is marked as
    missing.

    Raises:
      SelectorError: a user's selector matches nothing, or a rule does not fit.
      UnsupportedPrimitiveError: an operation has no rule and there is no fallback.
    """
    everything = list(with_inner(operations))
    relative = composite.view.relative
    pairs = composite.for_program(operations)
    for pair in pairs:
        if not pair.optional and not any(matches(pair.selector, o) for o in everything):
            raise SelectorError(_unmatched(pair.selector, everything))

    def assigned(
        program: Program,
        operations: list[Operation],
        parameters: frozenset[Value],
        asked: Asked,
    ) -> list[Step]:
        def step(op: Operation) -> Step:
            if not op.bodies:
                found = _assigned(pairs, op, fallback, strict, relative)
                return _from_reference(found) if relative else found
            inside = asked.inside(program, op.equations[0])
            whole = _as_a_whole(pairs, op)
            if relative and whole is not None:
                return _from_reference(whole)
            if relative:
                _check_trip_count(program, op)
            assert isinstance(op, LoopOp)
            return whole or _by_its_bodies(op, parameters, inside)

        return [step(op) for op in operations]

    def _by_its_bodies(op: LoopOp, parameters: frozenset[Value], asked: Asked) -> Step:
        (equation,) = op.equations
        bodies = tuple(body for body, _ in op.bodies)

        free = parameters_inside(bodies, equation, parameters)
        plans: list[Plan] = []  # the last first: the others follow its captures
        for (body, inner), inside in zip(op.bodies[::-1], free[::-1], strict=True):
            steps = assigned(body.program, inner, inside, asked)
            following = plans[0] if plans and not op.is_branch else None
            kept = within(policy, body) if policy and op.has_length else policy
            plans.insert(0, plan_body(body, steps, inside, kept, asked, following))
        options: dict[str, Any] = {}
        if op.has_length:
            options = {"chunked": in_chunks(policy, equation)}
        elif not op.is_branch:
            options = {"steps": asked.steps if asked.counts(equation) else None}
        return Step(op, CONTROL_FLOW[op.kind](bodies, tuple(plans), **options))

    return assigned(program, operations, parameters, asked)


def _from_reference(step: Step) -> Step:
    """The same step relative to a reference."""
    op = step.operation
    rule = step.rule.from_reference(op)
    rule.check(op)
    is_own = isinstance(rule, Difference)
    fallback = not rule.is_exact(op) if is_own else step.fallback
    return replace(step, rule=rule, fallback=fallback)


def _check_trip_count(program: Program, op: Operation) -> None:
    """Refuse a loop that may run more often at x than at a reference.

    Raises:
      SelectorError: x decides how often it runs.
    """
    for choice in choices_of(program, op.equations, ()):
        if choice.what == "trip count":
            raise SelectorError(
                f"x decides how often the while loop at {op.where()} runs, so that it "
                "may have no iterations in common with one from a baseline. Write it "
                "as a scan or a fori_loop of a fixed length, with a mask for what has "
                "ended, or leave the baseline out."
            )


def _as_a_whole(pairs: Sequence[Pair], op: Operation) -> Step | None:
    """The rule of a loop or branch that a selector names by kind or primitive.

    Globs and predicates that match it are meant for the operations inside.
    """
    for pair in pairs:
        parts = pair.selector if isinstance(pair.selector, tuple) else (pair.selector,)
        if (op.kind in parts or op.primitive in parts) and matches(pair.selector, op):
            (equation,) = op.equations
            read = [a for a in equation.inputs if isinstance(a, Value)]
            constants = tuple(dict.fromkeys(a for a in read if a not in op.inputs))
            op = LoopOp(op.kind, op.inputs, op.outputs, op.equations, constants)
            pair.rule.check(op)
            return Step(op, pair.rule, fallback=not pair.rule.is_exact(op))
    return None


def _assigned(
    pairs: Sequence[Pair],
    op: Operation,
    fallback: str | None,
    strict: bool,
    relative: bool,
) -> Step:
    for pair in pairs:
        if matches(pair.selector, op) and not isinstance(op, UnsupportedOp):
            if pair.optional and not _fits(pair.rule, op):
                continue
            pair.rule.check(op)
            return Step(op, pair.rule, fallback=not pair.rule.is_exact(op))
    rule = default_rule(op)
    if relative and isinstance(rule, Gradient):  # Taylor is no rule for differences
        rule = Difference()
    if rule is not None:
        return Step(op, rule, fallback=not rule.is_exact(op))
    if fallback is not None and not (fallback == "gradient" and _is_kernel(op)):
        return Step(op, FALLBACKS[fallback], fallback=True)
    if not strict:
        return Step(op, Stop(), missing=True)
    raise UnsupportedPrimitiveError(missing_rule(op))


FALLBACKS: dict[str, Rule] = {"gradient": Gradient(), "stop": Stop()}


def _fits(rule: Rule, op: Operation) -> bool:
    """A preset's pair passes over an operation that its rule does not fit."""
    try:
        rule.check(op)
    except SelectorError:
        return False
    return True


def _is_kernel(op: Operation) -> bool:
    return traits(op).kernel


def missing_rule(op: Operation) -> str:
    name = op.primitive.name
    equation = op.equations[-1]
    reason = why_missing(equation, op.inputs + op.outputs)
    why = "" if reason is None else f" ({reason})"
    cause = (
        f"No rule for the primitive `{name}`, at {op.where()}{why}. Register one with "
        "jlrp.register_rule(primitive, rule)"
    )
    if _is_kernel(op):
        return (
            f"{cause}, give the function around it a rule with @jlrp.custom_relevance, "
            "or a derivative with jax.custom_vjp (first-order Taylor, as a fallback), "
            'or pass fallback="stop" (its relevance is absorbed, and the ledger says '
            "so)."
        )
    if traits(op).kind == "collective":
        return (
            f"No form for the collective `{name}`, at {op.where()}: what other devices "
            "compute is not in this program. Call jlrp.relevance around the shard_map, "
            "not inside of it; inside, only what each device computes by itself can be "
            "explained."
        )
    return (
        f'{cause}, or pass fallback="gradient" (first-order Taylor) or fallback="stop" '
        "(its relevance is absorbed, and the ledger says so)."
    )


def _unmatched(selector: Selector, operations: list[Operation]) -> str:
    kinds = sorted({op.kind for op in operations})
    scopes = sorted({op.scope for op in operations if op.scope})
    near = difflib.get_close_matches(str(selector), kinds + scopes, n=3, cutoff=0.4)
    return (
        f"The selector {selector!r} matches no operation of this program. "
        + (f"Nearest: {', '.join(map(repr, near))}. " if near else "")
        + f"Kinds here: {', '.join(kinds)}. "
        + (f"Scopes here: {', '.join(scopes[:12])}" if scopes else "No scopes here")
        + (", ..." if len(scopes) > 12 else ".")
        + f" {_SELECTORS}"
    )


_SELECTORS = (
    "A selector is a kind, 'first', a primitive's name, or a glob over scopes; or a "
    "predicate of an operation, or a tuple of these."
)

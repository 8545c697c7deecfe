"""What is known of a primitive: the columns of the table in ``primitives.py``.

A row is keyed by its primitive's name, so that it may stand for what JAX has no public
object for, or has in newer versions only. Where there is an object it must be the same:
a primitive of the user's own that is called ``exp`` is none of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, TypeAlias

import numpy as np
from jax.extend.core import Primitive

from jlrp.ir.jax_compat import Aval, Operand, Params

Known: TypeAlias = np.ndarray | np.number | float
Scalar: TypeAlias = Known | None
"""What a scalar is; None where that is not known."""

Degree: TypeAlias = float | Operand  # of homogeneity, of each element in an array
Degrees: TypeAlias = Degree | tuple[Degree, ...]  # of all outputs, or of each


class Applied(Protocol):
    """An equation, of a program or of JAX."""

    @property
    def primitive(self) -> Primitive: ...


class Application(Protocol):
    """An equation of a program, as far as the columns look at it."""

    primitive: Primitive
    params: Params

    @property
    def inputs(self) -> Sequence[Aval]: ...

    @property
    def outputs(self) -> Sequence[Aval]: ...


class Family(NamedTuple):
    """How a primitive carries relevance.

    Attributes:
      kind: what composites select.
      nature: how relevance is derived, one of:

        ``linear``       through the transpose; constants take their share
        ``movement``     linear, and relevance follows each number to where it came from
        ``selection``    like movement, along the winners at the actual values
        ``product``      homogeneous in each of several active operands
        ``homogeneous``  of a known degree: Euler's identity, ``x df/dx = k f``
        ``function``     differentiable, of no degree: first-order Taylor
        ``rounding``     a quantiser: passes where it does not clip
      how: the same in words, for the table of primitives.
      exact: whether this counts as covered; if not, as a fallback.
    """

    kind: str
    nature: str
    how: str = ""
    exact: bool = True


class Group(NamedTuple):
    """Operands in which an operation is homogeneous together.

    Attributes:
      operands: their positions.
      degree: the degree of every output, one for each in a tuple, one for each element
        in an array, or COUNTED: as many as the active factors of each element. 0:
        first-order Taylor.
      linear: whether the operation is linear in them, not only of degree 1.
    """

    operands: tuple[int, ...]
    degree: Degrees | str
    linear: bool = False


COUNTED = "counted"

Groups = Callable[[Application], tuple[Group, ...]]
# Of an equation, the positions of its active operands and of its active outputs.
Lacks = Callable[[Application, Collection[int], Collection[int]], str | None]

Positions = range
REALS = (-np.inf, np.inf)


@dataclass(frozen=True, kw_only=True, eq=False)
class Traits:
    """All that is known of one primitive.

    Attributes:
      name: its name in JAX, the key of the table.
      primitive: its object, None if the installed JAX has no public one.
      internal: of jlrp itself, for the compiler's sake: not in the documentation.

      kind: the kind of its operations, or why it makes none (a key of ``STATES``).
      how: how relevance passes, or why it does not, for the documentation.
      family: how it carries relevance; None: not at all, or as an activation alone.
      linear_kind: of a product, its kind where one operand alone is active.
      groups: of what is homogeneous, the operands with their degrees.
      lacks: says of an equation why JAX has no derivative of it, if it has none.
      transposes: whether JAX has a transpose of what is linear.
      steering: the operands that say which numbers move, not which numbers they are.
      adds: whether it may add a constant to an active operand, element by element, or
        put it in its place.
      mean: the kind of what it is once divided by the number of its terms.

      elementwise: whether each element is made of the operands' elements there.
      evaluate: its value of NumPy scalars, called with the parameters as keywords; None
        where it is not known.
      partial: whether ``evaluate`` takes None, for operands that are not known.
      monotone: +1 or -1 if it never falls or rises in its only operand, else 0; or a
        function of the parameters.
      range: the least interval that holds its values; or a function of the parameters.
      degree: k if it is ``c x^k``, ``|x|`` in place of ``x`` allowed; or a function of
        the parameters.
      ratio: how ``f(x) / x`` of a composition follows from the ratios of its operands:
        a method of ``rules.elementwise``, or ``"own"`` if f(0) = 0 and f'(0) = 1, so
        that it is a ratio by itself, times that of its operand.
      base: of an exponential, its base.

      layout: whether it only puts the same numbers in another shape or order, or
        repeats them along new axes.
      comparison: whether it compares two operands.
      logic: whether it combines booleans.
      rounding: whether it gives whole numbers next to its operand's.
      reduction: how it combines numbers along axes: ``"sum"``, ``"product"``,
        ``"max"`` or ``"min"``.
      contraction: whether it is a map by a kernel: a dot or a convolution.
      fetches: whether an index operand says which part of the first it gives.
      codes: what it does with integer codes: ``"moves"`` or ``"computes"`` them.
      arithmetic: whether it computes with floats what it computes with integers.

      cheap: whether it is made again rather than kept.
      random: whether it draws random numbers, which are never drawn again.
      kernel: whether what it computes is not in the program.
    """

    name: str
    primitive: Primitive | None = None
    internal: bool = False

    kind: str = "unsupported"
    how: str = ""
    family: Family | None = None
    linear_kind: str = "linear"
    groups: Groups | None = None
    lacks: Lacks | None = None
    transposes: bool = True
    steering: Positions = Positions(0)
    adds: bool = False
    mean: str | None = None

    elementwise: bool = False
    evaluate: Callable[..., Scalar] | None = None
    partial: bool = False
    monotone: int | Callable[[Params], int] = 0
    range: tuple[float, float] | Callable[[Params], tuple[float, float]] = REALS
    degree: float | Callable[[Params], float] | None = None
    ratio: str | None = None
    base: float | None = None

    layout: bool = False
    comparison: bool = False
    logic: bool = False
    rounding: bool = False
    reduction: str | None = None
    contraction: bool = False
    fetches: bool = False
    codes: str | None = None
    arithmetic: bool = False

    cheap: bool = False
    random: bool = False
    kernel: bool = False

    @cached_property
    def nature(self) -> str | None:
        """How relevance is derived; None if it carries none."""
        return self.family and self.family.nature

    @cached_property
    def activation(self) -> bool:
        """Whether it is a function of one value that is not linear."""
        return self.kind == "activation"

    @cached_property
    def carries_elementwise(self) -> bool:
        """Whether it is elementwise, and relevance goes through it."""
        return self.elementwise and (self.activation or self.family is not None)

    @cached_property
    def movement(self) -> bool:
        return self.nature == "movement"

    @cached_property
    def addition(self) -> bool:
        """The sum or difference of two operands."""
        return self.kind == "add"

    @cached_property
    def scaling(self) -> bool:
        """The elementwise product or quotient of two operands."""
        return self.elementwise and self.nature == "product"

    @cached_property
    def clipping(self) -> bool:
        """An elementwise choice of the larger or smaller operand."""
        return self.elementwise and self.nature == "selection"

    @cached_property
    def identity(self) -> bool:
        """The same number, but for its dtype."""
        return self.movement and self.elementwise and self.ratio == "same"

    @cached_property
    def view(self) -> bool:
        """The same numbers, in another shape, order or dtype, or repeated."""
        return self.layout or self.identity

    @cached_property
    def has_derivative(self) -> bool:
        """Whether it is a call for which the user declared a derivative."""
        return self.kind == "call" and self.family is not None

    @cached_property
    def stops(self) -> bool:
        """Whether it carries no relevance, and ``how`` says why."""
        return self.kind == "no relevance"

    def value(self, x: Sequence[Scalar], params: Params) -> Scalar:
        """Its value of scalars, of which None are not known; None if it is not."""
        if self.evaluate is None or (not self.partial and any(v is None for v in x)):
            return None
        with np.errstate(all="ignore"):
            return self.evaluate(*x, **params)

    def monotone_with(self, params: Params) -> int:
        return self.monotone(params) if callable(self.monotone) else self.monotone

    def range_with(self, params: Params) -> tuple[float, float]:
        return self.range(params) if callable(self.range) else self.range

    def degree_with(self, params: Params) -> float | None:
        return self.degree(params) if callable(self.degree) else self.degree


UNKNOWN = Traits(name="")


class _Table(dict[str, Traits]):
    """Rows by name. What is found for a primitive is remembered: it is asked often."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Primitive, Traits] = {}

    def __setitem__(self, name: str, row: Traits) -> None:
        super().__setitem__(name, row)
        self.found.clear()

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.found.clear()

    def find(self, primitive: Primitive) -> Traits:
        row = self.get(primitive.name, UNKNOWN)
        if row.primitive is not None and row.primitive is not primitive:
            row = UNKNOWN
        self.found[primitive] = row
        return row


TABLE = _Table()  # filled by primitives.py


def traits(of: Applied | Primitive) -> Traits:
    """The row of an equation's primitive, or of one; UNKNOWN if there is none."""
    try:  # asked so often that calls count
        return TABLE.found[of.primitive]  # type: ignore[union-attr]
    except (AttributeError, KeyError):
        primitive = of if isinstance(of, Primitive) else of.primitive
        return TABLE.find(primitive)

"""What mean Jacobians ask of the numbers of a program at two points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax

from jlrp.ir.program import Atom, Value
from jlrp.ops.activation import Region
from jlrp.ops.base import Operation

Array = jax.Array
Cotangents = Sequence[Array | None]


class Points(Protocol):
    """The numbers at x; those at the reference are ``reference``."""

    @property
    def reference(self) -> Any: ...

    @property
    def arrived(self) -> Array | None: ...

    def read(self, atom: Atom) -> Array: ...

    def difference(self, value: Value) -> Array: ...

    def replaced(self, numbers: Mapping[Value, Array]) -> Any: ...

    def with_reference(self, reference: Any) -> Any: ...

    def apply(self, op: Operation, x: Sequence[Array]) -> list[Array]: ...

    def transpose(self, op: Operation, cotangents: Cotangents) -> list[Array]: ...

    def vjp(self, op: Operation, cotangents: Cotangents) -> list[Array]: ...

    def jvp(
        self, op: Operation, tangents: Sequence[Array] | None = None
    ) -> list[Array]: ...

    def region(self, region: Region, x: Array) -> dict[Value, Array]: ...

    def shape_of(self, value: Value) -> jax.ShapeDtypeStruct: ...

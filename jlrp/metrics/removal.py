"""What takes the place of a removed part.

A removal is a function of x that returns what x has where nothing is left of it, an
array like x. Every function will do; these are values, so that programs compiled for
them are found again.
"""

# JAX types its functions in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jlrp import arguments
from jlrp.errors import InputError
from jlrp.typing import PyTree

Array = jax.Array
Removal = Callable[[PyTree], PyTree]


@dataclass(frozen=True)
class Constant:
    """One value everywhere: 0, a grey, or the id of a mask token.

    Example:
      >>> import jax.numpy as jnp
      >>> from jlrp import metrics
      >>> metrics.Constant(103)(jnp.array([[7, 8]])).tolist()
      [[103, 103]]
    """

    value: float | int = 0

    def __post_init__(self) -> None:
        arguments.number()("value", self.value)

    def __call__(self, x: Array) -> Array:
        return jnp.full_like(x, self.value)


@dataclass(frozen=True)
class Mean:
    """The mean of each example over some axes: (2, 3) is each channel's, in NCHW."""

    axes: tuple[int, ...]

    def __post_init__(self) -> None:
        arguments.axes("axes", self.axes)

    def __call__(self, x: Array) -> Array:
        return jnp.broadcast_to(x.mean(self.axes, keepdims=True), x.shape)


@dataclass(frozen=True)
class Noise:
    """Normal noise, of each example's own mean and deviation; the same in every call.

    Args:
      seed: of the random numbers.
      scale: factor on the deviation.
    """

    seed: int = 0
    scale: float = 1.0

    def __post_init__(self) -> None:
        arguments.whole(0)("seed", self.seed)
        arguments.number()("scale", self.scale)

    def __call__(self, x: Array) -> Array:
        axes = tuple(range(1, x.ndim))
        mean, deviation = x.mean(axes, keepdims=True), x.std(axes, keepdims=True)
        noise = jax.random.normal(jax.random.key(self.seed), x.shape, x.dtype)
        return mean + self.scale * deviation * noise


@dataclass(frozen=True)
class Blur:
    """A Gaussian blur that reflects at the edges, as torchvision's ``GaussianBlur``.

    Args:
      kernel: odd number of pixels.
      sigma: standard deviation, in pixels.
      axes: of x: height and width.

    Raises:
      InputError: for an even kernel or a sigma that is not positive.

    Source: the removal of DynamicLRP's experiments (arXiv 2512.07010): 51, 20.
    """

    kernel: int = 51
    sigma: float = 20.0
    axes: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        arguments.whole(1)("kernel", self.kernel)
        arguments.number(0)("sigma", self.sigma)
        arguments.axes("axes", self.axes)
        if self.kernel < 1 or self.kernel % 2 == 0 or self.sigma <= 0:
            raise InputError(
                "Blur needs an odd kernel and a positive sigma; got "
                f"kernel={self.kernel}, sigma={self.sigma}."
            )

    def __call__(self, x: Array) -> Array:
        for axis in self.axes:
            along = jnp.asarray(self._matrix(x.shape[axis]), x.dtype)
            x = jnp.moveaxis(jnp.tensordot(x, along, (axis, 1)), -1, axis)
        return x

    def _matrix(self, length: int) -> np.ndarray:
        """The blur along one axis, as a linear map."""
        half = self.kernel // 2
        weights = np.exp(-((np.arange(self.kernel) - half) ** 2) / (2 * self.sigma**2))
        source = np.pad(np.arange(length), half, mode="reflect")
        matrix = np.zeros((length, length))
        for at in range(length):
            np.add.at(matrix[at], source[at : at + self.kernel], weights)
        return matrix / weights.sum()


@dataclass(frozen=True)
class Inpaint:
    """A function that also sees what is removed: it is called at every step.

    Args:
      function: ``function(x, removed) -> array like x``, with ``removed`` a bool array
        that broadcasts to x. Only its values at removed places are used.
    """

    function: Callable[[PyTree, PyTree], PyTree]

    def __post_init__(self) -> None:
        arguments.check_function(self.function, "function")


def REMOVAL(name: str, value: object) -> None:  # noqa: N802  (a check, as others are)
    """A function of x, or an ``Inpaint``."""
    if not callable(value) and not isinstance(value, Inpaint):
        raise InputError(
            f"{name} is {arguments.shown(value)}; give a removal of jlrp.metrics, such "
            "as Constant(0) or Blur(), or a function of x that returns the like of it."
        )

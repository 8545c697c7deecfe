"""A compiled explanation as one file: it runs without the model's code."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from jlrp.api import Explainer
from jlrp.arguments import check_array, leaves_of, shown
from jlrp.errors import InputError, IntegrationError, JlrpError
from jlrp.jobs.errors import JobError, check_path
from jlrp.jobs.fingerprint import digest
from jlrp.jobs.sources import reason
from jlrp.jobs.steps import Arrays, Reduction, Step, check_options
from jlrp.typing import Array, ArrayLike, PyTree


@dataclass(frozen=True)
class Artifact:
    """An exported step: ``artifact(params, x, target=None)``.

    Attributes:
      exported: takes the leaves of params, x, and the class indices if it has labels.
      made_by: what it was exported from, for the attributes of a store.
    """

    exported: export.Exported
    made_by: dict[str, object]

    def __call__(
        self, params: PyTree, x: PyTree, target: ArrayLike | None = None
    ) -> Arrays:
        labels = () if target is None else (target,)
        if bool(labels) != self.takes_labels:
            raise JobError(
                "The artifact takes a label for each example: give them, as target or "
                "by split (--target labels.npy)."
                if self.takes_labels
                else "The artifact has its target in it and takes no labels: leave "
                "target out, or export it with labels=True (--labels)."
            )
        call: Any = self.exported.call
        return call(jax.tree.leaves(params), x, *labels)

    @property
    def takes_labels(self) -> bool:
        arguments, _ = self.exported.in_tree.children()
        return len(arguments.children()) == 3

    def with_target(self, target: int) -> Artifact:
        raise JobError(
            "An artifact has its target in it: leave it out, or export it with labels "
            "and give one for each example."
        )


def export_artifact(
    explain: Explainer,
    params: PyTree,
    example: PyTree,
    path: str | Path,
    *,
    labels: bool = False,
    reduce: Reduction | None = None,
    dtype: str = "float32",
    allow_nan: bool = False,
) -> Artifact:
    """Write the explanation of batches of any size to a file of ``jax.export``.

    Args:
      explain: made by ``jlrp.explain``.
      params, example: pytrees of arrays or ``jax.ShapeDtypeStruct``: the parameters,
        which are not stored, and one example without the batch axis.
      labels: whether it takes a class index for each example.
      reduce, dtype, allow_nan: as in ``jobs.run``.

    Returns:
      The artifact.

    Raises:
      JlrpError: if the function cannot be explained, or exported.

    Example:
      >>> import jlrp, numpy as np, tempfile
      >>> from jlrp import jobs
      >>> explain = jlrp.explain(lambda w, x: x @ w)
      >>> w, path = np.ones((3, 2), np.float32), tempfile.mkdtemp() + "/explain.jlrp"
      >>> _ = jobs.export_artifact(explain, w, np.ones(3, np.float32), path)
      >>> jobs.load_artifact(path)(w, np.ones((5, 3), np.float32))["relevance"].shape
      (5, 3)
    """
    if not isinstance(explain, Explainer):
        raise JobError(
            f"explain is {shown(explain)}; it must be made by jlrp.explain(fn, ...)."
        )
    check_options(reduce, dtype)
    for name, tree in (("params", params), ("example", example)):
        for where, leaf in leaves_of(name, tree):
            check_array(where, leaf, abstract=True)
    check_path("path", path)
    if not isinstance(labels, bool):
        raise JobError(f"labels is {shown(labels)}; give True or False.")
    step = Step(explain, reduce, dtype, allow_nan)
    exported = _exported(step, params, example, labels)
    return Artifact(exported, _made_by(_written(exported, path)))


def _exported(
    step: Step, params: PyTree, example: PyTree, labels: bool
) -> export.Exported:
    """The step for batches of any size.

    Raises:
      JobError: if it cannot be traced for these arguments, or not for any size.
    """
    structure = jax.tree.structure(params)
    (size,) = export.symbolic_shape("batch")

    def one(leaves: list[Array], x: PyTree, *labels: Array) -> Arrays:
        x, labels = jax.tree.map(lambda a: a[None], (x, labels))
        found = step(jax.tree.unflatten(structure, leaves), x, *labels)
        return {name: array[0] for name, array in found.items()}

    def many(leaves: list[Array], x: PyTree, *labels: Array) -> Arrays:
        # One example is traced, and vmap adds the batch: its size is no number yet.
        axes = (None, 0, *(0 for _ in labels))
        return jax.vmap(one, in_axes=axes)(leaves, x, *labels)

    def shape(leaf: ArrayLike, *lead: object) -> jax.ShapeDtypeStruct:
        dtype = jax.dtypes.canonicalize_dtype(jnp.result_type(leaf))
        return jax.ShapeDtypeStruct((*lead, *jnp.shape(leaf)), dtype)

    arguments = (
        [shape(leaf) for leaf in jax.tree.leaves(params)],
        jax.tree.map(lambda leaf: shape(leaf, size), example),
        *([jax.ShapeDtypeStruct((size,), jnp.int32)] if labels else []),
    )
    try:
        exporting = export.export(jax.jit(many), platforms=("cpu", "cuda", "tpu"))
        return exporting(*arguments)
    except JlrpError as error:
        if isinstance(error, InputError) and error.__cause__ is not None:
            raise JobError(f"The function cannot take the example. {error}") from error
        raise
    except Exception as error:
        raise JobError(
            f"The explanation cannot be exported: {reason(error)}. It must take "
            "batches of any size; params and example have the shapes of the arguments."
        ) from error


def _written(exported: export.Exported, path: str | Path) -> bytes:
    """What has been written to a file."""
    try:
        content = bytes(exported.serialize())
    except ImportError as error:
        raise IntegrationError(
            "To write an artifact, jax.export needs flatbuffers. Install it with: "
            "pip install 'jlrp[jobs]'"
        ) from error
    try:
        Path(path).write_bytes(content)
    except (OSError, TypeError) as error:
        raise JobError(f"path {path!r} cannot be written: {reason(error)}.") from error
    return content


def load_artifact(path: str | Path) -> Artifact:
    """Read what ``export_artifact`` wrote.

    Raises:
      JobError: if the file cannot be read, or is no artifact.
    """
    check_path("path", path)
    try:
        content = Path(path).read_bytes()
        exported = export.deserialize(bytearray(content))
        return Artifact(exported, _made_by(content))
    except Exception as error:
        raise JobError(f"The path {path} is no artifact: {reason(error)}.") from error


def _made_by(content: bytes) -> dict[str, object]:
    return {"artifact": digest(content)}

"""Explanation jobs: data sets of any size, resumable, on many devices and hosts."""

from importlib.util import find_spec as _find_spec

from jlrp.errors import IntegrationError as _IntegrationError

if _missing := [name for name in ("tensorstore", "tqdm") if _find_spec(name) is None]:
    raise _IntegrationError(
        f"Jobs need {' and '.join(_missing)}. Install it with: pip install 'jlrp[jobs]'"
    )

from jlrp.jobs.artifact import Artifact, export_artifact, load_artifact
from jlrp.jobs.batches import Buckets
from jlrp.jobs.errors import JobError
from jlrp.jobs.parameters import load_params
from jlrp.jobs.running import ON_FAILURE, run
from jlrp.jobs.steps import Top, sum_channels
from jlrp.jobs.summary import Summary, done, summary

__all__ = [
    "ON_FAILURE",
    "Artifact",
    "Buckets",
    "JobError",
    "Summary",
    "Top",
    "done",
    "export_artifact",
    "load_artifact",
    "load_params",
    "run",
    "sum_channels",
    "summary",
]

"""Explanation jobs: data sets of any size, resumable, on many devices and hosts."""

from importlib.util import find_spec as _find_spec

from jlrp.errors import IntegrationError as _IntegrationError

if _missing := [name for name in ("tensorstore", "tqdm") if _find_spec(name) is None]:
    raise _IntegrationError(
        f"Jobs need {' and '.join(_missing)}. Install it with: pip install 'jlrp[jobs]'"
    )

from jlrp.jobs.artifact import Artifact as Artifact
from jlrp.jobs.artifact import export_artifact as export_artifact
from jlrp.jobs.artifact import load_artifact as load_artifact
from jlrp.jobs.batches import Buckets as Buckets
from jlrp.jobs.errors import JobError as JobError
from jlrp.jobs.parameters import load_params as load_params
from jlrp.jobs.running import ON_FAILURE as ON_FAILURE
from jlrp.jobs.running import run as run
from jlrp.jobs.steps import Top as Top
from jlrp.jobs.steps import sum_channels as sum_channels
from jlrp.jobs.summary import Summary as Summary
from jlrp.jobs.summary import summary as summary

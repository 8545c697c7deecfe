"""The spelling kit on random programs: one relevance for every spelling of each.

The programs are those of benchmarks/spellings.py, which checks thousands of them:

    python benchmarks/spellings.py --generated 1000 --seed 0
"""

import sys
from pathlib import Path

import numpy as np
import pytest
import zoo

from jlrp import testing

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from spellings import generated  # noqa: E402  # pyright: ignore


@pytest.mark.relaxed
@pytest.mark.parametrize("seed", range(40))
def test_one_relevance(seed):
    if (program := generated(seed)) is None:
        pytest.skip("no point away from kinks")
    random = np.random.default_rng(seed)
    kinds = random.choice(sorted(testing.kinds()), 3, replace=False)
    name = str(random.choice(list(zoo.COMPOSITES)))
    table = testing.check_spellings(
        *program, composites={name: zoo.COMPOSITES[name]}, kinds=kinds, locate=False
    )
    assert table.ok, table

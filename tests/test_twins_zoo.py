"""The spelling kit on the zoo: one relevance for every spelling of every program.

A program, a rewriting and a composite are a *case*. Here one in twelve pairs of
program and rewriting is checked, each under one composite; benchmarks/spellings.py
checks all cases. The cases that are known to differ today are in zoo_faults.txt. The
list is strict: one that is equal again must be taken out. To write it anew:

    JLRP_RECORD=1 python -m pytest tests/test_twins_zoo.py
"""

import os
from pathlib import Path

import pytest
import zoo

from jlrp import testing

FAULTS = Path(__file__).with_name("zoo_faults.txt")
RECORD = bool(os.environ.get("JLRP_RECORD"))
SHARE = 12  # one in so many pairs of program and rewriting


def known():
    lines = FAULTS.read_text().splitlines() if FAULTS.exists() else []
    return {tuple(line.split()) for line in lines if line and line[0] != "#"}


def cases(program):
    """The rewritings that are checked under each composite."""
    return zoo.cases(program, testing.kinds(), 0, SHARE)


def differing(program):
    """The cases of a program that differ and are not documented, and how."""
    found = {}
    for composite, kinds in cases(program).items():
        try:
            table = testing.check_spellings(
                *zoo.PROGRAMS[program](),
                composites={composite: zoo.COMPOSITES[composite]},
                kinds=kinds,
                locate=False,
            )
        except ValueError as error:  # the program cannot be explained at all
            found[program, "itself", composite] = str(error)
            continue
        for row in table.differences:
            found[program, row.twin, composite] = row.why or f"{row.error:.1e}"
    return found


@pytest.mark.relaxed
@pytest.mark.parametrize("program", zoo.PROGRAMS)
def test_one_relevance(program):
    found = differing(program)
    expected = {case for case in known() if case[0] == program}
    if RECORD:
        kept = {case for case in known() if case[0] != program} | set(found)
        FAULTS.write_text("".join(f"{' '.join(case)}\n" for case in sorted(kept)))
        return
    new = {case: found[case] for case in found if case not in expected}
    assert not new, f"another relevance in another spelling: {new}"
    mended = sorted(expected - set(found))
    assert not mended, f"equal now: take it out of {FAULTS.name}: {mended}"


def test_the_faults_are_cases():
    for program, kind, composite in known():
        assert kind in [*cases(program).get(composite, ()), "itself"]


@pytest.mark.relaxed
def test_every_rewriting_has_a_program():
    """None is there that nothing in the zoo can be written in."""
    missing = set(testing.kinds())
    for name in sorted(zoo.PROGRAMS, key=lambda name: name not in MANY_KINDS):
        if missing:
            missing -= set(testing.twins(*zoo.PROGRAMS[name](), kinds=missing))
    assert not missing


# Looked at first, since they leave little for the others.
MANY_KINDS = ("rational_unit", "attention_in_base_two", "mobilenet_block", "rms_norm")

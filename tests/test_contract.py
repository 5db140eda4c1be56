"""Every mixer and backend against every law (core/laws.py), on the CPU. Command: pytest tests/test_contract.py"""

import pytest
import torch

from contract import SUBJECTS, name_of
from linattn.core.laws import LAWS, LENGTHS, parity, parity_from_state


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS.keys())
@pytest.mark.parametrize("subject", SUBJECTS, ids=name_of)
def test_law(subject, law):
    assert law(subject._replace(dtype=torch.float64)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("subject", SUBJECTS, ids=name_of)
def test_dtype(subject, dtype):
    broken = {name: law(subject._replace(dtype=dtype)) for name, law in LAWS.items()}
    assert {name: wrong for name, wrong in broken.items() if wrong} == {}


BOTH = (torch.float64, torch.float32)


@pytest.mark.parametrize("length", [n for n in LENGTHS if n < 1000])
@pytest.mark.parametrize("subject", SUBJECTS, ids=name_of)
def test_length(subject, length):
    for dtype in BOTH:
        assert parity(subject._replace(dtype=dtype), length) == []
        assert parity_from_state(subject._replace(dtype=dtype), length) == []


@pytest.mark.parametrize("law, dtype", ((parity, torch.float64), (parity_from_state, torch.float32)))
@pytest.mark.parametrize("subject", SUBJECTS, ids=name_of)
def test_the_longest(subject, law, dtype):
    assert law(subject._replace(dtype=dtype), max(LENGTHS)) == []


@pytest.mark.slow
@pytest.mark.parametrize("law, dtype", ((parity, torch.float32), (parity_from_state, torch.float64)))
@pytest.mark.parametrize("subject", SUBJECTS, ids=name_of)
def test_the_longest_in_the_other_dtype(subject, law, dtype):
    assert law(subject._replace(dtype=dtype), max(LENGTHS)) == []

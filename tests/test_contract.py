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


FROM_A_STATE = dict.fromkeys(LENGTHS, (torch.float64, torch.float32)) | {1000: (torch.float32,)}
"""float32 from nothing is `test_dtype`'s: what it loses where it begins from nothing it loses from a State, too."""


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("subject", SUBJECTS, ids=name_of)
def test_length(subject, length):
    assert parity(subject._replace(dtype=torch.float64), length) == []
    for dtype in FROM_A_STATE[length]:
        assert parity_from_state(subject._replace(dtype=dtype), length) == []

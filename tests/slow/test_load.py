"""A pool under load: hundreds of unequal requests come and go, and each reads and writes as if it were alone."""

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from linattn.generate import GREEDY, generate, prefill
from linattn.models import BasedConfig, TransformerConfig, TransNormerConfig, build_model

pytestmark = pytest.mark.slow

REQUESTS, SLOTS = 300, 12
SHAPE: dict[str, Any] = {"d_model": 32, "n_layers": 3, "n_heads": 2, "vocab_size": 97}
MODELS = {
    "based": BasedConfig(**SHAPE, linear_layers=(1,), window_layers=(2,), d_hidden=64, window=17),
    "transnormer": TransNormerConfig(**SHAPE, head_dim=16, d_hidden=64),
    "transformer": TransformerConfig(**SHAPE, d_hidden=64),
}
LONGEST, MOST_NEW = 150, 40


@dataclass
class Request:
    prompt: list[int]
    new: int
    arrives: int
    written: list[int] = field(default_factory=list)


def some_requests():
    draw = random.Random(0)
    return [
        Request([draw.randrange(97) for _ in range(draw.randint(1, LONGEST))], draw.randint(1, MOST_NEW), i // 2)
        for i in range(REQUESTS)
    ]


def serve(model, requests):
    """Every step: newcomers are read into free slots, then all that write take one token; the rest of slots idle."""
    pool = model.new_pool(SLOTS, LONGEST + MOST_NEW)
    waiting, writing, used = deque(requests), {}, [0] * SLOTS
    step = 0
    while waiting or writing:
        for slot in set(range(SLOTS)) - writing.keys():
            if waiting and waiting[0].arrives <= step:
                request = waiting.popleft()
                logits, state = prefill(model, [request.prompt], chunk=64)
                model.put_(pool, torch.tensor([slot], dtype=torch.int32), state)
                request.written.append(int(logits.argmax()))
                writing[slot], used[slot] = request, used[slot] + 1
        for slot in [s for s, r in writing.items() if len(r.written) == r.new]:
            del writing[slot]
        slots = torch.tensor([s if s in writing else -1 for s in range(SLOTS)], dtype=torch.int32)
        tokens = torch.tensor([writing[s].written[-1] if s in writing else 0 for s in range(SLOTS)])
        logits = model.step_(tokens, pool, slots)
        for slot, request in writing.items():
            request.written.append(int(logits[slot].argmax()))
        step += 1
    return used


@pytest.mark.parametrize("name", MODELS)
def test_hundreds_of_requests_share_a_pool_and_none_notices(name):
    torch.manual_seed(0)
    # float64: two tokens within rounding of one another would be no fault of the pool.
    model = build_model(MODELS[name]).double().eval().requires_grad_(False)
    requests = some_requests()
    used = serve(model, requests)
    assert sum(used) == REQUESTS and min(used) >= 5
    for request in requests:
        (alone,) = generate(model, [request.prompt], max_new_tokens=request.new, sampling=GREEDY)
        assert request.written == alone.tokens

"""Mamba's forward pass in torch alone, token after token, on tensors by hazyresearch's and state-spaces' names."""

import torch
from torch.nn import functional as F


def shapes(d=12, layers=2, states=4, kernel=4, rank=3, vocab=37):
    inner = 2 * d
    layer = {
        "mixer.in_proj.weight": (2 * inner, d),
        "mixer.conv1d.weight": (inner, 1, kernel),
        "mixer.conv1d.bias": (inner,),
        "mixer.x_proj.weight": (rank + 2 * states, inner),
        "mixer.dt_proj.weight": (inner, rank),
        "mixer.dt_proj.bias": (inner,),
        "mixer.A_log": (inner, states),
        "mixer.D": (inner,),
        "mixer.out_proj.weight": (d, inner),
        "norm.weight": (d,),
    }
    blocks = {f"backbone.layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()}
    return {"backbone.embedding.weight": (vocab, d), **blocks, "backbone.norm_f.weight": (d,)}


def normed(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def logits(weights, ids):
    """[T, vocab] of ids [T], in the weights' dtype."""
    w = {name.removeprefix("backbone."): x for name, x in weights.items()}
    stream = w["embedding.weight"][ids]
    for i in range(sum(name.endswith("A_log") for name in w)):
        p = {name.removeprefix(f"layers.{i}."): x for name, x in w.items()}
        stream = stream + mixer(p, normed(stream, p["norm.weight"]))
    return normed(stream, w["norm_f.weight"]) @ w["embedding.weight"].T


def mixer(p, u):
    x, gate = (u @ p["mixer.in_proj.weight"].T).chunk(2, dim=-1)
    taps = p["mixer.conv1d.weight"][:, 0]
    before = torch.cat([x.new_zeros(taps.shape[1] - 1, x.shape[1]), x])
    x = F.silu(
        torch.stack([(before[t : t + taps.shape[1]].T * taps).sum(1) for t in range(len(x))]) + p["mixer.conv1d.bias"]
    )
    states = p["mixer.A_log"].shape[1]
    rank = p["mixer.dt_proj.weight"].shape[1]
    low, write, read = (x @ p["mixer.x_proj.weight"].T).split([rank, states, states], dim=-1)
    step = F.softplus(low @ p["mixer.dt_proj.weight"].T + p["mixer.dt_proj.bias"])
    decay = -p["mixer.A_log"].exp()
    memory, out = torch.zeros_like(decay), []
    for t in range(len(x)):
        memory = torch.exp(step[t, :, None] * decay) * memory + (step[t] * x[t])[:, None] * write[t]
        out.append(memory @ read[t] + p["mixer.D"] * x[t])
    return (torch.stack(out) * F.silu(gate)) @ p["mixer.out_proj.weight"].T

"""hazyresearch's Based, read a second time: float64, from the description of the published code, torch alone.

Slow and plain on purpose, one token's keys at a time where that is clearest. It shares nothing with linattn.
"""

import math

import torch


def logits(config, weights, tokens):
    """Logits [T, rows of the embedding] of one document ``tokens`` [T], under the published names."""
    w = {name: x.double() for name, x in weights.items()}
    x = w["transformer.embeddings.word_embeddings.weight"][tokens]
    for i in range(config["n_layer"]):
        layer = {n.split(".", 3)[3]: t for n, t in w.items() if n.startswith(f"transformer.layers.{i}.")}
        h = rms(x, layer["norm1.weight"])
        if i in config["alt_mixer_2_layers"]:
            y = sliding(config, layer, h)
        elif i in config["alt_mixer_layers"]:
            y = linear_attention(config, layer, h)
        else:
            y = base_conv(layer, h)
        x = x + y
        x = x + mlp(layer, rms(x, layer["norm2.weight"]))
    x = rms(x, w["transformer.ln_f.weight"])
    return x @ w["transformer.embeddings.word_embeddings.weight"].T


def rms(x, weight):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def silu(x):
    return x / (1 + torch.exp(-x))


def mlp(layer, h):
    both = h @ layer["mlp.fc1.weight"].T
    half = both.shape[1] // 2
    value, gate = both[:, :half], both[:, half:]
    return (silu(gate) * value) @ layer["mlp.fc2.weight"].T


def base_conv(layer, h):
    u = h @ layer["mixer.in_proj.weight"].T + layer["mixer.in_proj.bias"]
    half = u.shape[1] // 2
    convolved, gate = u[:, :half], u[:, half:]
    taps = layer["mixer.conv.conv.weight"][:, 0]
    y = torch.zeros_like(convolved)
    for t in range(len(h)):
        for back in range(min(3, t + 1)):
            y[t] += taps[:, 2 - back] * convolved[t - back]
    return (silu(y) * gate) @ layer["mixer.out_proj.weight"].T + layer["mixer.out_proj.bias"]


def linear_attention(config, layer, h):
    heads, dim = config["alt_mixer"]["num_heads"], config["alt_mixer"]["feature_dim"]
    q = (h @ layer["mixer.proj_q.weight"].T).view(len(h), heads, dim)
    k = (h @ layer["mixer.proj_k.weight"].T).view(len(h), heads, dim)
    v = (h @ layer["mixer.proj_v.weight"].T).view(len(h), heads, -1)
    y = torch.zeros_like(v)
    for head in range(heads):
        weights = features(q[:, head]) @ features(k[:, head]).T
        weights = weights * torch.ones_like(weights).tril()
        y[:, head] = weights @ v[:, head] / (weights.sum(1, keepdim=True) + 1e-12)
    return y.reshape(len(h), -1) @ layer["mixer.out_proj.weight"].T


def features(x):
    """1, x / d^(1/4), and all products of two entries / (sqrt(2) sqrt(d)): 1 + d + d^2 of them."""
    d = x.shape[1]
    second = (x[:, :, None] * x[:, None, :]).flatten(1)
    return torch.cat([torch.ones_like(x[:, :1]), x / d**0.25, second / (math.sqrt(2) * math.sqrt(d))], 1)


def sliding(config, layer, h):
    heads = config["n_head"]
    qkv = (h @ layer["mixer.Wqkv.weight"].T).view(len(h), 3, heads, -1)
    q, k, v = rotate(qkv[:, 0]), rotate(qkv[:, 1]), qkv[:, 2]
    before = config["alt_mixer_2"]["window_size"] // 2
    y = torch.zeros_like(v)
    for t in range(len(h)):
        first = max(0, t - before)
        scores = torch.einsum("hd,shd->hs", q[t], k[first : t + 1]) / math.sqrt(q.shape[2])
        y[t] = torch.einsum("hs,shd->hd", scores.softmax(1), v[first : t + 1])
    return y.reshape(len(h), -1) @ layer["mixer.out_proj.weight"].T


def rotate(x):
    """Rotary positions over the whole head, base 10,000, feature i with feature i + d/2."""
    half = x.shape[2] // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) * 2 / x.shape[2])
    angle = torch.arange(len(x), dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

"""hazyresearch's attention baseline, read a second time: float64, from the published code's description, torch alone.

Pre-norm blocks of causal softmax attention and SwiGLU; ``rotary_emb_fraction`` of each head is rotated. An odd number
of rotary features (heads of 70, fraction 0.5: 35) has a frequency for each pair and one more, and rotates one more.
"""

import math

import torch


def logits(config, weights, tokens):
    """Logits [T, rows of the embedding] of one document ``tokens`` [T], under the published names."""
    w = {name: x.double() for name, x in weights.items()}
    table = w["transformer.embeddings.word_embeddings.weight"]
    x = table[tokens]
    for i in range(config["n_layer"]):
        at = f"transformer.layers.{i}."
        h = rms(x, w[at + "norm1.weight"])
        x = x + attention(config, h, w[at + "mixer.Wqkv.weight"], w[at + "mixer.out_proj.weight"])
        u = rms(x, w[at + "norm2.weight"]) @ w[at + "mlp.fc1.weight"].T
        hidden = u.shape[1] // 2
        x = x + (u[:, :hidden] * torch.nn.functional.silu(u[:, hidden:])) @ w[at + "mlp.fc2.weight"].T
    return rms(x, w["transformer.ln_f.weight"]) @ table.T


def rms(x, weight):
    return x / torch.sqrt(torch.mean(x * x, dim=-1, keepdim=True) + 1e-5) * weight


def attention(config, x, w_in, w_out):
    length, d_model = x.shape
    heads = config["n_head"]
    dim = d_model // heads
    rows = w_in.view(3, heads, dim, d_model)
    out = torch.zeros(length, heads, dim, dtype=torch.float64)
    for h in range(heads):
        q, k, v = (x @ rows[part, h].T for part in range(3))
        q, k = rotate(q, config["rotary_emb_fraction"]), rotate(k, config["rotary_emb_fraction"])
        for t in range(length):
            p = torch.softmax(k[: t + 1] @ q[t] / math.sqrt(dim), 0)
            out[t, h] = p @ v[: t + 1]
    return out.view(length, -1) @ w_out.T


def rotate(x, fraction):
    rotary = int(x.shape[1] * fraction)
    frequencies = [10000.0 ** (-i / rotary) for i in range(0, rotary, 2)]
    n, y = len(frequencies), x.clone()
    for t in range(len(x)):
        for i, f in enumerate(frequencies):
            c, s = math.cos(t * f), math.sin(t * f)
            y[t, i] = x[t, i] * c - x[t, i + n] * s
            y[t, i + n] = x[t, i] * s + x[t, i + n] * c
    return y

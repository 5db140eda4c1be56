"""OpenNLPLab's TransNormerLLM, read a second time: float64, from the published code's description, torch alone.

TNL1 and TNL2 (qkvu_proj) and TNL3 (qkv_proj and a low-rank gate). Attention is the recurrence itself, token by token.
"""

import math

import torch


def logits(config, weights, tokens):
    """Logits [T, rows of the embedding] of one document ``tokens`` [T], under the published names."""
    w = {name: x.double() for name, x in weights.items()}
    table = w["model.embed_tokens.weight"]
    x = table[tokens]
    if not config["no_scale_embedding"]:
        x = x * math.sqrt(config["decoder_embed_dim"])
    for i in range(config["decoder_layers"]):
        at = f"model.layers.{i}."
        x = x + token_mixer(config, w, i, at + "token_mixer.", srms(x))
        h = srms(x)
        product = (h @ w[at + "channel_mixer.l1.weight"].T) * (h @ w[at + "channel_mixer.l2.weight"].T)
        x = x + product @ w[at + "channel_mixer.l3.weight"].T
    return srms(x) @ table.T


def srms(x):
    return x * (x.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()


def silu(x):
    return x * torch.sigmoid(x)


def token_mixer(config, w, layer, at, h):
    if at + "qkvu_proj.weight" in w:
        q, k, v, u = (h @ part.T for part in w[at + "qkvu_proj.weight"].chunk(4, 0))
        q, k, gate = silu(q), silu(k), u
    else:
        q, k, v = (silu(h @ part.T) for part in w[at + "qkv_proj.weight"].chunk(3, 0))
        gate = torch.sigmoid(h @ w[at + "output_gate.0.weight"].T @ w[at + "output_gate.1.weight"].T)
    heads = config["decoder_attention_heads"]
    q, k, v = (x.view(len(h), heads, -1) for x in (q, k, v))
    if config["linear_use_lrpe_list"][layer] == 1:
        theta = w[at + "lrpe.theta"]
        q, k = lrpe(q, theta), lrpe(k, theta)
    o = torch.zeros_like(v)
    slopes = alibi(heads)
    depth = config["decoder_layers"]
    for head in range(heads):
        keep = math.exp(-slopes[head] * (1 - layer / (depth - 1) + 1e-5))
        memory = torch.zeros(k.shape[2], v.shape[2], dtype=torch.float64)
        for t in range(len(h)):
            memory = keep * memory + torch.outer(k[t, head], v[t, head])
            o[t, head] = q[t, head] @ memory
    return (srms(o.reshape(len(h), -1)) * gate) @ w[at + "out_proj.weight"].T


def lrpe(x, theta):
    """x [T, H, d] -> [T, H, 2d]: by the cosine, then by the sine, of each feature's own angle times the position."""
    angle = torch.arange(len(x), dtype=torch.float64)[:, None, None] * theta[:, 0]
    return torch.cat([x * angle.cos(), x * angle.sin()], -1)


def alibi(heads):
    """2^(-8 h / H), h = 1 .. H, for H a power of two; else those of the power below and every other of the next."""

    def geometric(n):
        return [2.0 ** (-8.0 * (h + 1) / n) for h in range(n)]

    if heads & (heads - 1) == 0:
        return geometric(heads)
    below = 2 ** int(math.log2(heads))
    return geometric(below) + geometric(2 * below)[0::2][: heads - below]

"""hazyresearch's JRT-RNN, read a second time: float64, from the paper's equation and the published code's description.

torch alone, and nothing of linattn. The first ``enc_length`` tokens (or all, if there are fewer) are the encoder's:
their second keys and values are seen by every token, also by earlier ones.
"""

import torch


def logits(config, weights, tokens):
    """Logits [T, rows of the embedding] of one document ``tokens`` [T], under the published names."""
    w = {name: x.double() for name, x in weights.items()}
    embedding = w["transformer.embeddings.word_embeddings.weight"]
    stream = embedding[tokens]
    for i in range(config["n_layer"]):
        prefix = f"transformer.layers.{i}."

        def get(name, prefix=prefix):
            return w[prefix + name]

        if i in config["alt_mixer_2_layers"]:
            mixer = window_mixer
        elif i in config["alt_mixer_layers"]:
            mixer = prefix_mixer
        else:
            mixer = conv_mixer
        stream = stream + mixer(config, get, norm(stream, get("norm1.weight")))
        value, gate = (norm(stream, get("norm2.weight")) @ get("mlp.fc1.weight").T).chunk(2, 1)
        stream = stream + (gate * gate.sigmoid() * value) @ get("mlp.fc2.weight").T
    return norm(stream, w["transformer.ln_f.weight"]) @ embedding.T


def norm(x, weight):
    return weight * x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5)


def prefix_mixer(config, get, x):
    """y_i = sum of w(q_i, k_j) v_j over the causal and the encoder's pairs together, over the sum of the weights."""
    heads, length = config["alt_mixer"]["num_heads"], len(x)
    inside = min(config["alt_mixer"]["enc_length"], length)
    q, k, v = (split(x @ get(f"mixer.proj_{n}.weight").T, heads) for n in "qkv")
    k_enc, v_enc = (split(x[:inside] @ get(f"mixer.proj_{n}_enc.weight").T, heads) for n in "kv")
    causal = weight(q, k).tril()
    encoder = weight(q, k_enc)
    total = causal.sum(2) + encoder.sum(2)
    y = (causal @ v + encoder @ v_enc) / total[..., None]
    return y.transpose(0, 1).reshape(length, -1) @ get("mixer.out_proj.weight").T


def split(x, heads):
    """[T, heads * d] -> [heads, T, d]."""
    return x.view(len(x), heads, -1).transpose(0, 1)


def weight(q, k):
    """1 + s + s^2 / 2 for s = q.k / sqrt(feature dim): [heads, T, S]."""
    s = q @ k.mT / q.shape[2] ** 0.5
    return 1 + s + s * s / 2


def window_mixer(config, get, x):
    """Causal softmax over the token and the window_size // 2 before it, rotary over all of each head."""
    heads, length = config["n_head"], len(x)
    q, k, v = (split(y, heads) for y in (x @ get("mixer.Wqkv.weight").T).chunk(3, 1))
    dim = q.shape[2]
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    turn = torch.polar(torch.ones_like(angle), angle)

    def rotary(y):
        turned = torch.complex(y[..., : dim // 2], y[..., dim // 2 :]) * turn
        return torch.cat([turned.real, turned.imag], -1)

    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & (distance <= config["alt_mixer_2"]["window_size"] // 2)
    scores = (rotary(q) @ rotary(k).mT / dim**0.5).masked_fill(~seen, float("-inf"))
    return (scores.softmax(2) @ v).transpose(0, 1).reshape(length, -1) @ get("mixer.out_proj.weight").T


def conv_mixer(config, get, x):
    """Half of in_proj through a causal depthwise convolution of 3 taps and SiLU, times the other half."""
    u, gate = (x @ get("mixer.in_proj.weight").T + get("mixer.in_proj.bias")).chunk(2, 1)
    padded = torch.cat([u.new_zeros(2, u.shape[1]), u]).T[None]
    y = torch.nn.functional.conv1d(padded, get("mixer.conv.conv.weight"), groups=u.shape[1])[0].T
    return (y * y.sigmoid() * gate) @ get("mixer.out_proj.weight").T + get("mixer.out_proj.bias")

"""DiT, SiT and LightningDiT by their specifications, under the names of their checkpoints; nothing of ours is used."""

import math

import torch
import torch.nn.functional as F
from torch import nn


def sines(t, size):
    w = torch.exp(-math.log(10_000) * torch.arange(size // 2) / (size // 2))
    return torch.cat([torch.cos(t[:, None] * w), torch.sin(t[:, None] * w)], dim=1)


def axis_table(dim, positions):
    w = 10_000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angles = positions.double()[:, None] * w
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def position_table(dim, side):
    y, x = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    return torch.cat([axis_table(dim // 2, x), axis_table(dim // 2, y)], dim=1).float()[None]


class RootMeanSquare(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


class Rotation(nn.Module):
    """Turn the pairs (0, 1), (2, 3) ... of a head by y w in its first half, by x w in its second."""

    def __init__(self, head_dim, side):
        super().__init__()
        half = head_dim // 2
        w = 10_000.0 ** -(torch.arange(0, half, 2) / half)
        y, x = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
        angles = torch.cat([y[:, None] * w, x[:, None] * w], dim=1).repeat_interleave(2, dim=1)  # (N, d)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self, x):
        turned = torch.empty_like(x)
        turned[..., ::2], turned[..., 1::2] = -x[..., 1::2], x[..., ::2]
        return x * self.freqs_cos + turned * self.freqs_sin


class Attention(nn.Module):
    def __init__(self, dim, heads, qk_norm):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        if qk_norm:
            self.q_norm, self.k_norm = RootMeanSquare(dim // heads), RootMeanSquare(dim // heads)
        self.qk_norm = qk_norm

    def forward(self, x, rotation):
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotation(q), rotation(k)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(batch, tokens, dim))


class TanhMLP(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class GatedMLP(nn.Module):
    def __init__(self, dim):
        super().__init__()
        hidden = int(2 / 3 * 4 * dim)
        self.w12, self.w3 = nn.Linear(dim, 2 * hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def norm(dim, rms):
    return RootMeanSquare(dim) if rms else nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


class Block(nn.Module):
    def __init__(self, dim, heads, options):
        super().__init__()
        self.norm1, self.norm2 = norm(dim, "rms" in options), norm(dim, "rms" in options)
        self.attn = Attention(dim, heads, "qk_norm" in options)
        self.mlp = GatedMLP(dim) if "swiglu" in options else TanhMLP(dim)
        self.shifts = "no_shift" not in options
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, (6 if self.shifts else 4) * dim))

    def forward(self, x, c, rotation):
        parts = [part[:, None] for part in self.adaLN_modulation(c).chunk(6 if self.shifts else 4, dim=1)]
        if not self.shifts:
            parts = [0, parts[0], parts[1], 0, parts[2], parts[3]]
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, rotation)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class FinalLayer(nn.Module):
    def __init__(self, dim, outputs, rms):
        super().__init__()
        # Norms without parameters have no names in a state dict.
        self.norm_final, self.linear = norm(dim, rms), nn.Linear(dim, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, c):
        shift, scale = (part[:, None] for part in self.adaLN_modulation(c).chunk(2, dim=1))
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class Reference(nn.Module):
    """A network of DiT's family.

    DiT returns all channels; SiT and LightningDiT return the first half where there are two (`flow`), and see times of
    0, noise, to 1, data.
    """

    def __init__(
        self, dim, depth, heads, patch=2, channels=4, side=4, classes=10, learn_sigma=True, options=(), flow=False
    ):
        super().__init__()
        self.patch, self.side, self.channels, self.flow = patch, side, channels, flow
        self.outputs = (2 if learn_sigma else 1) * channels
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, dim, patch, patch)})
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, dim)})
        self.pos_embed = nn.Parameter(position_table(dim, side), requires_grad=False)
        self.blocks = nn.ModuleList(Block(dim, heads, options) for _ in range(depth))
        self.final_layer = FinalLayer(dim, patch**2 * self.outputs, "rms" in options)
        self.feat_rope = Rotation(dim // heads, side) if "rotary" in options else None

    def forward(self, x, t, y):
        x = self.x_embedder["proj"](x).flatten(2).transpose(1, 2) + self.pos_embed
        c = self.t_embedder["mlp"](sines(t, 256)) + self.y_embedder["embedding_table"](y)
        for block in self.blocks:
            x = block(x, c, self.feat_rope)
        x = self.final_layer(x, c).view(len(x), self.side, self.side, self.patch, self.patch, self.outputs)
        x = torch.einsum("byxpqc->bcypxq", x).reshape(len(x), self.outputs, *2 * [self.side * self.patch])
        return x[:, : self.channels] if self.flow else x


@torch.no_grad()
def random_reference(*args, seed=0, **kwargs):
    """Return a reference with random weights at which all parts count: trained ones are as large."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor, std, mean=0.0):
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    model = Reference(*args, **kwargs)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            normal(module.weight, module.weight[0].numel() ** -0.5)
            normal(module.bias, 0.2)
        elif isinstance(module, RootMeanSquare):
            normal(module.weight, 0.3, 1.0)
    return model.eval()

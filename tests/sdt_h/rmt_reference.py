"""RMT by its specification, plain and slow, under the names of the official checkpoints; nothing of ours is used."""

import math

import torch
import torch.nn.functional as F
from torch import nn

# widths, depths, heads, FFN ratios, ranges of the decay exponents, decomposed stages, LayerScale
RMT = {
    "T": ((64, 128, 256, 512), (2, 2, 8, 2), (4, 4, 8, 16), (3, 3, 3, 3), (4, 4, 6, 6), 2, ()),
    "S": ((64, 128, 256, 512), (3, 4, 18, 4), (4, 4, 8, 16), (4, 4, 3, 3), (4, 4, 6, 6), 3, ()),
    "B": ((80, 160, 320, 512), (4, 8, 25, 8), (5, 5, 10, 16), (4, 4, 3, 3), (5, 5, 6, 6), 3, (2, 3)),
}


def batch_norm(dim):
    return nn.BatchNorm2d(dim, momentum=None)  # statistics of all batches seen, not of the last ones


class DepthWise(nn.Module):
    def __init__(self, dim, size):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, size, padding=size // 2, groups=dim)

    def forward(self, x):  # (b, h, w, c)
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Positions(nn.Module):
    def __init__(self, dim, heads, span):
        super().__init__()
        angle = 1 / 10000 ** torch.linspace(0, 1, dim // heads // 2)
        self.register_buffer("angle", torch.stack([angle, angle], dim=-1).flatten())
        exponents = torch.tensor([2 + span * head / heads for head in range(heads)])
        self.register_buffer("decay", torch.log(1 - 2**-exponents))

    def rotate(self, x):  # (b, heads, h, w, d)
        height, width = x.shape[2:4]
        n = torch.arange(height * width).view(height, width, 1)
        even, odd = x[..., ::2], x[..., 1::2]
        cos, sin = (n * self.angle[::2]).cos(), (n * self.angle[::2]).sin()
        return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)

    def line_mask(self, length):
        n = torch.arange(length)
        return self.decay[:, None, None] * (n[:, None] - n[None, :]).abs()

    def grid_mask(self, height, width):
        y = torch.arange(height).repeat_interleave(width)
        x = torch.arange(width).repeat(height)
        distance = (y[:, None] - y[None, :]).abs() + (x[:, None] - x[None, :]).abs()
        return self.decay[:, None, None] * distance


class Retention(nn.Module):
    def __init__(self, dim, heads, decomposed):
        super().__init__()
        self.heads, self.decomposed = heads, decomposed
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(dim, dim) for _ in range(4))
        self.lepe = DepthWise(dim, 5)

    def forward(self, x, positions):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        lepe = self.lepe(v)
        k = k / math.sqrt(k.shape[-1] // self.heads)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).permute(0, 3, 1, 2, 4) for t in (q, k, v))  # (b, heads, h, w, d)
        q, k = positions.rotate(q), positions.rotate(k)
        out = self.along_lines(q, k, v, positions) if self.decomposed else self.over_grid(q, k, v, positions)
        return self.out_proj(out.permute(0, 2, 3, 1, 4).flatten(-2) + lepe)

    def over_grid(self, q, k, v, positions):
        height, width = q.shape[2:4]
        q, k, v = (t.flatten(2, 3) for t in (q, k, v))
        weights = (torch.einsum("bhid,bhjd->bhij", q, k) + positions.grid_mask(height, width)).softmax(-1)
        return torch.einsum("bhij,bhjd->bhid", weights, v).unflatten(2, (height, width))

    def along_lines(self, q, k, v, positions):
        height, width = q.shape[2:4]
        mask = positions.line_mask(width)[:, None]
        v = torch.einsum("bhyij,bhyjd->bhyid", (torch.einsum("bhyid,bhyjd->bhyij", q, k) + mask).softmax(-1), v)
        mask = positions.line_mask(height)[:, None]
        weights = (torch.einsum("bhixd,bhjxd->bhxij", q, k) + mask).softmax(-1)
        return torch.einsum("bhxij,bhjxd->bhixd", weights, v)


class FeedForward(nn.Module):
    def __init__(self, dim, inner):
        super().__init__()
        self.fc1, self.fc2, self.dwconv = nn.Linear(dim, inner), nn.Linear(inner, dim), DepthWise(inner, 3)

    def forward(self, x):
        u = F.gelu(self.fc1(x))
        return self.fc2(u + self.dwconv(u))


class Block(nn.Module):
    def __init__(self, dim, heads, ratio, decomposed, layer_scale):
        super().__init__()
        self.retention_layer_norm, self.final_layer_norm = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.retention, self.ffn = Retention(dim, heads, decomposed), FeedForward(dim, ratio * dim)
        self.pos = DepthWise(dim, 3)
        self.layer_scale = layer_scale
        if layer_scale:
            self.gamma_1, self.gamma_2 = (nn.Parameter(1e-6 * torch.ones(1, 1, 1, dim)) for _ in range(2))

    def forward(self, x, positions):
        gamma_1, gamma_2 = (self.gamma_1, self.gamma_2) if self.layer_scale else (1, 1)
        x = x + self.pos(x)
        x = x + gamma_1 * self.retention(self.retention_layer_norm(x), positions)
        return x + gamma_2 * self.ffn(self.final_layer_norm(x))


class Downsample(nn.Module):
    def __init__(self, dim, out_dim):
        super().__init__()
        self.reduction, self.norm = nn.Conv2d(dim, out_dim, 3, 2, 1), batch_norm(out_dim)

    def forward(self, x):
        return self.norm(self.reduction(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class Layer(nn.Module):
    def __init__(self, dim, out_dim, depth, heads, ratio, span, decomposed, layer_scale):
        super().__init__()
        self.Relpos = Positions(dim, heads, span)
        self.blocks = nn.ModuleList(Block(dim, heads, ratio, decomposed, layer_scale) for _ in range(depth))
        self.downsample = Downsample(dim, out_dim) if out_dim else None

    def forward(self, x):
        for block in self.blocks:
            x = block(x, self.Relpos)
        return x if self.downsample is None else self.downsample(x)


class Stem(nn.Module):
    def __init__(self, dim):
        super().__init__()

        def conv(a, b, stride):
            return nn.Conv2d(a, b, 3, stride, 1), batch_norm(b)

        first, second = conv(3, dim // 2, 2), conv(dim // 2, dim // 2, 1)
        third, fourth = conv(dim // 2, dim, 2), conv(dim, dim, 1)
        self.proj = nn.Sequential(*first, nn.GELU(), *second, nn.GELU(), *third, nn.GELU(), *fourth)

    def forward(self, x):
        return self.proj(x).permute(0, 2, 3, 1)


class RMTReference(nn.Module):
    def __init__(self, widths, depths, heads, ratios, spans, decomposed_stages, layer_scale_stages, num_classes=1000):
        super().__init__()
        self.patch_embed = Stem(widths[0])
        self.layers = nn.ModuleList(
            Layer(
                *(widths[i], (*widths, None)[i + 1], depths[i], heads[i], ratios[i], spans[i]),
                *(i < decomposed_stages, i in layer_scale_stages),
            )
            for i in range(len(widths))
        )
        self.proj, self.norm = nn.Linear(widths[-1], 1024), batch_norm(1024)
        self.head = nn.Linear(1024, num_classes)

    def forward(self, x):
        x = self.patch_embed(x)
        for layer in self.layers:
            x = layer(x)
        x = F.silu(self.norm(self.proj(x).permute(0, 3, 1, 2)))
        return self.head(x.mean(dim=(2, 3)))


@torch.no_grad()
def randomize_rmt(model, seed=0):
    """Random weights at which attention is sharp, and every branch, position and statistic counts."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor, std, mean=0.0):
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std + mean)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            gain = 2.0 if name.endswith(("q_proj", "k_proj")) else 1.0
            normal(module.weight, gain * module.weight[0].numel() ** -0.5)
            normal(module.bias, 0.1)
        elif isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            normal(module.weight, 0.2, 1.0)
            normal(module.bias, 0.2)
        if isinstance(module, Block) and module.layer_scale:
            normal(module.gamma_1, 0.2, 0.8)
            normal(module.gamma_2, 0.2, 0.8)
    # Statistics near those of images, or the batch norms would wash the images' differences out.
    model.train()(smooth_images(4, (64, 64), seed=seed))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.add_(torch.randn(module.running_mean.shape, generator=generator), alpha=0.1)
            module.running_var.mul_(0.8 + 0.4 * torch.rand(module.running_var.shape, generator=generator))
    return model.eval()


def smooth_images(num, size, seed=0):
    """Images with large and small structures, which differ as wholes, not in their noise only."""
    generator = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.randn(num, 3, 3, 3, generator=generator), size=size, mode="bicubic")
    return coarse + 0.5 * torch.randn(num, 3, *size, generator=generator)

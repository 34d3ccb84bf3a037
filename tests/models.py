"""The few tiny modules that all tests share: no dropout, float32, weights from torch's seed, inputs always the same."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


def randn(*size, seed=0):
    """Normal numbers that do not touch torch's global seed."""
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


class MLP(nn.Module):
    def __init__(self, in_features=8, hidden_features=16, out_features=4):
        super().__init__()
        self.hidden = nn.Linear(in_features, hidden_features)
        self.norm = nn.BatchNorm1d(hidden_features)
        self.output = nn.Linear(hidden_features, out_features)

    def forward(self, x):
        return self.output(F.relu(self.norm(self.hidden(x))))

    def example(self, batch=2):
        return randn(batch, self.hidden.in_features)


class ResidualBlock(nn.Module):
    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        return F.relu(identity + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ConvNet(nn.Module):
    """A ResNet-18 that lost most of its layers, with torchvision's names."""

    def __init__(self, channels=4, classes=3):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.layer1 = nn.Sequential(ResidualBlock(channels, channels))
        self.layer2 = nn.Sequential(ResidualBlock(channels, 2 * channels, stride=2))
        self.fc = nn.Linear(2 * channels, classes)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))).mean(dim=(2, 3)))

    def example(self, batch=2):
        return randn(batch, 3, 8, 8)


class LayerScale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), 0.1))

    def forward(self, x):
        return x * self.gamma


class VisionBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = nn.MultiheadAttention(dim, num_heads=2, batch_first=True)
        self.ls1 = LayerScale(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.ls2 = LayerScale(dim)

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.ls1(self.attn(y, y, y, need_weights=False)[0])
        return x + self.ls2(self.mlp(self.norm2(x)))


class VisionTransformer(nn.Module):
    """Names and ``no_weight_decay()`` as in timm."""

    def __init__(self, dim=8, depth=2, classes=3):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 5, dim))
        self.patch_embed = nn.Conv2d(3, dim, 4, stride=4)
        self.blocks = nn.ModuleList(VisionBlock(dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def no_weight_decay(self):
        return {"pos_embed", "cls_token", "dist_token"}

    def forward(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))

    def example(self, batch=2):
        return randn(batch, 3, 8, 8)


class LlamaRMSNorm(nn.Module):
    """Like that of transformers, it is no subclass of ``nn.RMSNorm``."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class LanguageBlock(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(dim)
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.post_attention_layernorm = LlamaRMSNorm(dim)
        self.gate_up_proj = nn.Linear(dim, 4 * dim, bias=False)
        self.down_proj = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x):
        q, k, v = self.qkv_proj(self.input_layernorm(x)).chunk(3, dim=-1)
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        gate, up = self.gate_up_proj(self.post_attention_layernorm(x)).chunk(2, dim=-1)
        return x + self.down_proj(F.silu(gate) * up)


class LanguageModel(nn.Module):
    """Llama's parts and names, without biases; the head is tied to the embedding."""

    def __init__(self, vocabulary=11, dim=8, depth=2):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, dim)
        self.layers = nn.ModuleList(LanguageBlock(dim) for _ in range(depth))
        self.norm = LlamaRMSNorm(dim)
        self.lm_head = nn.Linear(dim, vocabulary, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))

    def example(self, batch=2):
        return torch.arange(5 * batch).reshape(batch, 5) % self.embed_tokens.num_embeddings


class Recurrent(nn.Module):
    def __init__(self, features=4, hidden_features=6, classes=3):
        super().__init__()
        self.lstm = nn.LSTM(features, hidden_features, batch_first=True)
        self.head = nn.Linear(hidden_features, classes)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])

    def example(self, batch=2):
        return randn(batch, 5, self.lstm.input_size)


MODELS = (MLP, ConvNet, VisionTransformer, LanguageModel, Recurrent)


def many_weights():
    """Weights of several shapes, dtypes and layouts: some small and alike, some larger than a bucket."""
    shapes = [(8, 6), (5, 7), (8, 6), (3, 4, 2), (8, 6), (1200, 1100), (8, 0), (1, 1)]
    weights = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    weights += [randn(7, 5, seed=20).T, randn(8, 6, seed=21).double(), randn(1100, 1000, seed=22).T]
    weights += [randn(4, 3, 2, 2, seed=23).to(memory_format=torch.channels_last), torch.zeros(8, 6)]
    return [*weights, randn(8, 6, seed=24).bfloat16(), randn(5, 7, seed=25).bfloat16()]


class Calls(TorchDispatchMode):
    """Counts what a device has to do: operations that are not views and do more than to allocate."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (
            func.is_view or any(name in str(func) for name in ("empty", "unbind", "detach", "promote_types"))
        )
        return func(*args, **(kwargs or {}))

"""The encoder of T5 1.1 and FLAN-T5 in PyTorch, for prompts of one length, for the Core ML export.

Parameters have the public names. Values of the residual stream are too large for float16.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlx_snapgen.networks.text_encoders.t5 import buckets
from mlx_snapgen.public_config import T5Config

HIDDEN = -1e4
"""Added to the scores of padding."""
FIRST = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"


class Norm(nn.Module):
    def __init__(self, dims: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dims))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    def __init__(self, config: T5Config, *, has_bias: bool):
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.q, self.k, self.v = (
            nn.Linear(config.hidden_size, inner, bias=False) for _ in range(3)
        )
        self.o = nn.Linear(inner, config.hidden_size, bias=False)
        if has_bias:
            self.relative_attention_bias = nn.Embedding(config.num_buckets, config.num_heads)
        self.heads = config.num_heads

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (f(x).reshape(b, n, self.heads, -1).transpose(1, 2) for f in self.projections())
        weights = (q @ k.transpose(2, 3) + bias).softmax(-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))

    def projections(self) -> tuple[nn.Linear, ...]:
        return self.q, self.k, self.v


class MLP(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.wi_0, self.wi_1 = (
            nn.Linear(config.hidden_size, config.mlp_size, bias=False) for _ in range(2)
        )
        self.wo = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class Layer(nn.Module):
    """A norm and the module `name`, and the residual around both."""

    def __init__(self, name: str, module: nn.Module, config: T5Config):
        super().__init__()
        self.add_module(name, module)
        self.layer_norm = Norm(config.hidden_size, config.norm_eps)
        self.name = name

    def forward(self, x: Tensor, *bias: Tensor) -> Tensor:
        return x + self.get_submodule(self.name)(self.layer_norm(x), *bias)


class Block(nn.Module):
    def __init__(self, config: T5Config, *, has_bias: bool):
        super().__init__()
        modules = {
            "SelfAttention": Attention(config, has_bias=has_bias),
            "DenseReluDense": MLP(config),
        }
        self.layer = nn.ModuleList(Layer(name, m, config) for name, m in modules.items())

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return self.layer[1](self.layer[0](x, bias))


class Stack(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.block = nn.ModuleList(Block(config, has_bias=i == 0) for i in range(config.num_layers))
        self.final_layer_norm = Norm(config.hidden_size, config.norm_eps)


class T5(nn.Module):
    """tokens (1, length) int32 and mask (1, length) -> text (1, length, D)."""

    places: Tensor

    def __init__(self, config: T5Config, length: int):
        super().__init__()
        self.shared = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder = Stack(config)
        places = buckets(length, count=config.num_buckets, max_distance=config.max_distance)
        self.register_buffer("places", torch.tensor(places), persistent=False)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        first = self.encoder.get_parameter(FIRST)
        bias = first[self.places].permute(2, 0, 1)[None] + HIDDEN * (1 - mask[:, None, None])
        x = self.shared(tokens)
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)

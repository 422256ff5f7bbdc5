"""One process against a model, an optimizer and a loop in plain PyTorch, written here with none of our layers.

The weights are copied by name. Only their arrangement is ours and has to be undone: the projection of queries, keys
and values by key/value group, and gate and up of a gated layer in one tensor.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.config import Config
from megatron_lite.training.engine import Engine
from tests.distributed import run_ranks
from tests.parity import LOSS, NORM
from tests.training_case import Case, global_batch, import_what_ranks_import, make_engine, train

Weights = dict[str, Tensor]


class PlainNorm(nn.Module):
    def __init__(self, weights: Weights, name: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(weights[f"{name}.weight"])
        self.bias = nn.Parameter(weights[f"{name}.bias"]) if f"{name}.bias" in weights else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:  # LayerNorm
            centered = x - x.mean(-1, keepdim=True)
            return (
                centered / torch.sqrt(centered.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight + self.bias
            )
        return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.size(1), weight.size(0), bias=bias is not None)
    layer.weight = nn.Parameter(weight.clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone())
    return layer


def rotate(x: Tensor) -> Tensor:
    """Rotary positions by complex numbers; feature i is paired with i + d/2."""
    d = x.size(-1)
    angles = torch.outer(torch.arange(x.size(-2)), 10000.0 ** (-torch.arange(0, d, 2) / d))
    turned = torch.complex(x[..., : d // 2], x[..., d // 2 :]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag), dim=-1)


class PlainBlock(nn.Module):
    def __init__(self, weights: Weights, name: str, heads: int, groups: int, rope: bool) -> None:
        super().__init__()
        self.heads, self.groups, self.rope = heads, groups, rope
        self.norm1 = PlainNorm(weights, f"{name}.input_layernorm")
        self.norm2 = PlainNorm(weights, f"{name}.pre_mlp_layernorm")
        get = weights.get
        qkv, bias = weights[f"{name}.attention.linear_qkv.weight"], get(f"{name}.attention.linear_qkv.bias")
        per_group = heads // groups
        self.d = qkv.size(0) // (groups * (per_group + 2))

        def part(rows: Tensor | None, first: int, last: int) -> Tensor | None:
            if rows is None:
                return None
            return rows.view(groups, per_group + 2, self.d, -1)[:, first:last].reshape(-1, *rows.shape[1:])

        def projection(first: int, last: int) -> nn.Linear:
            weight = part(qkv, first, last)
            assert weight is not None
            return linear(weight, part(bias, first, last))

        self.q = projection(0, per_group)
        self.k = projection(per_group, per_group + 1)
        self.v = projection(per_group + 1, per_group + 2)
        self.out = linear(
            weights[f"{name}.attention.linear_proj.weight"], get(f"{name}.attention.linear_proj.bias")
        )
        fc1, fc1_bias = weights[f"{name}.mlp.linear_fc1.weight"], get(f"{name}.mlp.linear_fc1.bias")
        self.gate = linear(fc1[0], None) if fc1.dim() == 3 else None
        self.up = linear(fc1[1], None) if fc1.dim() == 3 else linear(fc1, fc1_bias)
        self.down = linear(weights[f"{name}.mlp.linear_fc2.weight"], get(f"{name}.mlp.linear_fc2.bias"))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        y = self.norm2(x)
        if self.gate is None:
            inner = self.up(y)
            inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        else:
            gate = self.gate(y)
            inner = gate * torch.sigmoid(gate) * self.up(y)
        return x + self.down(inner)

    def attend(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q = self.q(x).view(b, s, self.heads, self.d).transpose(1, 2)
        k, v = (layer(x).view(b, s, self.groups, self.d).transpose(1, 2) for layer in (self.k, self.v))
        if self.rope:
            q, k = rotate(q), rotate(k)
        outputs = []
        for head in range(self.heads):
            group = head * self.groups // self.heads
            scores = q[:, head] @ k[:, group].transpose(1, 2) / math.sqrt(self.d)
            scores = scores + torch.full((s, s), -torch.inf).triu(1)
            outputs.append(scores.softmax(-1) @ v[:, group])
        return self.out(torch.cat(outputs, dim=-1))


class PlainModel(nn.Module):
    def __init__(self, config: Config, weights: Weights) -> None:
        super().__init__()
        c = config.model
        self.vocab = c.vocab_size
        self.embed = nn.Parameter(weights["embed.weight"])
        self.positions = nn.Parameter(weights["position.weight"]) if "position.weight" in weights else None
        self.blocks = nn.ModuleList(
            PlainBlock(
                weights, f"blocks.{i}", c.num_attention_heads, c.query_groups, c.position_embedding == "rope"
            )
            for i in range(c.num_layers)
        )
        self.norm = PlainNorm(weights, "norm")
        self.head = nn.Parameter(weights["head.weight"]) if "head.weight" in weights else None

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed[tokens]
        if self.positions is not None:
            x = x + self.positions[: tokens.size(1)]
        for block in self.blocks:
            x = block(x)
        logits = self.norm(x) @ (self.embed if self.head is None else self.head).T
        return logits[..., : self.vocab]


def plain_training(case: Case, weights: Weights) -> list[tuple[float, float]]:
    config = case.config()
    o = config.optimizer
    model = PlainModel(config, weights)
    groups: Any = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": o.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps)
    out = []
    for step in range(case.steps):
        rate = o.lr * (step + 1) / o.warmup_steps
        if step >= o.warmup_steps:
            done = (step - o.warmup_steps) / (config.train.steps - o.warmup_steps)
            rate = 0.5 * o.lr * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = rate
        tokens = torch.from_numpy(global_batch(step, config)[0])
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
        optimizer.step()
        out.append((loss.item(), norm.item()))
    return out


def both(case: Case) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    engine: Engine = make_engine(case.config())
    weights = {name: parameter.detach().clone() for name, parameter in engine.named_parameters()}
    return plain_training(case, weights), train(engine, range(case.steps))


CASES = {
    "gpt2": Case(zero=0),
    "gpt2, one projection of the head": Case(zero=0, tied=False),
    "llama": Case(zero=0, style="llama", tied=False),
    "llama, tied": Case(zero=0, style="llama"),
    "through zero 1": Case(zero=1, style="llama", tied=False),
    "reference attention": Case(zero=0, style="llama", settings={"kernels.attention": "reference"}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_same_training(case: Case) -> None:
    import_what_ranks_import()
    case = replace(case, settings={**case.settings, "optimizer.schedule": "cosine"})
    ((expected, found),) = run_ranks(1, both, case)
    assert expected[-1][0] < expected[0][0] - 0.2, "nothing was learned"
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], abs=LOSS)
    assert [norm for _, norm in found] == pytest.approx([norm for _, norm in expected], rel=NORM)

"""The opponent: GPT-2 and Llama and their training step in plain PyTorch, written the way nanoGPT and HF do it.

Nothing of the model, the loss, the optimizer or the step is ours: nn.Linear, scaled_dot_product_attention, cross
entropy over all logits at once, torch's AdamW (fused only on CUDA, as nanoGPT asks for it), clip_grad_norm_, and for
bf16 fp32 weights under autocast.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.config import Config, ModelConfig


class PlainBlock(nn.Module):
    """GPT-2's block: pre-norm attention and feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.add_bias_linear
        self.heads = config.num_attention_heads
        self.attention_dropout = config.attention_dropout
        self.ln_1 = nn.LayerNorm(width, eps=config.norm_epsilon, bias=bias)
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)
        self.ln_2 = nn.LayerNorm(width, eps=config.norm_epsilon, bias=bias)
        self.c_fc = nn.Linear(width, config.ffn_size, bias=bias)
        self.act = nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none")
        self.mlp_proj = nn.Linear(config.ffn_size, width, bias=bias)
        self.drop = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor) -> Tensor:
        b, s, width = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).split(width, dim=2)
        q, k, v = (part.view(b, s, self.heads, width // self.heads).transpose(1, 2) for part in (q, k, v))
        dropout = self.attention_dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        x = x + self.drop(self.c_proj(y.transpose(1, 2).contiguous().view(b, s, width)))
        return x + self.drop(self.mlp_proj(self.act(self.c_fc(self.ln_2(x)))))


class PlainLlamaBlock(nn.Module):
    """Llama's block: RMSNorm, rotary positions, grouped queries, SwiGLU, no biases."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, size = config.hidden_size, config.head_dim
        self.head_dim, self.repeats = size, config.num_attention_heads // config.query_groups
        self.input_layernorm = nn.RMSNorm(width, eps=config.norm_epsilon)
        self.q_proj = nn.Linear(width, config.num_attention_heads * size, bias=False)
        self.k_proj = nn.Linear(width, config.query_groups * size, bias=False)
        self.v_proj = nn.Linear(width, config.query_groups * size, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * size, width, bias=False)
        self.post_attention_layernorm = nn.RMSNorm(width, eps=config.norm_epsilon)
        self.gate_proj = nn.Linear(width, config.ffn_size, bias=False)
        self.up_proj = nn.Linear(width, config.ffn_size, bias=False)
        self.down_proj = nn.Linear(config.ffn_size, width, bias=False)
        frequencies = config.rotary_base ** (-torch.arange(0, size, 2).float() / size)
        angles = torch.outer(torch.arange(config.seq_length), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:
        cos, sin = (table[: x.size(2)].to(x.dtype) for table in (self.cos, self.sin))
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        normed = self.input_layernorm(x)
        q, k, v = (
            linear(normed).view(b, s, -1, self.head_dim).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.rotate(q), self.rotate(k)
        grouped = self.repeats > 1 and x.is_cuda  # torch's CPU kernel takes no grouped heads
        if self.repeats > 1 and not grouped:
            k, v = k.repeat_interleave(self.repeats, dim=1), v.repeat_interleave(self.repeats, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        x = x + self.o_proj(y.transpose(1, 2).reshape(b, s, -1))
        normed = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(normed)) * self.up_proj(normed))


class PlainGPT(nn.Module):
    """GPT-2's architecture with tied embeddings, or Llama's.

    Raises:
        ValueError: the configuration is of neither kind.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c, width = config, config.hidden_size
        self.llama = c.normalization == "RMSNorm"
        kind = (c.position_embedding, c.activation == "swiglu", c.qk_layernorm, c.rotary_percent)
        if self.llama:
            dropped, biases = c.hidden_dropout or c.attention_dropout, c.add_bias_linear or c.qkv_bias
            plain = kind == ("rope", True, False, 1.0) and not (biases or dropped or c.rotary_scaling)
        else:
            plain = kind == ("learned_absolute", False, False, 1.0) and c.tie_embeddings
            plain = plain and c.query_groups == c.num_attention_heads
        if not plain:
            raise ValueError(
                "the plain model is GPT-2's (learned positions, LayerNorm, GELU, tied embeddings) or Llama's "
                "(rotary positions, RMSNorm, SwiGLU, no biases, no dropout)"
            )
        self.wte = nn.Embedding(c.padded_vocab_size, width)
        self.wpe = None if self.llama else nn.Embedding(c.max_positions, width)
        self.drop = nn.Dropout(c.hidden_dropout)
        self.blocks = nn.ModuleList(
            (PlainLlamaBlock if self.llama else PlainBlock)(c) for _ in range(c.num_layers)
        )
        self.ln_f: nn.Module = (
            nn.RMSNorm(width, eps=c.norm_epsilon)
            if self.llama
            else nn.LayerNorm(width, eps=c.norm_epsilon, bias=c.add_bias_linear)
        )
        self.lm_head = nn.Linear(width, c.padded_vocab_size, bias=False)
        if c.tie_embeddings:
            self.wte.weight = self.lm_head.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=c.init_method_std)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Tokens and labels [b, s] -> mean loss in nats."""
        x = self.wte(tokens)
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(tokens.size(1), device=tokens.device))
        x = self.drop(x)
        for block in self.blocks:
            x = block(x)
        return self.loss(x, labels)

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Hidden states [b, s, h] -> mean loss; cross entropy in fp32, as autocast and Hugging Face have it."""
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)).float(), labels.view(-1))

    def compile_blocks(self) -> None:
        """torch.compile block by block, the loss as well: quicker to compile than the whole where blocks are many."""
        for block in self.blocks:
            block.compile()
        self.loss = torch.compile(self.loss)  # type: ignore[method-assign]


class PlainTrainer:
    """The training step.

    Args:
        compiled: "" not at all, "model" as a whole, "blocks" each block and the loss.
    """

    def __init__(self, model: PlainGPT, config: Config, compiled: str = "") -> None:
        self.model, self.limit, self.device = (
            model,
            config.optimizer.grad_clip,
            next(model.parameters()).device,
        )
        settings = config.optimizer
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=(settings.beta1, settings.beta2),
            eps=settings.eps,
            fused=self.device.type == "cuda",
        )
        if compiled == "blocks":
            model.compile_blocks()
        self.run = torch.compile(model) if compiled == "model" else model
        bf16 = config.train.precision == "bf16"
        self.autocast = torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()

    def step(
        self, batches: Sequence[tuple[Tensor, Tensor]], rate: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step on (tokens, labels) of each micro-batch: its loss, and the gradient norm before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"] if rate is None else rate
        total = torch.zeros((), device=self.device)
        for tokens, labels in batches:
            with self.autocast:
                loss = self.run(tokens, labels) / len(batches)
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm


@torch.no_grad()
def take_weights(plain: PlainGPT, ours: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Copies our weights by canonical name; ours lays query, key and value out group by group."""
    groups, per_group = config.query_groups, config.num_attention_heads // config.query_groups
    for name, tensor in plain.named_parameters():
        owner, _, kind = name.rpartition(".")
        if owner in ("wte", "lm_head"):
            tied = config.tie_embeddings or owner == "wte"
            tensor.copy_(ours["embed.weight" if tied else "head.weight"])
        elif not owner.startswith("blocks."):
            tensor.copy_(ours[{"wpe": "position", "ln_f": "norm"}[owner] + f".{kind}"])
        else:
            _, number, part = owner.split(".")
            found = ours[f"blocks.{number}.{_NAMES[part]}.{kind}"]
            if part in ("c_attn", "q_proj", "k_proj", "v_proj"):
                rows = found.unflatten(0, (groups, per_group + 2, config.head_dim))
                q, k, v = (p.flatten(0, 2) for p in rows.split((per_group, 1, 1), dim=1))
                found = {"c_attn": torch.cat((q, k, v)), "q_proj": q, "k_proj": k, "v_proj": v}[part]
            elif part in ("gate_proj", "up_proj"):
                found = found[0 if part == "gate_proj" else 1]
            tensor.copy_(found)


_NAMES = {
    "ln_1": "input_layernorm",
    "c_attn": "attention.linear_qkv",
    "c_proj": "attention.linear_proj",
    "ln_2": "pre_mlp_layernorm",
    "c_fc": "mlp.linear_fc1",
    "mlp_proj": "mlp.linear_fc2",
    "input_layernorm": "input_layernorm",
    "q_proj": "attention.linear_qkv",
    "k_proj": "attention.linear_qkv",
    "v_proj": "attention.linear_qkv",
    "o_proj": "attention.linear_proj",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "gate_proj": "mlp.linear_fc1",
    "up_proj": "mlp.linear_fc1",
    "down_proj": "mlp.linear_fc2",
}

"""The opponent: a GPT and its training step in plain PyTorch, written the way nanoGPT does it.

Nothing of the model, the loss, the optimizer or the step is ours: nn.Linear, scaled_dot_product_attention, cross
entropy over all logits at once, torch's AdamW (fused only on CUDA, as nanoGPT asks for it), clip_grad_norm_, and for
bf16 fp32 weights under autocast.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_lite.config import Config, ModelConfig


class PlainBlock(nn.Module):
    """Pre-norm attention and feed-forward."""

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


class PlainGPT(nn.Module):
    """GPT-2's architecture with tied embeddings.

    Raises:
        ValueError: the configuration is not of GPT-2's kind.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        kind = (config.position_embedding, config.normalization, config.tie_embeddings, config.qk_layernorm)
        plain = kind == ("learned_absolute", "LayerNorm", True, False) and config.activation != "swiglu"
        if not plain or config.query_groups != config.num_attention_heads:
            raise ValueError(
                "the plain model is GPT-2's: learned positions, LayerNorm, GELU, tied embeddings"
            )
        self.wte = nn.Embedding(config.padded_vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_positions, config.hidden_size)
        self.drop = nn.Dropout(config.hidden_dropout)
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.num_layers))
        self.ln_f = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon, bias=config.add_bias_linear)
        self.lm_head = nn.Linear(config.hidden_size, config.padded_vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=config.init_method_std)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Tokens and labels [b, s] -> mean loss in nats."""
        x = self.drop(self.wte(tokens) + self.wpe(torch.arange(tokens.size(1), device=tokens.device)))
        for block in self.blocks:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))


def plain_step(
    model: PlainGPT, config: Config, batches: list[tuple[Tensor, Tensor]], compiled: bool = False
) -> Callable[[], tuple[Tensor, Tensor]]:
    """What does one training step on the micro-batches and gives the loss and the gradient norm before clipping."""
    settings, device = config.optimizer, next(model.parameters()).device
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=device.type == "cuda",
    )
    run = torch.compile(model) if compiled else model
    autocast = (
        torch.autocast(device.type, torch.bfloat16) if config.train.precision == "bf16" else nullcontext()
    )

    def step() -> tuple[Tensor, Tensor]:
        total = torch.zeros((), device=device)
        for tokens, labels in batches:
            with autocast:
                loss = run(tokens, labels) / len(batches)
            loss.backward()
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total, norm

    return step

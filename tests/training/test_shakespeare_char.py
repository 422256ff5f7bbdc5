"""configs/shakespeare_char.json, from its text to its losses, follows a nanoGPT-style model in plain PyTorch."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.shakespeare_char import prepare
from megatron_lite.config import Config, load_config
from megatron_lite.data.build import build_datasets
from megatron_lite.data.loader import DataLoader
from megatron_lite.model.gpt import GPT
from megatron_lite.model.runtime import Runtime
from megatron_lite.parallel.mesh import Mesh
from tests.command_line import ROOT, rows, run_command
from tests.distributed import run_ranks

CONFIG = ROOT / "configs/shakespeare_char.json"
STEPS, BATCH = 30, 1
LOSS, NORM = 2e-6, 2e-5  # relative; seen: 2e-7 and 6e-6


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)
        self.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.c_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, h = x.shape
        q, k, v = (
            y.view(b, s, self.heads, -1).transpose(1, 2) for y in self.c_attn(self.ln_1(x)).split(h, -1)
        )
        scores = q @ k.transpose(-2, -1) / math.sqrt(h // self.heads)
        scores = scores.masked_fill(torch.ones(s, s, dtype=torch.bool).triu(1), -math.inf)
        x = x + self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, h))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x))))


class NanoGPT(nn.Module):
    def __init__(self, vocabulary: int, length: int, layers: int, heads: int, width: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.h = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.ln_f = nn.LayerNorm(width, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.size(1)))
        for layer in self.h:
            x = layer(x)
        return F.cross_entropy((self.ln_f(x) @ self.wte.weight.T).flatten(0, 1), targets.flatten())


@torch.no_grad()
def copy_weights(plain: NanoGPT, ours: dict[str, Tensor], heads: int) -> None:
    """Ours holds queries, keys and values by head, nanoGPT one after the other."""
    copied = {"wte": "embed", "wpe": "position", "ln_f": "norm"}
    for number, layer in enumerate(plain.h):
        block = f"blocks.{number}"
        qkv = ours.pop(f"{block}.attention.linear_qkv.weight")
        assert isinstance(layer, Layer)
        layer.c_attn.weight.copy_(qkv.view(heads, 3, -1, qkv.size(1)).transpose(0, 1).reshape(qkv.shape))
        copied |= {
            f"h.{number}.ln_1": f"{block}.input_layernorm",
            f"h.{number}.c_proj": f"{block}.attention.linear_proj",
            f"h.{number}.ln_2": f"{block}.pre_mlp_layernorm",
            f"h.{number}.c_fc": f"{block}.mlp.linear_fc1",
            f"h.{number}.c_out": f"{block}.mlp.linear_fc2",
        }
    for theirs, name in copied.items():
        plain.get_parameter(f"{theirs}.weight").copy_(ours.pop(f"{name}.weight"))
    assert not ours, "all of the model has its place in the plain one"


def train_plain(config: Config) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, by the recipe of nanoGPT's train.py."""
    model, optimizer, train = config.model, config.optimizer, config.train
    assert model.vocab_size is not None
    plain = NanoGPT(
        model.vocab_size, model.seq_length, model.num_layers, model.num_attention_heads, model.hidden_size
    )
    ours = {
        name: weight.detach()
        for name, weight in GPT(model, Runtime(Mesh(), seed=train.seed)).named_parameters()
    }
    copy_weights(plain, ours, model.num_attention_heads)
    matrices = [weight for weight in plain.parameters() if weight.dim() == 2]
    vectors = [weight for weight in plain.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.99), eps=1e-8)
    dataset, _, _ = build_datasets(
        config.data, model.seq_length, train.seed, train.steps * train.global_batch_size
    )
    loader = DataLoader(dataset, train.global_batch_size, train.global_batch_size, num_workers=0)
    assert (optimizer.lr, optimizer.warmup_steps, train.exit_after_steps) == (
        1e-3,
        100,
        train.exit_after_steps,
    )
    done = []
    for step in range(train.exit_after_steps or 0):
        rate = 1e-3 * (step + 1) / 100
        if step >= 100:
            rate = 1e-4 + 0.5 * 9e-4 * (1 + math.cos(math.pi * (step - 100) / (train.steps - 100)))
        for group in adam.param_groups:
            group["lr"] = rate
        (batch,) = loader.next_step()
        loss = plain(torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels))
        adam.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        adam.step()
        done.append((float(loss.detach()), float(norm)))
    return done


def compare(text: str, folder: Path, steps: int, batch: int) -> tuple[list[tuple[float, float]], ...]:
    """(loss, gradient norm) of each step: ours by the command line, and the plain model's."""
    prepare(text, folder)
    settings = [
        f"data.tokenizer=char:{folder}/tokenizer.json",
        f"data.train={folder}/train_text_document",
        f"data.valid={folder}/valid_text_document",
        f"train.output_dir={folder}",
        f"train.exit_after_steps={steps}",
        f"train.micro_batch_size={batch}",
        f"train.global_batch_size={batch}",
        "train.device=cpu",
        "model.hidden_dropout=0",
        "model.attention_dropout=0",
    ]
    (result,) = run_command(["--config", str(CONFIG), *(word for one in settings for word in ("--set", one))])
    assert result.status == 0, result.err
    ours = [(row["loss"], row["grad_norm"]) for row in rows(folder) if "loss" in row]
    config = load_config(CONFIG, settings).with_vocab_size(len(set(text)) + 2)
    (plain,) = run_ranks(1, train_plain, config)
    return ours, plain


@pytest.mark.slow
def test_losses_follow_plain_pytorch(real_data: Path, tmp_path: Path) -> None:
    text = (real_data / "text/tinyshakespeare.txt").read_text()
    ours, plain = compare(text, tmp_path, STEPS, BATCH)
    assert len(ours) == len(plain) == STEPS
    assert plain[-1][0] < plain[0][0] - 1, "it learns"
    assert [loss for loss, _ in ours] == pytest.approx([loss for loss, _ in plain], rel=LOSS)
    assert [norm for _, norm in ours] == pytest.approx([norm for _, norm in plain], rel=NORM)

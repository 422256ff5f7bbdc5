"""The source tree follows the floor plan, and the check that says so finds planted violations."""

from pathlib import Path

import pytest

from tests.floor_plan import check_source, check_tree, source_files

ROOT = Path(__file__).resolve().parent.parent


def test_the_tree_follows_the_floor_plan() -> None:
    assert source_files(ROOT)
    assert check_tree(ROOT) == []


@pytest.mark.parametrize(
    ("path", "source", "problem"),
    [
        # levels
        ("megatron_lite/config/load.py", "from megatron_lite.data import gpt", "imports data (level 1)"),
        ("megatron_lite/config.py", "from . import model", "imports model (level 3)"),
        ("megatron_lite/data/gpt.py", "from ..model.gpt import GPT", "imports model (level 3)"),
        ("megatron_lite/model/gpt.py", "import megatron_lite.training.loop", "imports training (level 5)"),
        ("megatron_lite/model/gpt.py", "def f():\n    from megatron_lite import training", "model/gpt.py:2:"),
        ("megatron_lite/data/gpt.py", "import megatron_lite.corpus", "imports corpus (level 1)"),
        ("megatron_lite/ops/norm.py", "from ..tokenizers import byte", "imports tokenizers (level 1)"),
        ("megatron_lite/training/loop.py", "from ..inference import generate", "imports inference (level 5)"),
        ("megatron_lite/training/a/b.py", "from ...inference import generate", "imports inference (level 5)"),
        (
            "megatron_lite/data/x.py",
            "import importlib\nimportlib.import_module('megatron_lite.model')",
            "level 3",
        ),
        ("megatron_lite/attic/x.py", "", "'attic' has no level"),
        (
            "megatron_lite/__init__.py",
            "from megatron_lite.config import Config",
            "own __init__ imports config",
        ),
        ("megatron_lite/training/loop.py", "from tools.generate import main", "nothing imports scripts"),
        ("tools/generate.py", "import pretrain_gpt", "nothing imports scripts"),
        # doors
        ("megatron_lite/training/loop.py", "import deepspeed", "imports deepspeed, whose door is"),
        ("megatron_lite/parallel/mesh.py", "from deepspeed import comm", "imports deepspeed, whose door is"),
        ("pretrain_gpt.py", "import deepspeed.comm as dist", "imports deepspeed, whose door is"),
        (
            "megatron_lite/data/gpt.py",
            "from tokenizers import Tokenizer",
            "imports tokenizers, whose door is",
        ),
        ("tools/preprocess_data.py", "import tiktoken", "imports tiktoken, whose door is"),
        ("megatron_lite/corpus/x.py", "import sentencepiece as spm", "imports sentencepiece, whose door is"),
        ("tools/convert_checkpoint.py", "from transformers import AutoModel", "imports transformers, whose"),
        ("megatron_lite/training/x.py", "from safetensors.torch import load", "imports safetensors, whose"),
        ("megatron_lite/checkpoint/reader.py", "import pickle", "imports pickle, whose door is"),
        ("megatron_lite/training/x.py", "from pickle import loads", "imports pickle, whose door is"),
        ("tools/x.py", "import _pickle", "imports _pickle, whose door is"),
        ("tools/x.py", "import torch\ntorch.load('x')", "x.py:2: imports torch.load, whose door is"),
        ("megatron_lite/checkpoint/x.py", "from torch import load", "imports torch.load, whose door is"),
        ("megatron_lite/model/x.py", "import flash_attn", "imports flash_attn, whose door is"),
        (
            "megatron_lite/model/x.py",
            "import transformer_engine.pytorch",
            "imports transformer_engine, whose",
        ),
        ("megatron_lite/model/x.py", "import apex", "imports apex, whose door is"),
        (
            "tools/inspect_data.py",
            "from megatron_lite.data import _index",
            "imports megatron_lite.data._index",
        ),
        ("megatron_lite/corpus/x.py", "from ..data import _index", "imports megatron_lite.data._index"),
        ("megatron_lite/data/loader.py", "import torch", "data imports torch"),
        ("megatron_lite/config/x.py", "from torch import nn", "config imports torch"),
        # environment
        ("megatron_lite/model/x.py", "import os\nos.environ['A']", "x.py:2: reads the environment"),
        ("megatron_lite/model/x.py", "import os\nos.environ.get('A')", "reads the environment"),
        ("megatron_lite/ops/x.py", "import os\nos.getenv('A')", "reads the environment"),
        ("tools/x.py", "from os import environ", "reads the environment"),
        ("tools/x.py", "import os as o\nenv = dict(o.environ)", "reads the environment"),
        # sizes
        ("megatron_lite/model/x.py", "x = 1\n" * 401, "401 lines, over the limit of 400"),
        ("tools/x.py", "async def f():\n" + "    pass\n" * 80, "f has 81 lines, over the limit of 80"),
        (
            "pretrain_gpt.py",
            "class A:\n    def f(self):\n" + "        pass\n" * 80,
            "f has 81 lines, over the limit of 80",
        ),
    ],
)
def test_a_violation_is_found(path: str, source: str, problem: str) -> None:
    found = check_source(path, source)
    assert len(found) == 1, found
    assert problem in found[0]
    assert found[0].startswith(path + ":")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("megatron_lite/__init__.py", '__version__ = "1"'),
        ("megatron_lite/config/load.py", "from .tree import Config\nfrom megatron_lite.config import errors"),
        (
            "megatron_lite/corpus/encode.py",
            "from ..tokenizers import load_tokenizer\nfrom ..data import indexed",
        ),
        ("megatron_lite/corpus/encode.py", "from megatron_lite.tokenizers import byte"),
        ("megatron_lite/training/loop.py", "from megatron_lite import __version__, checkpoint, model"),
        ("megatron_lite/training/engine.py", "import deepspeed\nfrom deepspeed.runtime import engine"),
        ("megatron_lite/parallel/pipeline.py", "from deepspeed.pipe import PipelineModule"),
        (
            "megatron_lite/tokenizers/huggingface.py",
            "def load():\n    import tokenizers, tiktoken, sentencepiece",
        ),
        ("megatron_lite/checkpoint/store.py", "import torch\nfrom safetensors import safe_open"),
        ("megatron_lite/checkpoint/foreign/x.py", "import pickle, torch\ntorch.load('x')"),
        (
            "megatron_lite/data/sample_index.py",
            "from . import _index\nfrom megatron_lite.data._index import f",
        ),
        ("megatron_lite/ops/attention.py", "import flash_attn, transformer_engine, apex, torch"),
        ("megatron_lite/parallel/launch.py", "import os\nrank = int(os.environ['RANK'])"),
        ("megatron_lite/training/x.py", "import os\nos.environ['A'] = '1'\ndel os.environ['B']"),
        ("tools/generate.py", "import torch\nfrom megatron_lite.inference import generate"),
        ("pretrain_gpt.py", "import os\nfrom megatron_lite.training import loop\nos.getenv('A')"),
        ("megatron_lite/model/x.py", "x = 1\n" * 400),
        ("megatron_lite/model/x.py", "def f():\n" + "    pass\n" * 79),
    ],
)
def test_what_the_plan_allows_passes(path: str, source: str) -> None:
    assert check_source(path, source) == []


def test_the_whole_tree_is_walked(tmp_path: Path) -> None:
    for name in ("megatron_lite/model/deep/x.py", "tools/x.py", "pretrain_gpt.py", "setup.py", "docs/x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("import deepspeed\n")
    found = [line.split(":")[0] for line in check_tree(tmp_path)]
    assert found == ["megatron_lite/model/deep/x.py", "pretrain_gpt.py", "tools/x.py"]

"""tools/doctor.py: what this machine can use, on machines that are not here, too."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_lite.config import KernelsConfig
from megatron_lite.ops import Needs, build_ops, report
from megatron_lite.ops.registry import BACKENDS, GROUPS
from tests.ops.fake_packages import install_transformer_engine
from tools.doctor import main, show, verdict

ROOT = Path(__file__).resolve().parents[2]


def test_every_backend_of_every_operation_is_judged(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["machine"]) == {"python", "torch", "GPUs", "CPU", "kernels", "compilers"}
    assert found["machine"]["torch"].startswith(torch.__version__)
    assert found["operations"].keys() == GROUPS.keys()
    for group, answers in found["operations"].items():
        assert answers["why_not"].keys() == {n for n, backend in BACKENDS.items() if group in backend.groups}
        for dtype, name in answers["auto"].items():
            assert answers["why_not"][name][dtype] is None


def test_auto_is_what_a_run_would_get() -> None:
    for needs in (Needs(), Needs("cuda", torch.bfloat16, (9, 0)), Needs(attention_dropout=True)):
        answers = report.survey(needs)
        for dtype, name in {torch.bfloat16: "bf16", torch.float32: "fp32"}.items():
            chosen = build_ops(KernelsConfig(), replace(needs, dtype=dtype)).chosen
            assert chosen == {group: answers[group]["auto"][name] for group in GROUPS}


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--device", "cpu", "--config", str(ROOT / "configs/shakespeare_char.json")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("python     ") and "\nkernels    " in out
    assert "\nattention on cpu; auto takes: fp32 " in out
    assert "\n  sdpa                no: it has no attention dropout that is the same on every layout\n" in out
    assert "\n  fp8                 no: it needs an NVIDIA GPU; transformer_engine is not installed (" in out


def test_a_gpu_with_packages(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    install_transformer_engine(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    show({}, report.survey(Needs("cuda", capability=(9, 0))), "cuda")
    lines = capsys.readouterr().out.splitlines()
    assert "attention on cuda; auto takes: fp32 sdpa, bf16 sdpa_cudnn, fp16 sdpa_cudnn" in lines
    assert "  sdpa_cudnn          bf16, fp16; not fp32: it takes bf16 and fp16, not fp32" in lines
    assert "  fp8                 bf16; not fp32 and fp16: it takes bf16, not fp32" in lines
    assert "  transformer_engine  yes" in lines


@pytest.mark.parametrize(
    ("reasons", "said"),
    [
        ({"fp32": None, "bf16": None}, "yes"),
        ({"fp32": "a; b", "bf16": "b"}, "no: b"),
        ({"fp32": "a", "bf16": "b"}, "no: b"),
        ({"fp32": None, "bf16": "b"}, "fp32; not bf16: b"),
    ],
)
def test_verdict(reasons: dict[str, str | None], said: str) -> None:
    assert verdict(reasons) == said


def test_kernels_that_are_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron_lite.ops._kernels", None)
    assert report.machine()["kernels"].startswith("not built (")


def test_what_is_not_there_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", "none.json"]) == 2
    assert "none.json" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["--device", "cuda"]) == 2
        assert "torch sees no CUDA device" in capsys.readouterr().err


def test_it_starts_without_deepspeed() -> None:
    """Which takes seconds to import."""
    code = "import sys; sys.path.insert(0, '.'); import tools.doctor; assert 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

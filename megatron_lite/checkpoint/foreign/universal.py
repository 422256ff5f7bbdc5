"""DeepSpeed's universal checkpoints: `zero/NAME/fp32.pt`, `exp_avg.pt`, `exp_avg_sq.pt`, one tensor each.

Made by DeepSpeed's ds_to_universal.py, which merges what tensor-parallel ranks held. The settings are those that
Megatron-DeepSpeed leaves in the copies of `mp_rank_00_model_states.pt`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from megatron_lite.checkpoint.errors import CheckpointError
from megatron_lite.checkpoint.foreign.pickles import load_tensor, read_saved

FOLDER = "zero"
_FILES = {"weight": "fp32.pt", "exp_avg": "exp_avg.pt", "exp_avg_sq": "exp_avg_sq.pt"}


class Universal:
    """A universal checkpoint's folder, opened.

    Attributes:
        common: what Megatron-DeepSpeed saved beside the tensors, {} where nothing is there.

    Raises:
        CheckpointError: it holds no parameters.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found = sorted(path.parent.name for path in (folder / FOLDER).glob(f"*/{_FILES['weight']}"))
        if not found:
            raise CheckpointError(f"{folder / FOLDER} holds no */fp32.pt; is the universal checkpoint whole?")
        self._names = found
        self._shapes: dict[str, tuple[int, ...]] = {}
        states = sorted(folder.glob("*mp_rank_*_model_states.pt"))  # ZeRO-3's begin with zero_pp_rank_N
        self.common: dict[str, Any] = read_saved(states[0]) if states else {}

    @property
    def kinds(self) -> set[str]:
        return {kind for kind in _FILES if all(self._path(name, kind).is_file() for name in self._names)}

    def names(self, kind: str = "weight") -> list[str]:
        return list(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the stored tensor, which may be flat (ZeRO-3)."""
        if name not in self._shapes:
            self._shapes[name] = tuple(self._load(name, "weight")["param"].shape)
        return self._shapes[name]

    def dtype(self, name: str, kind: str) -> torch.dtype:
        return torch.float32

    def read(self, name: str, kind: str) -> torch.Tensor:
        """A tensor, 1-D."""
        found: torch.Tensor = self._load(name, kind)["param"]
        if found.numel() != math.prod(self.shape(name)):
            raise CheckpointError(f"{self._path(name, kind)} has another shape than the weight")
        return found.float().reshape(-1)

    def optimizer_steps(self) -> int | None:
        """Adam's count of steps; None where that was not saved."""
        path = self.folder / FOLDER / self._names[0] / "step.pt"
        return int(load_tensor(path)) if path.is_file() else None

    def merged_in_halves(self, name: str) -> bool:
        """Whether gate and up were merged each by itself."""
        return self._load(name, "weight").get("param_n_sub_params") == 2

    def _load(self, name: str, kind: str) -> dict[str, Any]:
        path = self._path(name, kind)
        found = load_tensor(path)
        found = {"param": found} if isinstance(found, torch.Tensor) else found
        if not isinstance(found, dict) or not isinstance(found.get("param"), torch.Tensor):
            raise CheckpointError(f"{path} holds no tensor; is it of a universal checkpoint?")
        return found

    def _path(self, name: str, kind: str) -> Path:
        return self.folder / FOLDER / name / _FILES[kind]

"""What a run reports: metrics.jsonl, a console line, TensorBoard and Weights & Biases."""

import contextlib
import importlib.util
import json
import logging
import math
import os
import time
import zlib
from pathlib import Path
from typing import Any

import torch

from megatron_lite.config import Config

logger = logging.getLogger(__name__)

# Dense bf16 peak of one device in TFLOP/s, from the vendors' datasheets.
_PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "B200": 2250.0,
}


def peak_tflops(config: Config, device: torch.device) -> float | None:
    """Peak of one device, from the configuration or the device's name; None where it is not known."""
    if config.logging.peak_tflops is not None or device.type != "cuda":
        return config.logging.peak_tflops
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in _PEAK_TFLOPS.items() if key in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Largest memory this process has held, in GiB: on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Metrics:
    """The first rank's reports; the other ranks have one that does nothing.

    Rows of `metrics.jsonl` carry step, loss, grad_norm, lr, tokens (seen by the run so far) and tokens_per_second;
    evaluation rows carry valid_loss. A number that is not finite is written as null.

    Args:
        active: this is the rank that reports.

    Raises:
        ValueError: the output folder cannot be written, or a package that the configuration asks for is missing.
    """

    def __init__(self, config: Config, device: torch.device, world_size: int, active: bool) -> None:
        self.config, self.active = config, active
        self.flops_per_token = config.model.flops_per_token()
        self.world_size, self.peak = world_size, peak_tflops(config, device)
        self.tokens_per_step = config.train.global_batch_size * config.model.seq_length
        self._clock = time.perf_counter()
        self._rates: list[float] = []
        self._writers: list[Any] = []
        if active:
            self._prepare()

    def _prepare(self) -> None:
        """What can fail, before anything expensive is built."""
        folder, settings = Path(self.config.train.output_dir), self.config.logging
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.jsonl").open("a").close()
        except OSError as error:
            raise ValueError(f"train.output_dir: cannot write in {folder}: {error.strerror}") from error
        wanted = {
            "tensorboard": settings.tensorboard,
            "wandb_project": settings.wandb_project is not None,
        }
        for key, on in wanted.items():
            package = key.removesuffix("_project")
            if on and importlib.util.find_spec(package) is None:
                raise ValueError(f"logging.{key} needs the {package} package: pip install {package}")

    def open(self, start: int) -> None:
        """Begins to report a run that has done `start` steps; rows of steps that it does again are dropped."""
        if not self.active:
            return
        folder = Path(self.config.train.output_dir)
        path = folder / "metrics.jsonl"
        kept = [row for row in _rows(path) if row["step"] <= start] if start else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(temporary, path)
        self._file = path.open("a", buffering=1)
        if self.config.logging.tensorboard:
            self._writers.append(_tensorboard(folder / "tensorboard", start))
        if self.config.logging.wandb_project is not None:
            self._writers.append(_wandb(self.config))

    def begin_step(self) -> None:
        """Starts the clock of a step; evaluation and saving between steps are not counted."""
        self._clock = time.perf_counter()

    def end_step(
        self, step: int, loss: float, grad_norm: float, lr: float, tokens: int, skipped: bool
    ) -> None:
        """Reports one optimizer step; `step` counts it, `tokens` are those of the run so far."""
        seconds = time.perf_counter() - self._clock
        if not self.active:
            return
        rate = self.tokens_per_step / seconds
        tflops = rate * self.flops_per_token / self.world_size / 1e12
        row: dict[str, Any] = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "tokens": tokens,
            "tokens_per_second": rate,
            "step_seconds": seconds,
            "tflops_per_device": tflops,
        }
        if self.peak:
            row["mfu"] = tflops / self.peak
        if skipped:
            row["skipped"] = True
        self._write(row)
        self._rates = [*self._rates[-19:], seconds]
        if step % self.config.logging.interval == 0 or step == self.config.train.steps:
            logger.info("%s", self._line(row))

    def evaluation(self, step: int, name: str, loss: float, seconds: float) -> None:
        """Reports an evaluation: `name` is valid or test."""
        if self.active:
            self._write({"step": step, f"{name}_loss": loss, f"{name}_perplexity": _exp(loss)})
            logger.info(
                "step %d | %s loss %.4f | perplexity %.2f | %.1f s", step, name, loss, _exp(loss), seconds
            )

    def close(self) -> None:
        """Flushes and closes every report."""
        if self.active:
            self._file.close()
            for writer in self._writers:
                writer.close()

    def _write(self, row: dict[str, Any]) -> None:
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._file.write(json.dumps(clean) + "\n")
        for writer in self._writers:
            writer.write(clean)

    def _line(self, row: dict[str, Any]) -> str:
        total, step = self.config.train.steps, row["step"]
        # The first step of a job is slow (memory, kernels); the median of the last ones tells the time left.
        recent = sorted(self._rates)[len(self._rates) // 2]
        parts = [
            f"step {step:>{len(str(total))}}/{total} ({step / total:4.0%})",
            f"loss {row['loss']:.4f}",
            f"grad norm {row['grad_norm']:.3f}",
            f"lr {row['lr']:.2e}",
            f"{_short(row['tokens_per_second'])} tokens/s",
            f"{row['tflops_per_device']:.3g} TFLOP/s a device",
        ]
        if "mfu" in row:
            parts.append(f"MFU {row['mfu']:.1%}")
        parts.append(f"left {_duration(recent * (total - step))}")
        return " | ".join([*parts, "SKIPPED"] if row.get("skipped") else parts)


class _tensorboard:
    """TensorBoard's event files."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start + 1)

    def write(self, row: dict[str, Any]) -> None:
        for key, value in row.items():
            if key != "step" and value is not None:
                self._writer.add_scalar(key, float(value), row["step"])

    def close(self) -> None:
        self._writer.close()


class _wandb:
    """Weights & Biases."""

    def __init__(self, config: Config) -> None:
        import wandb

        folder = Path(config.train.output_dir).resolve()
        self._run = wandb.init(
            project=config.logging.wandb_project,
            name=folder.name,
            # The same when a run is resumed, another for a folder of the same name elsewhere.
            id=f"{folder.name}-{zlib.crc32(str(folder).encode()):08x}",
            resume="allow",
            config=config.model_dump(),
        )

    def write(self, row: dict[str, Any]) -> None:
        self._run.log({k: v for k, v in row.items() if k != "step" and v is not None}, step=row["step"])

    def close(self) -> None:
        self._run.finish()


def _rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics file; a last line cut short by a kill is left out."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return [row for row in rows if isinstance(row, dict) and "step" in row]


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _short(number: float) -> str:
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.1f}{unit}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    minutes, hours = divmod(int(seconds), 60)[0], int(seconds) // 3600
    if hours:
        return f"{hours}h {minutes % 60:02d}m"
    return f"{minutes}m {int(seconds) % 60:02d}s" if minutes else f"{seconds:.0f}s"

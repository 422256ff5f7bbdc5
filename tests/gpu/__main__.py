"""`python -m tests.gpu`: every test that needs a GPU, with pytest or, where it or pydantic is not installed, without.

Without them only the tests of this folder and of the operations run, and those of them that need packages which are
missing are skipped, saying so.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("tests/gpu", "tests/ops/native")


def main() -> int:
    found = {
        name: importlib.util.find_spec(name) is not None
        for name in ("pytest", "pydantic", "hypothesis", "deepspeed")
    }
    print(
        ", ".join(f"{name}: {'there' if there else 'missing'}" for name, there in found.items()), flush=True
    )
    if found["pytest"] and found["pydantic"]:
        folders = () if found["hypothesis"] else FOLDERS[:1]
        return subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", *folders], cwd=ROOT).returncode
    sys.path.insert(0, str(ROOT))
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import bare  # noqa: F401  (stands in for pydantic)
    import torch

    from tests.gpu import runner

    lacking = None if torch.cuda.is_available() else "needs a CUDA device, and torch sees none"
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("test_*.py"))]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    return int(runner.run(names, "gpu", lacking) > 0)


if __name__ == "__main__":
    sys.exit(main())

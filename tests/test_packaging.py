"""pyproject.toml: what an optional extra installs, the package uses."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOR_DEVELOPERS = {"dev", "test"}


def test_every_extra_installs_what_is_imported() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    sources = "\n".join(path.read_text() for path in (ROOT / "megatron_lite").rglob("*.py"))
    extras = project["optional-dependencies"]
    assert extras.keys() >= FOR_DEVELOPERS
    for extra in extras.keys() - FOR_DEVELOPERS:
        for requirement in extras[extra]:
            name = re.split(r"\W*[<>=\[]", requirement)[0]
            module = name.replace("-", "[_.]")
            imported = rf'^\s*(import|from) (\w+\.)*{module}\b|"{module}(\.\w+)*"'  # or by import_module
            assert re.search(imported, sources, re.MULTILINE), (extra, requirement)

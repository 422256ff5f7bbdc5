"""The floor plan of the package as a check over its sources: levels, third-party doors, limits of size.

Docs: docs/architecture.md. `check_source` looks at one file given as text, so that the rules can be tested on
violations that are nowhere in the tree.
"""

import ast
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

# A room imports rooms of lower levels only.
LEVELS = {
    "command": 0,
    "config": 0,
    "tokenizers": 1,
    "data": 1,
    "corpus": 1,
    "ops": 1,
    "parallel": 2,
    "model": 3,
    "checkpoint": 4,
    "training": 5,
    "inference": 5,
}
SIBLINGS = {("corpus", "tokenizers"), ("corpus", "data")}
SCRIPTS = {"tools", "benchmarks", "examples", "tests", "pretrain_gpt"}

# Module (third-party, compiled, or not safe), or function -> where in the repository it may be used: a folder, or one
# file.
DOORS = {
    "deepspeed": ("megatron_lite/training/engine.py", "megatron_lite/parallel/pipeline.py"),
    "sentencepiece": ("megatron_lite/tokenizers",),
    "tokenizers": ("megatron_lite/tokenizers",),
    "tiktoken": ("megatron_lite/tokenizers",),
    "gigatoken": ("megatron_lite/tokenizers",),
    "ftfy": ("megatron_lite/corpus",),
    "py3langid": ("megatron_lite/corpus",),
    "pyarrow": ("megatron_lite/corpus",),
    "resiliparse": ("megatron_lite/corpus",),
    "warcio": ("megatron_lite/corpus",),
    "transformers": ("megatron_lite/checkpoint",),
    "safetensors": ("megatron_lite/checkpoint",),
    "zlib_ng": ("megatron_lite/checkpoint/blocks.py",),
    # A pickle runs code of whoever wrote it, so only one place reads any, with an unpickler that runs none.
    "pickle": ("megatron_lite/checkpoint/foreign",),
    "_pickle": ("megatron_lite/checkpoint/foreign",),
    "torch.load": ("megatron_lite/checkpoint/foreign",),
    "flash_attn": ("megatron_lite/ops",),
    "flash_attn_interface": ("megatron_lite/ops",),
    "transformer_engine": ("megatron_lite/ops",),
    "apex": ("megatron_lite/ops",),
    "megatron_lite.corpus._text": ("megatron_lite/corpus",),
    "megatron_lite.data._index": ("megatron_lite/data",),
    "megatron_lite.ops._kernels": ("megatron_lite/ops",),
}
# These start without torch, and so do the tools over them.
TORCH_FREE = ("command", "config", "tokenizers", "data", "corpus")

# The launcher tells a process who it is through the environment; everything else is told by the config.
READS_ENVIRONMENT = ("megatron_lite/parallel/launch.py", "pretrain_gpt.py")

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80


def source_files(root: Path) -> list[Path]:
    """What the floor plan governs: the package, the tools, and the scripts of the repository's root."""
    folders = [root / "megatron_lite", root / "tools"]
    nested = [path for folder in folders for path in folder.rglob("*.py")]
    return sorted(nested + [path for path in root.glob("*.py") if path.name != "setup.py"])


def check_tree(root: Path) -> list[str]:
    """Every violation in the checkout at `root`, each as `path:line: what is wrong`."""
    found = []
    for path in source_files(root):
        found += check_source(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8"))
    return found


def check_source(path: str, source: str) -> list[str]:
    """The violations in one file; `path` is relative to the root of the repository, with forward slashes."""
    tree = ast.parse(source, filename=path)
    found = [*_check_size(path, source, tree), *_check_environment(path, tree)]
    room = _room(path)
    if room is not None and room not in LEVELS:
        found.append((1, f"{room!r} has no level; give it one in LEVELS"))
    for line, names in imports(path, tree):
        found += [(line, problem) for problem in _check_import(path, room, names)]
    return [f"{path}:{line}: {problem}" for line, problem in sorted(found)]


def imports(path: str, tree: ast.AST) -> Iterator[tuple[int, list[str]]]:
    """`(line, names)` of every import, function-level and `import_module("…")` ones and functions with doors included.

    One list holds the names that one import may mean: `from a import b` is `["a.b", "a"]`, since `b` may be
    a module. Relative imports come out absolute.
    """
    package = list(PurePosixPath(path).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, [alias.name]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, [f"{base}.{alias.name}", base]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (name := f"{node.value.id}.{node.attr}") in DOORS:
                yield node.lineno, [name]
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, [first.value]


def _called(node: ast.Call) -> str:
    """The last name of what is called: `import_module` for `importlib.import_module(…)`."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _room(path: str) -> str | None:
    """The room a file belongs to; None for the package's own __init__ and for scripts."""
    parts = PurePosixPath(path).with_suffix("").parts
    return parts[1] if parts[0] == "megatron_lite" and parts[1] != "__init__" else None


def _inside(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or path.startswith(place + "/") for place in places)


def _check_import(path: str, room: str | None, names: list[str]) -> Iterator[str]:
    for module, places in DOORS.items():
        if any(name == module or name.startswith(module + ".") for name in names) and not _inside(
            path, places
        ):
            yield f"imports {module}, whose door is {' or '.join(places)}"
    top, *rest = names[0].split(".")
    if top == "torch" and room in TORCH_FREE:
        yield f"{room} imports torch; it is among the rooms that start without it"
    if top in SCRIPTS:
        yield f"imports {top}; nothing imports scripts, move what is shared into the package"
    if top != "megatron_lite" or not rest or path.split("/")[0] != "megatron_lite":
        return
    other = rest[0]
    if path == "megatron_lite/__init__.py":
        yield f"the package's own __init__ imports {other}; whoever imports one room would get that one too"
        return
    if room not in LEVELS or other not in LEVELS or room == other or (room, other) in SIBLINGS:
        return
    if LEVELS[other] >= LEVELS[room]:
        yield f"{room} (level {LEVELS[room]}) imports {other} (level {LEVELS[other]}); only lower levels"


def _check_environment(path: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Reads of environment variables; setting one (`os.environ["X"] = …`) is not a read."""
    if path in READS_ENVIRONMENT:
        return
    written = {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del)
    }
    problem = (
        f"reads the environment; only {' and '.join(READS_ENVIRONMENT)} do, settings belong in the config"
    )
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            names = {alias.name for alias in node.names}
        elif isinstance(node, ast.Attribute) and node not in written:
            names = {node.attr}
        else:
            continue
        if names & {"environ", "getenv"}:
            yield node.lineno, problem


def _check_size(path: str, source: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    lines = len(source.splitlines())
    if lines > MAX_FILE_LINES:
        yield 1, f"{lines} lines, over the limit of {MAX_FILE_LINES}; split it by what it does"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield node.lineno, f"{node.name} has {length} lines, over the limit of {MAX_FUNCTION_LINES}"

import json
from pathlib import Path

from megatron_lite.corpus import write_python_docs

LONG = "This docstring is long enough to be kept, since it has more than eighty characters in all."


def texts_of(path: Path) -> list[tuple[str, str]]:
    return [
        (line["source"], line["text"])
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines())
    ]


def test_docstrings_and_topics_are_taken_once(tmp_path: Path) -> None:
    library = tmp_path / "lib"
    (library / "pydoc_data").mkdir(parents=True)
    (library / "test").mkdir()
    (library / "b.py").write_text(
        f'"""{LONG}"""\nclass C:\n    """{LONG} C."""\n    async def f(self):\n        """Short."""\n'
        f'        def g():\n            """{LONG}"""\nraise SystemExit("imported!")\n'
    )
    (library / "a.py").write_text(f'def f():\n    """{LONG}\n\n    Indented é.\n    """\n', encoding="utf-8")
    (library / "broken.py").write_text(f'"""{LONG} broken"""\ndef (\n')
    (library / "test" / "x.py").write_text(f'"""{LONG} test"""\n')
    (library / "pydoc_data" / "topics.py").write_text(f"topics = {{'if': '{LONG} If.', 'x': 'short'}}\n")
    stats = write_python_docs(tmp_path / "o" / "docs.jsonl", library)
    assert texts_of(tmp_path / "o" / "docs.jsonl") == [
        ("a.py:f", f"{LONG}\n\nIndented é."),
        ("b.py", LONG),
        ("b.py:C", f"{LONG} C."),
        ("pydoc_data/topics.py:if", f"{LONG} If."),
    ]
    assert (stats.documents, stats.duplicates) == (4, 1)
    assert stats.characters == sum(len(text) for _, text in texts_of(tmp_path / "o" / "docs.jsonl"))
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["docs.jsonl"]


def test_this_python_has_enough_to_train_on(tmp_path: Path) -> None:
    stats = write_python_docs(tmp_path / "docs.jsonl")
    texts = [text for _, text in texts_of(tmp_path / "docs.jsonl")]
    assert len(texts) == len(set(texts)) == stats.documents > 2000
    assert stats.characters > 1_000_000

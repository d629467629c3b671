"""The paths of a job file, made absolute: they start at the file that wrote them."""

from pathlib import Path
from typing import Any


def resolve_paths(raw: dict[str, Any], folder: Path, data: Path | None) -> None:
    """Makes the file's own relative paths absolute, in place; `data` moves corpus files there by name."""

    def absolute(path: str) -> str:
        return path if "://" in path else str((folder / path).resolve())

    corpus = raw.get("corpus")
    tables: list[Any] = []
    if isinstance(corpus, dict):
        tasks = corpus.get("tasks")
        tables = [corpus.get("documents"), *(tasks.values() if isinstance(tasks, dict) else ())]
        tables += [table.get("labels") for table in tables if isinstance(table, dict)]
    for table in tables:
        if not isinstance(table, dict):
            continue
        if isinstance(table.get("path"), str):
            table["path"] = str((data / Path(table["path"]).name).resolve()) if data else absolute(table["path"])
        if isinstance(table.get("sql"), str):
            table.setdefault("root", ".")
        elif "sql" in table:  # a variant that leaves the query leaves its root too
            table.setdefault("root", None)
        if isinstance(table.get("root"), str):
            table["root"] = str(data.resolve()) if data else absolute(table["root"])
    encoder = raw.get("encoder")
    if isinstance(encoder, dict) and isinstance(encoder.get("pretrained"), str):
        encoder["pretrained"] = resolve_encoder(encoder["pretrained"], folder)
    search = raw.get("search")
    if isinstance(search, dict) and isinstance(search.get("space"), str):
        search["space"] = absolute(search["space"])


def resolve_encoder(name: str, folder: Path) -> str:
    """A name with a leading dot or an existing folder is a directory; anything else a Hugging Face name."""
    path = folder / Path(name).expanduser()
    return str(path.resolve()) if name.startswith((".", "~", "/")) or path.is_dir() else name

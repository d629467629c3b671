"""Names by content: arms, trials, stages and data are hashes of what decides them, never paths or dates."""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(value: Any, length: int = 16) -> str:
    """Hexadecimal blake2b of a plain value."""
    return hashlib.blake2b(canonical(value).encode(), digest_size=32).hexdigest()[:length]


def digest_folder(folder: Path) -> str:
    """Digest of the files of an encoder directory: names and bytes, subfolders and hidden files left out."""
    parts = {}
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.startswith("."):
            with file.open("rb") as stream:
                parts[file.name] = hashlib.file_digest(stream, "blake2b").hexdigest()
    return digest(parts)


def name_arm(
    settings: Mapping[str, Any], *, data_digest: str, encoder_digest: str, searched: Collection[str] = ()
) -> str:
    """The arm's hash over the settings that change its results.

    `settings` are those of `settings.list_settings`, unread ones null. The corpus counts by its digest and the two
    settings that cut texts; the encoder by the digest of its weights; evaluation lists only where they are searched.
    """
    counted = {"data": data_digest, "encoder": encoder_digest}
    counted |= {name: value for name, value in settings.items() if decides_arm(name, searched)}
    return digest({name: value for name, value in counted.items() if value is not None}, length=12)


def decides_arm(name: str, searched: Collection[str] = ()) -> bool:
    """Whether a setting counts by its value in the name of an arm: the corpus and the weights do by their digests."""
    block, _, rest = name.partition(".")
    return (
        name in ("corpus.max_length", "corpus.long_documents")
        or (block == "pretrain" and rest != "rungs")
        or (block == "encoder" and rest not in ("pretrained", "revision", "trial"))
        or (block == "evaluate" and (rest.startswith(("fine_tune.", "selection", "precision")) or name in searched))
    )


def name_trial(arm: str, seed: int) -> str:
    """An arm and a seed."""
    return f"{arm}-{seed}"

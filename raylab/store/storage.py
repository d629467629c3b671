"""Results at a URL: all code works on a folder that mirrors it, pushed before a write counts, pulled before a read."""

import contextlib
import errno
import functools
import hashlib
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from filelock import FileLock

from raylab.base.mistakes import STORAGE, JobError, RemoteError

NOTE = ".storage"
LOG = "log.txt"
# The folder of a job with its packs (see packs.py).
PACKS = "_packed"
# Where a file appears whole at the end of its upload; elsewhere it is written beside and renamed.
WHOLE = ("s3", "gcs", "abfs")
# Files on their way at once.
STREAMS = 8
# Object stores tell times in whole seconds: what was written this shortly before the newest may be written again with
# the same time and size, and is looked at again.
UNSURE_NS = 2_000_000_000
# How long Google's client tries again where nothing answers; it would for 15 minutes.
GCS_RETRY = "retry_limit_seconds=60"


class Remote(NamedTuple):
    """A URL, its file system, and the folder there, with `/` between its parts and none at its end."""

    url: str
    filesystem: Any
    base: str


def is_url(where: str) -> bool:
    """Whether results are asked for at a URL, not in a folder."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", where) is not None


def open_results(where: str) -> Path:
    """The folder to work on: the one named, or this machine's mirror of a URL, under $RAYLAB_CACHE or ~/.cache/raylab.

    Raises JobError where the URL's file system isn't known or doesn't answer.
    """
    if not is_url(where):
        return Path(where)
    parts = urlsplit(where)
    if parts.password is not None:
        raise JobError(
            ["--results: a URL with a key in it would be told in logs; give keys in the environment (README)"]
        )
    url = parts._replace(path=parts.path.rstrip("/")).geturl()
    cache = Path(os.environ.get("RAYLAB_CACHE") or Path.home() / ".cache" / "raylab").absolute()
    mirror = cache / hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
    if _find(mirror) is None:
        try:
            remote = _connect(url)
            with _asking(remote):
                remote.filesystem.get_file_info(remote.base)
        except OSError as error:
            raise JobError([f"--results {error.strerror}; correct the URL, the keys or the network"]) from None
        try:
            mirror.mkdir(parents=True, exist_ok=True, mode=0o700)
            scratch = mirror / f"{NOTE}.{os.getpid()}"
            scratch.write_text(url)
            os.replace(scratch, mirror / NOTE)
        except OSError as error:
            raise JobError([f"RAYLAB_CACHE {cache}: {error.strerror}; name a folder that can be written"]) from None
        _find.cache_clear()
    return mirror


def _connect(url: str) -> Remote:
    import pyarrow
    from pyarrow.fs import FileSystem

    given = url
    if url.startswith(("gs://", "gcs://")) and "retry_limit_seconds=" not in url:
        given += ("&" if "?" in url else "?") + GCS_RETRY
    try:
        filesystem, base = FileSystem.from_uri(given)
    except (pyarrow.ArrowException, OSError) as error:
        raise RemoteError(errno.EIO, f"{url}: {_first_line(error)}") from None
    if not base.strip("/"):
        raise RemoteError(errno.EIO, f"{url}: names no folder")
    return Remote(url, filesystem, base.rstrip("/"))


@functools.cache
def _find(results: Path) -> Remote | None:
    """What a folder is the mirror of; None for a folder of its own."""
    try:
        url = (results / NOTE).read_text()
    except OSError:
        return None
    return _connect(url)


def name_results(results: Path) -> str:
    """The results as a person, or another machine, calls them: the URL of a mirror, else the path."""
    remote = _find(results)
    return str(results) if remote is None else remote.url


def is_mirror(results: Path) -> bool:
    """Whether a results folder mirrors a URL."""
    return _find(results) is not None


def is_empty(results: Path) -> bool:
    """Whether nothing is at the URL of a mirror, or a folder of its own is not there."""
    remote = _find(results)
    if remote is None:
        return not results.is_dir()
    from pyarrow.fs import FileType

    with _asking(remote):
        return bool(remote.filesystem.get_file_info(remote.base).type == FileType.NotFound)


@contextlib.contextmanager
def _asking(remote: Remote) -> Iterator[None]:
    """What a file system far away refuses becomes an OSError of one line; what this one does, and a miss, pass."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError) or getattr(error, "errno", None) in STORAGE:
            raise
        raise RemoteError(errno.EIO, f"{remote.url}: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")


def _name(results: Path, path: Path) -> str:
    return path.relative_to(results).as_posix()


def _put(remote: Remote, name: str, content: bytes | Path) -> None:
    """Writes a file there, whole: bytes at once, a file in pieces."""
    filesystem, target = remote.filesystem, f"{remote.base}/{name}"
    place, whole = target, filesystem.type_name in WHOLE
    if not whole:
        folder, _, last = target.rpartition("/")
        filesystem.create_dir(folder, recursive=True)
        place = f"{folder}/.{last}.{secrets.token_hex(4)}"
    if isinstance(content, bytes):
        with filesystem.open_output_stream(place) as stream:
            stream.write(content)
    else:
        from pyarrow.fs import LocalFileSystem, copy_files

        copy_files(
            str(content), place, source_filesystem=LocalFileSystem(), destination_filesystem=filesystem,
            use_threads=False,
        )  # fmt: skip
    if not whole:
        filesystem.move(place, target)


def _get(remote: Remote, name: str, path: Path) -> None:
    from pyarrow.fs import LocalFileSystem, copy_files

    path.parent.mkdir(parents=True, exist_ok=True)
    copy_files(
        f"{remote.base}/{name}", str(path), source_filesystem=remote.filesystem,
        destination_filesystem=LocalFileSystem(), use_threads=False,
    )  # fmt: skip


def read(results: Path, path: Path) -> bytes:
    """A small file as it is now: at the URL of a mirror, else in the folder. Raises FileNotFoundError."""
    remote = _find(results)
    if remote is None:
        return path.read_bytes()
    with _asking(remote), remote.filesystem.open_input_stream(f"{remote.base}/{_name(results, path)}") as stream:
        return bytes(stream.read())


def write(results: Path, path: Path, content: bytes) -> None:
    """Replaces a small file, whole; that of a mirror at its URL alone."""
    remote = _find(results)
    if remote is None:
        scratch = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            scratch.write_bytes(content)
            os.replace(scratch, path)
        except OSError:
            scratch.unlink(missing_ok=True)
            raise
        return
    with _asking(remote):
        _put(remote, _name(results, path), content)


def remove(results: Path, path: Path) -> None:
    """Deletes a file, here and at the URL of a mirror; nothing where there is none."""
    remote = _find(results)
    if remote is not None:
        with contextlib.suppress(FileNotFoundError), _asking(remote):
            remote.filesystem.delete_file(f"{remote.base}/{_name(results, path)}")
    path.unlink(missing_ok=True)


def remove_same(results: Path, path: Path) -> bool:
    """Deletes a file, here and at the URL of a mirror; False, and nothing is done, where another one stands there."""
    remote = _find(results)
    if remote is not None:
        with contextlib.suppress(FileNotFoundError), _asking(remote):
            place = f"{remote.base}/{_name(results, path)}"
            if _differs(path, remote.filesystem.get_file_info(place)):
                return False
            remote.filesystem.delete_file(place)
    path.unlink(missing_ok=True)
    return True


def publish(results: Path, scratch: Path, path: Path) -> None:
    """Renames a file that was written beside into place, for all to see; that of a mirror is first put at its URL."""
    remote = _find(results)
    if remote is None:
        os.replace(scratch, path)
        return
    # A pull of another process of this machine must not put back what stood there before.
    with _lock(results):
        with _asking(remote):
            _put(remote, _name(results, path), scratch.read_bytes())
        os.replace(scratch, path)


def push(results: Path, path: Path) -> None:
    """Puts a file of a mirror at its URL, as it is; nothing elsewhere, or where there is none."""
    remote = _find(results)
    if remote is not None and path.is_file():
        with _asking(remote):
            _put(remote, _name(results, path), path.read_bytes())


def push_files(results: Path, files: Mapping[Path, Path]) -> None:
    """Puts large files at the URL of a mirror: path in the mirror -> where the bytes lie now."""
    remote = _find(results)
    if remote is not None:
        with _asking(remote):
            _each(lambda item: _put(remote, _name(results, item[0]), item[1]), files.items())


def fetch_files(results: Path, files: Mapping[Path, Path]) -> None:
    """Gets large files from the URL of a mirror: path in the mirror -> where the bytes go. Raises FileNotFoundError."""
    remote = _find(results)
    if remote is not None:
        with _asking(remote):
            _each(lambda item: _get(remote, _name(results, item[0]), item[1]), files.items())


def _each(act: Any, items: Any) -> list[Any]:
    with ThreadPoolExecutor(STREAMS) as pool:
        return list(pool.map(act, items))


def _lock(results: Path) -> FileLock:
    return FileLock(results / f"{NOTE}.lock")


def pull(results: Path, job: str | None = None) -> None:
    """Brings the tables and job file of a job, or of all, up to date with a mirror's URL; nothing elsewhere.

    Files that begin with a dot, the log and stages are no part of it.
    """
    remote = _find(results)
    if remote is None:
        return
    from pyarrow.fs import FileSelector, FileType

    def listed(folder: str, recursive: bool) -> list[Any]:
        selector = FileSelector(folder, allow_not_found=True, recursive=recursive)
        return list(remote.filesystem.get_file_info(selector))

    with _lock(results), _asking(remote):
        jobs = {job}
        if job is None:
            jobs = {info.base_name for info in listed(remote.base, False) if info.type == FileType.Directory}
            jobs |= {path.name for path in results.glob("*/")}
        for name in sorted(name for name in jobs if name and name[0] not in "._"):
            while True:
                # Packs again, last: what was packed while the others were listed is in one by then.
                infos = [item for part in ("", f"/{PACKS}") for item in listed(f"{remote.base}/{name}{part}", True)]
                found = {info.path[len(remote.base) + 1 :]: info for info in infos}
                files = {name: info for name, info in found.items() if info.type == FileType.File and _is_kept(name)}
                if _take(remote, results, files):
                    break
            for path in list((results / name).rglob("*")):
                if path.is_file() and _is_kept(_name(results, path)) and _name(results, path) not in files:
                    path.unlink(missing_ok=True)


def pull_files(results: Path, paths: list[Path], packs: Path) -> None:
    """Brings some small files of a mirror, and a folder of packs, up to date with its URL; nothing elsewhere."""
    remote = _find(results)
    if remote is None:
        return
    from pyarrow.fs import FileSelector, FileType

    names, folder = [_name(results, path) for path in paths], f"{remote.base}/{_name(results, packs)}"
    with _lock(results), _asking(remote):
        while True:
            infos = remote.filesystem.get_file_info([f"{remote.base}/{name}" for name in names])
            found = dict(zip(names, infos, strict=True))
            listed = remote.filesystem.get_file_info(FileSelector(folder, allow_not_found=True))  # last, as in `pull`
            packed = {info.path[len(remote.base) + 1 :]: info for info in listed if _is_kept(info.base_name)}
            if _take(remote, results, {k: v for k, v in (found | packed).items() if v.type == FileType.File}):
                break
        for name, info in found.items():
            if info.type == FileType.NotFound:
                (results / name).unlink(missing_ok=True)


def _is_kept(name: str) -> bool:
    return not any(part.startswith(".") for part in name.split("/")) and not name.endswith(f"/{LOG}")


def _take(remote: Remote, results: Path, found: Mapping[str, Any]) -> bool:
    """Gets the files that are new or were changed; False where one was gone meanwhile, as if it was packed.

    A file here has the time that its original has there.
    """
    newest = max((info.mtime_ns or 0 for info in found.values()), default=0)

    def take(item: tuple[str, Any]) -> bool:
        name, info = item
        path = results / name
        scratch = path.with_name(f".{path.name}.pull")
        try:
            _get(remote, name, scratch)
        except FileNotFoundError:
            return False
        time = info.mtime_ns or 0
        if time > newest - UNSURE_NS and path.parent.name != PACKS:  # which are never changed
            time -= 1
        os.utime(scratch, ns=(time, time))
        os.replace(scratch, path)
        return True

    return all(_each(take, [(name, info) for name, info in found.items() if _differs(results / name, info)]))


def _differs(path: Path, info: Any) -> bool:
    try:
        here = path.stat()
    except OSError:
        return True
    return (here.st_size, here.st_mtime_ns) != (info.size, info.mtime_ns)


def measure(results: Path, folder: str) -> dict[str, int] | None:
    """Bytes of each folder in a folder at the URL of a mirror, by one listing; None where nothing is mirrored."""
    remote = _find(results)
    if remote is None:
        return None
    from pyarrow.fs import FileSelector, FileType

    sizes: dict[str, int] = {}
    with _asking(remote):
        place = f"{remote.base}/{folder}"
        for info in remote.filesystem.get_file_info(FileSelector(place, allow_not_found=True, recursive=True)):
            if info.type == FileType.File:
                name = info.path[len(place) + 1 :].partition("/")[0]
                sizes[name] = sizes.get(name, 0) + info.size
    return sizes


@contextlib.contextmanager
def lend_folder(results: Path, prefix: str) -> Iterator[tuple[str, Any]]:
    """A folder that all nodes see, deleted after: its path, and its file system where it is one far away."""
    remote, name = _find(results), f"{prefix}{secrets.token_hex(4)}"
    if remote is None:
        import tempfile

        with tempfile.TemporaryDirectory(prefix=prefix, dir=results) as folder:
            yield folder, None
        return
    path = f"{remote.base}/{name}"
    try:
        yield path, remote.filesystem
    finally:
        with contextlib.suppress(OSError):
            remote.filesystem.delete_dir(path)

"""Named files in a directory or at any fsspec URL, with a bounded copy on the local disk."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from latentdiff.errors import InputError
from latentdiff.model_files import staged_file, sync

LOCAL_BYTES = 64 << 30
"""Of the local copy of a URL's files, by default."""
MAX_READ_BYTES = 256 << 20
"""Of a file that is read whole."""
HELD = 24
"""Files that a process asked for last, which nothing deletes from the local copy."""
ATTEMPTS = 5
"""How often something is asked of a server before it is given up."""
PAUSE = 1.0
"""Seconds before the second attempt; twice as long before each further one."""
IDENTITY = ("size", "ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "created", "mtime")
"""What file systems say of a file that changes when it is written anew."""

T = TypeVar("T")


class UnusableFileError(InputError):
    """A store lacks a file, or it is damaged."""


class Store:
    """Files by name, such as "manifest.json" or "768x512/00001.npy".

    Args:
        url: a directory, used in place, or a URL that fsspec knows: s3://bucket/folder (with
            s3fs), gs://... (gcsfs), https://..., memory://... . Credentials come from where these
            packages look for them.
        local: where files of a URL are kept, ~/.cache/latentdiff by default; each URL has a folder
            of its own in it, which all processes of a machine may share.
        local_bytes: how large that folder grows before the files least recently asked for make way.
            Those in use, the last HELD of each process, stay, even beyond it.

    Raises InputError when the URL's file system is not installed, refuses access or lacks a file.
    """

    def __init__(
        self, url: str | Path, local: Path | None = None, local_bytes: int = LOCAL_BYTES
    ) -> None:
        self.url = str(url).rstrip("/") or "/"
        self._arguments = (url, local, local_bytes)
        self.folder: Path | None = None
        """The directory, where the files are on this machine's disk already."""
        scheme = self.url.partition("://")[0] if "://" in self.url else "file"
        if scheme in ("file", "local"):
            here = "://" in self.url
            self.folder = Path(unquote(urlsplit(self.url).path) if here else self.url)
            return
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        name = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self._copy = LocalCopy((local or cache / "latentdiff") / name, local_bytes)
        self._remote()  # a file system that is not installed is said so at once

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, self._arguments

    def local(self, name: str) -> Path:
        """The file on this machine's disk, fetched if need be.

        Not to be written to. What has been opened or mapped stays readable however long; the path
        is good for as long as the file is among the last HELD that this process asked for.
        """
        if self.folder is not None:
            path = self.folder / _checked(name)
            if not path.is_file():
                raise self._lacks(name)
            return path
        fs, remote = self._remote(name)
        info = self._ask(name, lambda: fs.info(remote))
        size = int(info.get("size") or 0)
        version = hashlib.sha256(repr([info.get(key) for key in IDENTITY]).encode()).hexdigest()
        file = PurePosixPath(name)
        kept = str(file.with_name(f"{version[:12]}.{file.name}"))

        def fetch(target: Path) -> None:
            self._ask(name, lambda: _get(fs, remote, target, size))

        return self._copy.get(kept, size, fetch)

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        if self.folder is not None:
            return (self.folder / _checked(name)).is_file()
        fs, remote = self._remote(name)  # fs.exists says no when the network fails
        with contextlib.suppress(FileNotFoundError):
            return _retried(lambda: fs.info(remote))["type"] == "file"
        return False

    def names(self) -> list[str]:
        """All files, sorted; none where there is no such folder."""
        if self.folder is not None:
            paths = (path.relative_to(self.folder) for path in self.folder.rglob("*"))
            found = [path.as_posix() for path in paths if (self.folder / path).is_file()]
        else:
            fs, root = self._remote()
            try:
                listed: list[str] = _retried(lambda: fs.find(root))
            except FileNotFoundError:
                return []
            found = [path[len(root) :].lstrip("/") for path in listed]
        return sorted(name for name in found if not PurePosixPath(name).name.startswith("."))

    def read_bytes(self, name: str, max_bytes: int = MAX_READ_BYTES) -> bytes:
        """A small file. Raises InputError when it is larger than `max_bytes`."""
        content: bytes
        if self.folder is not None:
            with self.local(name).open("rb") as file:
                content = file.read(max_bytes + 1)
        else:
            fs, remote = self._remote(name)
            size = self._ask(name, lambda: fs.info(remote)).get("size")
            content = b" " * (max_bytes + 1)
            if size is None:  # a server that does not say
                content = self._ask(name, lambda: _begin(fs, remote, max_bytes + 1))
            elif size <= max_bytes:
                content = self._ask(name, lambda: fs.cat_file(remote))
        if len(content) > max_bytes:
            raise InputError(f"{self.url}/{name} is larger than {max_bytes} bytes, not genuine.")
        return content

    def read_table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """A parquet file, all of it or some columns. Raises UnusableFileError."""
        path = self.local(name)
        try:
            return pq.read_table(path, columns=columns)
        except (OSError, EOFError, KeyError, ValueError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
                raise  # the system's; Arrow's own, of what it cannot parse, have no number
            raise UnusableFileError(f"{self.url}: {name} is missing or damaged.") from None

    def write(self, name: str, content: bytes | Path) -> None:
        """Write a file whole or not at all, in the place of an earlier one.

        On disk it is staged, synced and renamed; an object store shows an upload when it is done.
        """
        if self.folder is not None:
            with staged_file(self.folder / _checked(name)) as staged:
                if isinstance(content, Path):
                    shutil.copyfile(content, staged)
                else:
                    staged.write_bytes(content)
            return
        fs, remote = self._remote(name)
        with contextlib.suppress(FileExistsError):
            fs.makedirs(remote.rpartition("/")[0], exist_ok=True)
        try:
            if isinstance(content, Path):
                self._ask(name, lambda: fs.put_file(str(content), remote))
            else:
                self._ask(name, lambda: fs.pipe_file(remote, content))
        except NotImplementedError:
            raise InputError(f"{self.url} can only be read; write to another place.") from None

    def _remote(self, name: str | None = None) -> tuple[Any, str]:
        """The file system, this process's and thread's own, and the path in it."""
        from fsspec.core import url_to_fs

        try:  # other processes write too, so nothing is remembered of listings
            fs, root = url_to_fs(self.url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise InputError(f"{self.url} cannot be opened: {error}") from None
        root = root.rstrip("/")
        return fs, root if name is None else f"{root}/{_checked(name)}"

    def _ask(self, name: str, request: Callable[[], T]) -> T:
        try:
            return _retried(request)
        except FileNotFoundError:
            raise self._lacks(name) from None
        except PermissionError as error:
            raise InputError(
                f"{self.url}/{name} is refused ({error}); give this process credentials for it."
            ) from None

    def _lacks(self, name: str) -> UnusableFileError:
        return UnusableFileError(
            f"{self.url} holds no file {name}; look at the path, or make it again."
        )


class LocalCopy:
    """Files of somewhere else, the least recently used giving way beyond `max_bytes`.

    Processes and threads share a folder by locks on the files themselves (flock), which the system
    lets go of when a process dies: a shared one on what is in use, an exclusive one on `.NAME.part`
    while NAME is fetched, whose length is the room that it will take. POSIX only.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._held: OrderedDict[Path, BinaryIO] = OrderedDict()
        self._guard = threading.Lock()

    def get(self, name: str, size: int, fetch: Callable[[Path], None]) -> Path:
        """The file, after `fetch(path)` has written it where it was not there yet."""
        path = self.folder / name
        while (file := _hold(path)) is None:
            self._fetch(path, size, fetch)
        os.utime(path)
        with self._guard:
            earlier = self._held.pop(path, None)
            self._held[path] = file
            released = [] if earlier is None else [earlier]
            while len(self._held) > HELD:
                released.append(self._held.popitem(last=False)[1])
        for other in released:
            other.close()
        return path

    def _fetch(self, path: Path, size: int, fetch: Callable[[Path], None]) -> None:
        """Fetch the file, unless another process does so meanwhile."""
        path.parent.mkdir(parents=True, exist_ok=True)
        mark, staged = _beside(path, ".part"), _beside(path, ".new")
        with mark.open("ab") as reserved:
            _lock(reserved)
            if not _is(reserved, mark):
                return
            try:
                if not path.exists():
                    self._make_room(reserved, size)
                    fetch(staged)
                    sync(staged)
                    staged.replace(path)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise InputError(
                    f"The disk of {self.folder} is full; free {size} bytes or lower local_bytes."
                ) from None
            finally:
                staged.unlink(missing_ok=True)
                mark.unlink(missing_ok=True)

    def _make_room(self, reserved: BinaryIO, size: int) -> None:
        """Delete until `size` more bytes fit, and reserve them."""
        with (self.folder / ".lock").open("ab") as lock:
            _lock(lock)
            total, files = size, []
            for path in self.folder.rglob("*"):
                with contextlib.suppress(FileNotFoundError):  # renamed or deleted meanwhile
                    if path.suffix == ".part":
                        target = path.with_name(path.name[1 : -len(".part")])
                        if _delete_unused(path):  # of a process that died
                            _beside(target, ".new").unlink(missing_ok=True)
                        else:
                            total += path.stat().st_size
                    elif path.is_file() and not path.name.startswith("."):
                        status = path.stat()
                        total += status.st_size
                        files.append((status.st_mtime_ns, status.st_size, path))
            for _, length, path in sorted(files):
                if total <= self.max_bytes:
                    break
                if _delete_unused(path):
                    total -= length
            os.truncate(reserved.fileno(), size)


def _get(fs: Any, remote: str, target: Path, size: int) -> None:
    fs.get_file(remote, str(target))
    if size and target.stat().st_size != size:
        raise OSError(f"{remote} came in part: {target.stat().st_size} of {size} bytes")


def _begin(fs: Any, remote: str, size: int) -> bytes:
    """The first bytes of a file, of which no more is fetched."""
    with fs.open(remote, "rb") as file:
        pieces, left = [], size
        while left and (piece := file.read(left)):
            pieces.append(piece)
            left -= len(piece)
    return b"".join(pieces)


def _retried(request: Callable[[], T]) -> T:
    """What a server answers, asked again when the network fails."""
    for attempt in range(ATTEMPTS - 1):
        try:
            return request()
        except (FileNotFoundError, PermissionError, NotImplementedError):
            raise
        except Exception as error:  # each file system has errors of its own
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise
            time.sleep(PAUSE * 2**attempt)
    return request()


def _checked(name: str) -> str:
    """Raises ValueError for what is no name of a file inside a folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or str(path) != name or name == "." or ".." in path.parts:
        raise ValueError(f"{name!r} is no name of a file in a store.")
    return name


def _beside(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}{ending}")


def _lock(file: BinaryIO, shared: bool = False, wait: bool = True) -> None:
    """Raises BlockingIOError when it is not to wait and another holds the lock."""
    import fcntl  # not on every system that can read directories

    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)


def _is(file: BinaryIO, path: Path) -> bool:
    """Whether an open file is still what stands at the path."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _hold(path: Path) -> BinaryIO | None:
    """The file, locked against deletion; None where there is none."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    _lock(file, shared=True)
    if _is(file, path):
        return file
    file.close()
    return None


def _delete_unused(path: Path) -> bool:
    """Delete a file unless a process holds it. Returns whether it is gone."""
    with path.open("rb") as file:
        try:
            _lock(file, wait=False)
        except BlockingIOError:
            return False
        if _is(file, path):
            path.unlink()
    return True

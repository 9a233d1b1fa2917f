"""Streams of users in LMDB: one row a user, with a checksum; all rows of a batch or none.

    key      one byte for the type of the user, then the user
    value    number of writes, length, time of the last write, CRC-32, then the arrays of the stream

LMDB never overwrites a page that a reader can see, and a transaction ends with fsync. So the file
is intact after a kill or a power failure.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import shutil
import struct
import threading
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rmjax.io import atomic
from rmjax.io.paths import resolve
from rmjax.run.workdir import lock
from rmjax.serve.lmdb_file import CURE, checked_size

if TYPE_CHECKING:
    import lmdb

User = str | int | bytes  # an int of 64 bits
FORMAT = 1
MOST = 510  # bytes of a user; LMDB's keys have 511
_ABOUT = b"\0about"  # the key that says whose streams these are; users' keys begin with a letter
_FIELDS, _CRC = struct.Struct("<QQd"), struct.Struct("<Q")
_HEADER = _FIELDS.size + _CRC.size
_MAP = 1 << 26  # bytes of the first map
_CHUNK = 1024  # users that one transaction lists


class Damaged(ValueError):
    """The row of a user in the database does not fit its checksum.

    Attributes:
      user: whose row it is.
    """

    def __init__(self, user: User, path: Path):
        super().__init__(
            f"user {user!r}: the row in {path} does not fit its checksum: reset this user, or "
            "restore the database from a copy"
        )
        self.user, self._path = user, path

    def __reduce__(self) -> tuple[type[Damaged], tuple[User, Path]]:
        return Damaged, (self.user, self._path)


class Row(NamedTuple):
    """The stream of a user, as bytes."""

    writes: int  # number of writes so far
    length: int  # number of items so far
    written: float  # time of the last write, unix seconds
    payload: bytes  # the arrays of the stream, one after another


class Database:
    """An LMDB database of streams. Any thread may read; one at a time may commit.

    Args:
      path: the folder of the database.
      about: what the rows depend on, see `Streams`; values that JSON can hold. None: whatever the
        database says.
      readonly: for a process beside the one that writes. It sees what is committed.
      map_size: bytes of the map at first; the map grows when it is full.

    Attributes:
      about: what the rows depend on.

    Raises:
      ModuleNotFoundError: lmdb is not installed.
      FileNotFoundError: there is no database, and None or `readonly` does not make one.
      ValueError: the path is a URL, or the database is foreign, truncated or another model's.
      RuntimeError: another process, or another store of this one, has it open.
      OSError: the folder cannot be written to.
    """

    def __init__(
        self,
        path: str | Path,
        about: Mapping[str, Any] | None = None,
        *,
        readonly: bool = False,
        map_size: int = _MAP,
    ):
        self._lmdb = _import()
        self.path = resolve(
            path, "store", "LMDB needs a local disk: give the path of a folder there"
        )
        self._file = self.path / "data.mdb"
        self._readonly = readonly
        self._broken = False  # after a failed commit, until the environment is open again
        self._map = threading.Lock()  # the map must not grow while this process reads
        with contextlib.ExitStack() as held:
            if not readonly and (about is not None or self._file.exists()):
                held.enter_context(lock(self.path, name="store"))
            if not self._file.exists():
                self._make(about, readonly)
            size = checked_size(self._file)
            self._map_size = max(map_size, 2 * size)
            self._env = self._opened()
            held.callback(lambda: self._env.close())
            self.about = self._read_about()
            if about is not None:
                compare(self.about, about, self.path)
            self._held = held.pop_all()

    def __len__(self) -> int:
        """Number of users."""
        with self._reading() as transaction:
            return int(transaction.stat()["entries"]) - 1

    def __contains__(self, user: User) -> bool:
        """Whether a user has a row, damaged or not."""
        with self._reading() as transaction:
            return transaction.get(key_of(user)) is not None

    def read(self, users: Iterable[User]) -> dict[User, Row | Damaged]:
        """Reads rows in one transaction.

        Args:
          users: whose rows.

        Returns:
          The rows of those who have one. In the place of a damaged row there is the error.
        """
        rows: dict[User, Row | Damaged] = {}
        with self._reading() as transaction:
            for user in users:
                key = key_of(user)
                value = transaction.get(key)
                if value is not None:
                    rows[user] = _row(key, value) or Damaged(user, self.path)
        return rows

    def users(self) -> Iterator[User]:
        """Yields all users. Those who come or go meanwhile may be among them or not."""
        last, more = _ABOUT, True
        while more:
            with self._reading() as transaction, transaction.cursor() as cursor:
                # Without a key from `last` on, the cursor would begin again at the first one.
                listed = map(bytes, cursor.iternext(values=False) if cursor.set_range(last) else ())
                keys = list(itertools.islice((key for key in listed if key != last), _CHUNK))
            more = len(keys) == _CHUNK
            last = keys[-1] if keys else last
            yield from map(user_of, keys)

    def commit(self, changes: Mapping[User, Row | None], *, clear: bool = False) -> None:
        """Changes rows in one transaction; returns when they would survive a power failure.

        Args:
          changes: {user: the new row, or None to remove it}.
          clear: removes all other users.

        Raises:
          OSError: the disk has no room; names the file, the size and the cure. Nothing changed.
        """
        size = sum(_HEADER + len(row.payload) for row in changes.values() if row is not None)
        try:
            self._commit(changes, clear, size)
        except (self._lmdb.Error, OSError) as error:
            with self._map:  # an environment may refuse everything after a failed commit
                self._broken = True
                with contextlib.suppress(OSError):  # the next call tries it again
                    self._reopen()
            raise self._explained(error, size) from error

    def close(self) -> None:
        """Closes the database, and lets another process write to it."""
        self._broken = False
        self._held.close()

    def _commit(self, changes: Mapping[User, Row | None], clear: bool, size: int) -> None:
        with self._map:
            self._reopen()
        freed = False
        while True:
            try:
                with self._env.begin(write=True) as transaction:
                    self._apply(transaction, changes, clear)
                return
            except self._lmdb.MapFullError:
                with self._map:
                    if not freed and self._env.reader_check():
                        freed = True  # pages that killed readers kept from reuse
                        continue
                    self._map_size = 2 * max(self._map_size, size)
                    self._env.set_mapsize(self._map_size)

    def _apply(
        self, transaction: lmdb.Transaction, changes: Mapping[User, Row | None], clear: bool
    ) -> None:
        if clear:
            transaction.drop(self._env.open_db(None, transaction), delete=False)
            transaction.put(_ABOUT, json.dumps(self.about).encode())
        for user, row in changes.items():
            key = key_of(user)
            if row is None:
                transaction.delete(key)
            else:
                transaction.put(key, _value(key, row))

    def _opened(self) -> lmdb.Environment:
        try:
            env: lmdb.Environment = self._lmdb.open(
                os.fspath(self.path),
                map_size=self._map_size,
                readonly=self._readonly,
                create=False,
                readahead=False,
                max_readers=1024,
                mode=0o644,
            )
            env.reader_check()  # a reader that was killed would keep old pages from reuse
            return env
        except self._lmdb.Error as error:
            cure = f"close it where this process has it open, or {CURE}"
            raise ValueError(f"{self._file} cannot be opened ({error}): {cure}") from error

    def _reopen(self) -> None:
        """Opens the environment again if a commit has failed; the caller holds `_map`."""
        if self._broken:
            self._env.close()
            try:
                self._env = self._opened()
            except ValueError as error:
                raise OSError(str(error)) from error
            self._broken = False

    @contextlib.contextmanager
    def _reading(self) -> Iterator[lmdb.Transaction[memoryview]]:
        with self._map:
            self._reopen()
            try:
                try:
                    transaction = self._env.begin(buffers=True)
                except self._lmdb.MapResizedError:  # the process that writes has enlarged the map
                    self._env.set_mapsize(0)
                    transaction = self._env.begin(buffers=True)
                with transaction:
                    yield transaction
            except (self._lmdb.CorruptedError, self._lmdb.PageNotFoundError) as error:
                raise OSError(f"{self._file} is damaged ({error}): {CURE}") from error
            except self._lmdb.Error as error:
                raise OSError(f"{self._file} cannot be read ({error}): open it again") from error

    def _make(self, about: Mapping[str, Any] | None, readonly: bool) -> None:
        """Makes an empty database. A kill leaves it complete or absent."""
        if (self.path / "index.json").exists():
            cure = "python -m rmjax.import_streams copies them into a new database"
            raise ValueError(f"{self.path} holds streams in files of an earlier version: {cure}")
        if readonly or about is None:
            raise FileNotFoundError(
                f"{self.path} holds no database of streams: name the folder that a service wrote"
            )
        making = self.path / "making"
        try:
            making.mkdir(exist_ok=True)
            for left in making.iterdir():
                left.unlink()
            env = self._lmdb.open(os.fspath(making), map_size=_MAP)
            with env, env.begin(write=True) as transaction:
                transaction.put(_ABOUT, json.dumps(dict(about)).encode())
            (self.path / "lock.mdb").unlink(missing_ok=True)
            (making / "data.mdb").rename(self._file)
            (making / "lock.mdb").unlink()
            making.rmdir()
            atomic.sync(self.path)
            atomic.sync(self.path.parent)
        except (self._lmdb.Error, OSError) as error:
            raise self._explained(error, 1 << 15) from error

    def _explained(self, error: Exception, size: int) -> OSError:
        """An error of a write of `size` bytes, in words that name the cure."""
        code = getattr(error, "code", None) or getattr(error, "errno", None) or 0
        if code == errno.EIO and shutil.disk_usage(self.path).free < size:
            code = errno.ENOSPC  # LMDB says EIO where a part of a page still fits
        if code > 0:
            return atomic.explained(OSError(code, os.strerror(code)), self._file, size)
        if isinstance(error, self._lmdb.Error):  # an error of LMDB, and not of the disk
            cure = f"open the database again; if it stays, {CURE}"
            return OSError(f"{self._file}: {size:,} bytes could not be written ({error}): {cure}")
        return atomic.explained(OSError(code, str(error)), self._file, size)

    def _read_about(self) -> dict[str, Any]:
        try:
            with self._reading() as transaction:
                about = json.loads(bytes(transaction.get(_ABOUT, b"")))
        except (ValueError, OSError):
            about = None
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            version = about.get("format") if isinstance(about, dict) else None
            raise ValueError(
                f"{self._file} holds no streams of format {FORMAT} (its format: {version}): "
                "give the path of another database"
            )
        return about


def open_readonly(path: str | Path) -> Database:
    """Opens a database for reading, also while another process writes to it.

    Args:
      path: the folder of the database.

    Returns:
      The database; close it at the end.

    Raises:
      FileNotFoundError: there is no database.
      ValueError: it is foreign or truncated.
    """
    return Database(path, readonly=True)


def key_of(user: User) -> bytes:
    """The key of a user; keys of ints are in the order of the ints.

    Args:
      user: a str, an int of 64 bits, or bytes.

    Returns:
      The bytes of the key.
    """
    if isinstance(user, int):
        return b"i" + (user + 2**63).to_bytes(8, "big")
    return b"s" + user.encode() if isinstance(user, str) else b"b" + user


def user_of(key: bytes) -> User:
    """Inverts `key_of`.

    Args:
      key: the bytes of a key.

    Returns:
      The user.
    """
    kind, rest = key[:1], key[1:]
    if kind == b"i":
        return int.from_bytes(rest, "big") - 2**63
    return rest.decode() if kind == b"s" else rest


def check_user(user: object) -> None:
    """Raises ValueError unless a user is a str, bytes, or an int of 64 bits, and short enough."""
    number = isinstance(user, int) and not isinstance(user, bool) and -(2**63) <= user < 2**63
    if not number and not isinstance(user, str | bytes):
        raise ValueError(
            f"user {user!r} is a {type(user).__name__}: a user is a str, bytes or an int of 64 bits"
        )
    if isinstance(user, str):
        try:
            user = user.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"user {user!r} is no Unicode text: {error.reason}") from error
    if isinstance(user, bytes) and len(user) > MOST:
        raise ValueError(f"user {user[:20]!r}... has {len(user)} bytes: at most {MOST} fit")


def _value(key: bytes, row: Row) -> bytes:
    fields = _FIELDS.pack(row.writes, row.length, row.written)
    return fields + _CRC.pack(_checksum(key, fields, row.payload)) + row.payload


def _row(key: bytes, value: memoryview) -> Row | None:
    """The row that a value holds; None if it does not fit its checksum."""
    if len(value) < _HEADER:
        return None
    fields, payload = value[: _FIELDS.size], value[_HEADER:]
    (checksum,) = _CRC.unpack(value[_FIELDS.size : _HEADER])
    if checksum != _checksum(key, fields, payload):
        return None
    writes, length, written = _FIELDS.unpack(fields)
    return Row(writes, length, written, bytes(payload))


def _checksum(*parts: bytes | memoryview) -> int:
    """CRC-32 over the key, too: a row is never taken for another user's."""
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return checksum


def compare(actual: Mapping[str, Any], wanted: Mapping[str, Any], path: str | Path) -> None:
    """Raises ValueError unless streams are those of this model.

    Args:
      actual: what is written beside the streams.
      wanted: what this model needs there.
      path: where the streams are.
    """
    plain = json.loads(json.dumps(dict(wanted)))
    other = [name for name, value in plain.items() if actual.get(name) != value]
    if other:
        shown = "; ".join(
            f"{name} {actual.get(name)!r}, this model has {plain[name]!r}" for name in other
        )
        raise ValueError(
            f"{path} holds streams of another model ({shown}): "
            "open it with the model that wrote them"
        )


def _import() -> Any:
    try:
        import lmdb
    except ModuleNotFoundError as error:
        cause = "lmdb, which keeps streams on the disk, is not installed"
        raise ModuleNotFoundError(f"{cause}: pip install 'rmjax[serve]'") from error
    return lmdb

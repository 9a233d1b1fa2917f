"""Checks that the file of an LMDB database is complete.

LMDB maps a truncated file without a word, and the process dies when it reads past the end.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

CURE = "restore it from a copy"
_META = struct.Struct("=II8xQI")  # magic, version, (address,) size of the map, bytes of a page
_MAGIC = 0xBEEFC0DE
_ROOT = 64  # offset of the root page of the free list behind the header of a meta page
_LAST = 120  # offset of 'last page' and 'transaction' there
_PAGE = struct.Struct("=8x2xHHH")  # header of a page: (number, pad,) flags, lower, upper
_NODE = struct.Struct("=IHH")  # low bits of size or page, flags or high bits of page, bytes of key
_BRANCH, _LEAF, _BIG = 1, 2, 1
_NONE = 2**64 - 1  # root of an empty tree


class _Meta(NamedTuple):
    """What the newer meta page says."""

    transaction: int
    last: int  # number of the last page
    root: int  # of the tree that lists free pages
    page: int  # bytes of a page
    header: int  # bytes before the content of a page: 16 in LMDB 0.9, 24 in 1.0


def checked_size(file: Path) -> int:
    """Bytes that the pages of a complete database need.

    LMDB does not write a page that one transaction takes and gives up again. So an intact file may
    end before its last page. Such pages are in the free list, and LMDB reads no free page. The file
    is therefore complete if every page behind its end is free. This reads the free list alone, and
    only if the file is short.

    Args:
      file: `data.mdb`. Another process may write to it.

    Returns:
      The bytes; the file may be shorter.

    Raises:
      ValueError: it is no LMDB database, or it is truncated.
    """
    while True:
        with file.open("rb") as opened:
            meta = _newest(opened, file)
            size, needed = file.stat().st_size, (meta.last + 1) * meta.page
            if size >= needed:
                return needed
            try:
                missing = set(range(size // meta.page, meta.last + 1)) - set(_free(opened, meta))
            except (struct.error, ValueError, RecursionError):  # the list is damaged or cut off
                missing = {meta.last}
            if not missing:
                return needed
            if _newest(opened, file) == meta:  # no other process has written meanwhile
                raise ValueError(f"{file} is truncated: {size} of {needed} bytes: {CURE}")


def _newest(opened: BinaryIO, file: Path) -> _Meta:
    opened.seek(0)
    head = opened.read(1 << 17)  # two pages of the largest size
    for header in (16, 24):
        if len(head) >= header + _META.size:
            magic, _, _, page = _META.unpack_from(head, header)
            if magic == _MAGIC:
                break
    else:
        raise ValueError(f"{file} is no LMDB database, or is damaged: {CURE}")
    if page < 256 or page + header + _LAST + 16 > len(head):
        raise ValueError(f"{file} is truncated or damaged: {CURE}")
    metas = []
    for content in (header, page + header):
        last, transaction = struct.unpack_from("=QQ", head, content + _LAST)
        (root,) = struct.unpack_from("=Q", head, content + _ROOT)
        metas.append(_Meta(transaction, last, root, page, header))
    return max(metas)


def _free(opened: BinaryIO, meta: _Meta) -> Iterator[int]:
    """Yields the numbers of the free pages, as LMDB 0.9 lists them."""
    if meta.header != 16:
        raise ValueError("the form of the list is not known")

    def read(number: int, first: int, count: int) -> bytes:
        opened.seek(number * meta.page + first)
        content = opened.read(count)
        if len(content) < count:
            raise ValueError("the list is cut off")
        return content

    def walk(number: int) -> Iterator[int]:
        page = read(number, 0, meta.page)
        flags, lower, _ = _PAGE.unpack_from(page)
        for (start,) in struct.iter_unpack("=H", page[meta.header : lower]):
            low, high, key = _NODE.unpack_from(page, start)
            if flags & _BRANCH:
                yield from walk(low | high << 32)
                continue
            if not flags & _LEAF:
                raise ValueError("this page is not in the list")
            data = page[start + _NODE.size + key :]
            if high & _BIG:
                data = read(struct.unpack_from("=Q", data)[0], meta.header, low)
            (count,) = struct.unpack_from("=Q", data)
            yield from struct.unpack_from(f"={count}Q", data, 8)

    if meta.root != _NONE:
        yield from walk(meta.root)

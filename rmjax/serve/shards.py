"""Which of several stores holds a user.

The hash of a user is a number of 64 bits. Shard i of n holds the users of the i-th of n equal
ranges of hashes. `rmjax.serve.reshard` copies users from n stores to another number of stores.
"""

from __future__ import annotations

import hashlib

from rmjax.serve.database import User, check_user, key_of

HASHES = 1 << 64


def hash_of(user: User) -> int:
    """The hash of a user, the same in every process and in every version.

    Args:
      user: as in `Streams`; the integer 7 and the string '7' are two users.

    Returns:
      The first 8 bytes of the SHA-256 digest of the user's key, 0 .. 2^64 - 1.

    Raises:
      ValueError: it is no user.
    """
    check_user(user)
    return int.from_bytes(hashlib.sha256(key_of(user)).digest()[:8], "big")


def shard_of(user: User, shards: int) -> int:
    """The shard that holds a user.

    Args:
      user: as in `Streams`.
      shards: how many shards exist.

    Returns:
      A number from 0 to shards - 1.

    Raises:
      ValueError: it is no user, or there is no shard.
    """
    if shards < 1:
        raise ValueError(f"{shards} shards: there must be at least 1")
    return hash_of(user) * shards // HASHES

"""Int64 row ids and hash buckets: the two numbers every large join, diff and resume works on.

A row id is a hash of the shop's own id, so it needs no central counter, is the same in every run
and is never reused. Two different ids that collide land in the same bucket, where the stage that
owns the bucket finds them and stops; at 100 million ids the chance of one collision is 5e-4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt


def row_ids(ids: Iterable[str]) -> npt.NDArray[np.int64]:
    """Non-negative int64 row ids, shape (N,), of N string ids."""
    digests = b"".join(hashlib.blake2b(one.encode("utf-8", "surrogatepass"), digest_size=8).digest() for one in ids)
    return (np.frombuffer(digests, dtype="<u8") >> np.uint64(1)).astype(np.int64)


def row_id(one: str) -> int:
    """The row id of one string id."""
    return int(row_ids([one])[0])


def bucket_of(rows: npt.NDArray[np.int64], num_buckets: int) -> npt.NDArray[np.int32]:
    """The bucket, 0 to `num_buckets` - 1, of each row id, shape (N,)."""
    return (rows % num_buckets).astype(np.int32)

"""Row ids and buckets."""

from __future__ import annotations

import numpy as np

from recsys_ray.ids import bucket_of, row_id, row_ids


def test_row_ids_are_stable_distinct_and_not_negative() -> None:
    names = [f"B{number:09d}" for number in range(20_000)]
    rows = row_ids(names)
    assert rows.dtype == np.int64
    assert rows.min() >= 0
    assert len(np.unique(rows)) == len(names)
    assert row_id("B000000007") == rows[7]
    # Frozen: a changed hash would orphan every stored index.
    assert row_id("B07XYZ") == int.from_bytes(__import__("hashlib").blake2b(b"B07XYZ", digest_size=8).digest(),
                                              "little") >> 1


def test_buckets_are_even_and_empty_input_works() -> None:
    rows = row_ids(str(number) for number in range(20_000))
    counts = np.bincount(bucket_of(rows, 16), minlength=16)
    assert counts.min() > 0.85 * 20_000 / 16
    assert row_ids([]).shape == (0,)


def test_lone_surrogates_have_an_id() -> None:
    assert row_id("\ud800") != row_id("\ud801")

"""An index into a store: what changed is sent, a killed run continues, what is gone is deleted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_pictures import build_small_hybrid

from recsys_ray.retrieval import write_store as module
from recsys_ray.retrieval.stores import FaissStore, FaissStoreConfig, open_store
from recsys_ray.retrieval.write_store import WriteStoreConfig, write_store


def test_a_killed_run_continues_and_an_unchanged_index_sends_nothing(
        small_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = WriteStoreConfig(index=small_index, store=FaissStoreConfig(path=tmp_path / "store"),
                              notes=tmp_path / "notes", batch_rows=25)
    sent: list[int] = []

    class Dying(FaissStore):
        def upsert(self, rows: object) -> None:
            if len(sent) == 3:
                raise ConnectionError
            super().upsert(rows)  # type: ignore[arg-type]
            sent.append(len(rows))  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(module, "open_store", lambda one: Dying(one))
        with pytest.raises(ConnectionError):
            write_store(config)
    assert write_store(config) == {"products": 120, "written": 120 - sum(sent), "unchanged": sum(sent), "deleted": 0}
    assert write_store(config) == {"products": 120, "written": 0, "unchanged": 120, "deleted": 0}
    assert open_store(config.store).count() == 120


def test_another_index_replaces_what_changed_and_deletes_what_is_gone(
        small_index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = WriteStoreConfig(index=small_index, store=FaissStoreConfig(path=tmp_path / "store"),
                              notes=tmp_path / "notes", batch_rows=40)
    write_store(config)
    whole = module.vector_parts

    def fewer(root: Path):  # type: ignore[no-untyped-def]
        for rows, vectors in whole(root):
            yield rows.slice(1), vectors[1:]

    monkeypatch.setattr(module, "vector_parts", fewer)
    assert write_store(config) == {"products": 117, "written": 117, "unchanged": 0, "deleted": 3}
    assert open_store(config.store).count() == 117


def test_hybrid_vectors_go_the_same_way(tmp_path: Path) -> None:
    config = WriteStoreConfig(index=build_small_hybrid(tmp_path), store=FaissStoreConfig(path=tmp_path / "store"),
                              notes=tmp_path / "notes")
    assert write_store(config)["written"] == 120
    vectors = np.load(next(tmp_path.glob("hybrid/versions/*/vectors.npy")))
    assert open_store(config.store).search(vectors[:1], 1)[0][0].score == pytest.approx(float(vectors[0] @ vectors[0]))

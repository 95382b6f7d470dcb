"""The border control between stages."""

from __future__ import annotations

import pyarrow as pa
import pytest

from recsys_ray import schema
from recsys_ray.schema import SchemaError, conform


def test_conform_orders_casts_and_fills_nullable_columns() -> None:
    table = pa.table({"gain": [1.0, 0.5], "product_id": ["a", "b"], "query_id": ["q", "q"], "extra": [1, 2]})
    fitted = conform(table, schema.JUDGMENT, "judgments")
    assert fitted.schema == schema.JUDGMENT
    assert fitted.column("label").null_count == 2


@pytest.mark.parametrize(("columns", "message"), [
    ({"query_id": ["q"], "gain": [1.0]}, "judgments: required column 'product_id'"),
    ({"query_id": ["q"], "product_id": [None], "gain": [1.0]}, "'product_id' holds 1 null"),
    ({"query_id": ["q"], "product_id": ["a"], "gain": ["high"]}, "'gain' should be float, found string"),
])
def test_what_does_not_fit_is_named(columns: dict[str, list[object]], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        conform(pa.table(columns), schema.JUDGMENT, "judgments")


def test_every_event_field_a_click_log_needs_is_there() -> None:
    needed = {"kind", "timestamp_ms", "user_id", "query_id", "list_id", "position", "propensity"}
    assert needed <= set(schema.EVENT.names)


def test_embedding_vectors_are_plain_lists() -> None:
    assert schema.embedding_schema(3).field("vector").type == pa.list_(pa.float32(), 3)

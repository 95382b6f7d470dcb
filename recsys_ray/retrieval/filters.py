"""Conditions on products, applied inside retrieval: which rows of a segment may be answers at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from recsys_ray.config import Config

Mask = npt.NDArray[np.bool_]
NO_PRICE = -1


class Filters(Config):
    """What every answer must meet; an unknown key is refused. Values of one key are alternatives."""

    category: tuple[str, ...] | None = None
    brand: tuple[str, ...] | None = None
    concern: tuple[str, ...] | None = None      # that the product addresses; one without a score never passes
    price_min_cents: int | None = Field(default=None, ge=0)     # a product without a price never passes
    price_max_cents: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _prices_in_order(self) -> Self:
        low, high = self.price_min_cents, self.price_max_cents
        if low is not None and high is not None and low > high:
            raise ValueError(f"price_min_cents {low} is larger than price_max_cents {high}")
        return self

    @property
    def pass_all(self) -> bool:
        """Whether no condition was set."""
        return self == Filters()


@dataclass(frozen=True)
class _Coded:
    """A string column as numbers: equal strings have equal codes."""

    codes: npt.NDArray[np.int32]
    numbers: dict[str, int]

    @classmethod
    def of(cls, column: pa.ChunkedArray[Any]) -> _Coded:
        coded = column.combine_chunks().dictionary_encode()
        values = coded.dictionary.to_pylist()
        codes = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
        return cls(codes, {value: number for number, value in enumerate(values) if value is not None})

    def one_of(self, values: Sequence[str]) -> Mask:
        wanted = [self.numbers[value] for value in values if value in self.numbers]
        return np.isin(self.codes, np.array(wanted, dtype=np.int32))


class FilterError(ValueError):
    """A condition that no product of this index can be asked for; the message names those that can."""


def refuse_unknown_concerns(asked: Sequence[str] | None, known: Sequence[str]) -> None:
    """Nothing when every concern asked for is known; else `FilterError`."""
    if asked is not None and not known:
        raise FilterError("concern: the products of this index were not scored for concerns")
    if not set(asked or ()) <= set(known):
        raise FilterError(f"concern: unknown; the products of this index were scored for {', '.join(known)}")


class FilterColumns:
    """The filterable columns of N rows, ready for many filters."""

    def __init__(self, rows: pa.Table) -> None:
        self.size = rows.num_rows
        self._coded = {name: _Coded.of(rows[name]) for name in ("category", "brand")}
        price = rows["price_cents"].combine_chunks().fill_null(NO_PRICE)
        addresses = rows["addresses"].combine_chunks()
        owners, named = pc.list_parent_indices(addresses).to_numpy(), addresses.flatten().to_numpy(zero_copy_only=False)
        self._addressing = {one: owners[named == one] for one in np.unique(named.astype(str)).tolist()}
        self._price_cents = price.to_numpy(zero_copy_only=False).astype(np.int64)

    def mask(self, filters: Filters) -> Mask:
        """True for the rows that meet every condition, shape (N,)."""
        mask = np.ones(self.size, dtype=np.bool_)
        for name, coded in self._coded.items():
            values = getattr(filters, name)
            if values is not None:
                mask &= coded.one_of(values)
        if filters.concern is not None:
            addressing = np.zeros(self.size, dtype=np.bool_)
            for one in set(filters.concern) & set(self._addressing):
                addressing[self._addressing[one]] = True
            mask &= addressing
        if filters.price_min_cents is not None or filters.price_max_cents is not None:
            mask &= self._price_cents != NO_PRICE
        if filters.price_min_cents is not None:
            mask &= self._price_cents >= filters.price_min_cents
        if filters.price_max_cents is not None:
            mask &= self._price_cents <= filters.price_max_cents
        return mask

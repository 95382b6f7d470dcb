"""What BT-BERT reads: one concern and one product as a sequence of tokens, and which token belongs to which part.

    paper       query, padded to QUERY_TOKENS tokens, [CLS] ingredients [SEP] title
    shared      the same, all queries in front of a product that is read once: it does not see them (`Fronts`)
    seed        [CLS] query [SEP] ingredients [SEP] title
    explicit    [CLS] ingredients [SEP] title           (no query: the model has an output for every concern)

Products and queries are tokenised once and put together for each pair. The query has a constant place, so what
its first token sends to itself can be read as the answer; the order of the ingredients is kept, since it is the
order of their shares. Layout `paper`: "Beauty Beyond Words", arXiv 2409.13628, figure 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from recsys_ray.models.fronts import Fronts
from recsys_ray.models.sentence_layout import EncoderError, SentenceLayout
from recsys_ray.models.text_encoder import prepare_text

Layout = Literal["paper", "seed", "shared"]
Style = Literal["paper", "seed", "shared", "explicit"]
Tokens = npt.NDArray[np.int32]
Spans = npt.NDArray[np.int32]

QUERY_TOKENS = 3
TITLE_SHARE = 4         # a long list of ingredients leaves the title this part of the room: a quarter
MIN_TOKENS = 16         # of a whole input


@dataclass(frozen=True)
class ProductTokens:
    """One product's tokens, not yet cut."""

    ingredients: Tokens
    spans: Spans        # (I, 2): where each token of the ingredients begins and ends in their text
    title: Tokens
    numbers: Tokens     # (I,): how many commas are before each token of the ingredients, so which ingredient it is of

    def thinned(self, share: float, random: np.random.Generator) -> ProductTokens:
        """The same without some of the ingredients, each left out with probability `share`, in their order."""
        kept = random.random(int(self.numbers.max(initial=0)) + 1) >= share
        rows = kept[self.numbers]
        return ProductTokens(self.ingredients[rows], self.spans[rows], self.title, self.numbers[rows])


@dataclass(frozen=True)
class PairInput:
    """One concern and one product as the model reads them."""

    ids: Tokens                 # (L,)
    query: slice                # its tokens' places
    ingredients: slice          # those of the ingredients; their first token is the product's first


def fronts_of(style: Style, queries: int) -> Fronts | None:
    """The queries in front of a product, in layout `shared`; in the others each input is of one query or none."""
    return Fronts(queries, QUERY_TOKENS) if style == "shared" else None


class BtBertTokenizer:
    """Texts -> tokens -> inputs of at most `max_tokens` tokens."""

    def __init__(self, layout: SentenceLayout, style: Style, max_tokens: int, max_chars: int = 20_000) -> None:
        from transformers import AutoTokenizer

        if not MIN_TOKENS <= max_tokens <= (layout.max_tokens or max_tokens):
            raise EncoderError(f"max_tokens: {max_tokens} is not from {MIN_TOKENS} to {layout.max_tokens}, what "
                               f"{layout.root} takes")
        whole = AutoTokenizer.from_pretrained(str(layout.transformer), local_files_only=True)
        self._tokenizer = whole.backend_tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._begin, self._end, self._pad = (int(one) for one in (whole.cls_token_id, whole.sep_token_id,
                                                                  whole.pad_token_id))
        self.style, self.max_tokens, self._max_chars = style, max_tokens, max_chars

    def query(self, text: str) -> Tokens:
        """The tokens of a concern's words; raises `EncoderError` when the layout has no room for them."""
        ids = np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)
        if not len(ids):
            raise EncoderError(f"the query {text!r} has no token; give the concern other words")
        if self.style in ("paper", "shared"):
            if len(ids) > QUERY_TOKENS:
                raise EncoderError(f"the query {text!r} has {len(ids)} tokens, and layout `{self.style}` has room for "
                                   f"{QUERY_TOKENS}; give the concern a shorter query, or use layout `seed`")
            ids = np.concatenate([ids, np.full(QUERY_TOKENS - len(ids), self._pad, dtype=np.int32)])
        return ids[:self.max_tokens // 2]

    def products(self, ingredients: Sequence[str | None], titles: Sequence[str | None]) -> list[ProductTokens]:
        """The tokens of N products; a missing text has none."""
        lists = [prepare_text(one or "", self._max_chars) for one in ingredients]
        names = [prepare_text(one or "", self._max_chars) for one in titles]
        found = []
        for text, one, title in zip(lists, self._encoded(lists), self._encoded(names), strict=True):
            spans = np.array(one.offsets, dtype=np.int32).reshape(-1, 2)
            commas = np.flatnonzero([letter == "," for letter in text])
            found.append(ProductTokens(np.array(one.ids, dtype=np.int32), spans, np.array(title.ids, dtype=np.int32),
                                       np.searchsorted(commas, spans[:, 0]).astype(np.int32)))
        return found

    def _encoded(self, texts: Sequence[str]) -> list[Any]:
        found: list[Any] = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return found

    def pair(self, query: Tokens | None, product: ProductTokens) -> PairInput:
        """The input of one pair; `query` is None for style `explicit`."""
        if (query is None) != (self.style == "explicit"):
            raise ValueError(f"style {self.style!r} with{'out' if query is None else ''} a query")
        asked = np.zeros(0, dtype=np.int32) if query is None else query
        begin, end = np.array([self._begin], np.int32), np.array([self._end], np.int32)
        head = [begin, asked, end] if self.style == "seed" else [asked, begin]
        start = sum(map(len, head))
        listed, title = _cut(product, self.max_tokens - start - 1)
        first = 1 if self.style == "seed" else 0
        return PairInput(np.concatenate([*head, listed, end, title]), slice(first, first + len(asked)),
                         slice(start, start + len(listed)))

    def shared(self, queries: Sequence[Tokens], product: ProductTokens) -> Tokens:
        """The input of a product with all queries in front of it; it is cut as it is behind one of them."""
        pair = self.pair(queries[0], product)
        return np.concatenate([*queries, pair.ids[pair.query.stop:]])


def _cut(product: ProductTokens, room: int) -> tuple[Tokens, Tokens]:
    """Ingredients and title that fit: the end of the longer list goes first, the title keeps its part of the room."""
    title = product.title[:max(room // TITLE_SHARE, room - len(product.ingredients))]
    return product.ingredients[:room - len(title)], title

"""A teacher's scores of training pairs, and whether it may teach: only one shown to be better than its student.

Teacher and student rank the product of each validation query among the same products, drawn at random so
that neither chose them; their reciprocal ranks are compared query by query.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import Field

from recsys_ray.artifacts import Artifact, FileEntry, write_table
from recsys_ray.config import Config, fingerprint
from recsys_ray.data.pairs import PairError
from recsys_ray.evaluation.gate import GateConfig
from recsys_ray.evaluation.significance import Units
from recsys_ray.models.pair_scorer import PairScorer, PairScorerConfig, build_pair_scorer
from recsys_ray.models.text_encoder import TextEncoderConfig, encoder_identity
from recsys_ray.runtime import RayConfig
from recsys_ray.schema import TEACHER_SCORES, TRAINING_PAIR, conform
from recsys_ray.training.losses import TeacherError, require_better_teacher

log = logging.getLogger(__name__)

PAIRS_KIND = "pairs"
STAGE_VERSION = 1       # raise it when the same inputs would give other scores
CATALOGUE = 5000        # products that the others are drawn from, those of valid queries first
PAIRS_AT_ONCE = 4096


class ScorePairsConfig(Config):
    """Which pairs, whose scores, and whom they are to teach."""

    pairs: Path                                     # artefact root of pairs with negatives
    output: Path                                    # artefact root of the same pairs with scores
    teacher: PairScorerConfig
    student: TextEncoderConfig = TextEncoderConfig()    # that the training starts from
    queries: int = Field(default=300, ge=1)         # validation pairs that both are judged on
    candidates: int = Field(default=50, ge=2)       # products ranked for each, its own among them
    gate: GateConfig = GateConfig()
    force: bool = False                             # let any teacher teach; the outcome is recorded
    seed: int = 7
    workers: int = Field(default=2, ge=0)           # 0: this process, without Ray
    gpus: bool = False                              # a GPU each
    ray: RayConfig = RayConfig()

    def resolved(self) -> Self:
        """The same with absolute paths: workers start in other directories."""
        return self.replace(pairs=self.pairs.resolve(), output=self.output.resolve(), teacher=self.teacher.pinned())

    def key(self, pairs: Artifact) -> str:
        """What the scored pairs are known by."""
        judged = self.model_dump(mode="json", include={"queries", "candidates", "gate", "force", "seed"})
        return fingerprint({"stage": STAGE_VERSION, "pairs": [pairs.manifest.fingerprint, pairs.manifest.version],
                            "teacher": self.teacher.identity(), "student": encoder_identity(self.student),
                            "judged": judged})


# --- scores ---------------------------------------------------------------------------------------
def write_scored(pairs: pa.Table, scorer: PairScorer, directory: Path, name: str) -> FileEntry:
    """Write TRAINING_PAIR rows with the scores of their documents (TEACHER_SCORES) as `directory/name`."""
    return write_table(directory, name, with_scores(pairs, scorer))


def with_scores(pairs: pa.Table, scorer: PairScorer) -> pa.Table:
    """The TRAINING_PAIR rows, and beside them a teacher's score of each positive and each negative."""
    pairs = conform(pairs, TRAINING_PAIR, "pairs")
    texts = [[positive, *(negatives or ())] for positive, negatives in zip(
        pairs["text"].to_pylist(), pairs["negative_texts"].to_pylist(), strict=True)]
    counts = [len(one) for one in texts]
    asked = list(chain.from_iterable([query] * count for query, count in zip(
        pairs["query"].to_pylist(), counts, strict=True)))
    found = scored(scorer, asked, list(chain.from_iterable(texts)))
    lists = [part.tolist() for part in np.split(found, np.cumsum(counts)[:-1])] if counts else []
    columns = [pa.array([one[0] for one in lists], pa.float32()),
               pa.array([one[1:] for one in lists], pa.list_(pa.float32()))]
    added = conform(pa.table(columns, names=TEACHER_SCORES.names), TEACHER_SCORES, "teacher's scores")
    return pa.table([*pairs.columns, *added.columns], schema=pa.schema([*TRAINING_PAIR, *TEACHER_SCORES]))


def scored(scorer: PairScorer, queries: Sequence[str], texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """The scores of N (query, text) pairs, float32 (N,); `TeacherError` where one is not a number."""
    parts = [scorer.score(queries[start:start + PAIRS_AT_ONCE], texts[start:start + PAIRS_AT_ONCE])
             for start in range(0, len(queries), PAIRS_AT_ONCE)]
    found = np.concatenate([np.zeros(0, np.float32), *parts]).astype(np.float32)
    if not np.isfinite(found).all():
        place = int(np.flatnonzero(~np.isfinite(found))[0])
        raise TeacherError(f"the teacher's score of {queries[place]!r} is {found[place]}; take another dtype")
    return found


def require_negatives(pairs: Artifact) -> None:
    """Raise `PairError` for pairs that a teacher could say nothing about."""
    if not any(len(one) for table in pairs.tables("pairs/train/", ["negative_row_ids"])
               for one in table["negative_row_ids"].to_pylist()):
        raise PairError(f"{pairs.path}: no train pair has a negative, and a positive alone teaches nothing; "
                        "mine negatives first, or make the pairs with form=triplet")


# --- may it teach ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Questions:
    """Q queries, each with C products to rank; the first of them is its own."""

    queries: list[str]
    products: Sequence[Any]     # (Q,) row ids of their own: the unit that is resampled
    texts: list[list[str]]      # (Q, C)

    def reciprocal_ranks(self, scorer: PairScorer) -> npt.NDArray[np.float64]:
        """One over the rank of each query's own product, (Q,); equal scores count against it."""
        asked = [query for query, texts in zip(self.queries, self.texts, strict=True) for _ in texts]
        scores_QC = scored(scorer, asked, list(chain.from_iterable(self.texts))).reshape(len(self.queries), -1)
        ranks = 1 + (scores_QC[:, 1:] >= scores_QC[:, :1]).sum(axis=1)
        return np.asarray(1 / ranks, dtype=np.float64)


def draw_questions(pairs: Artifact, count: int, candidates: int, seed: int) -> Questions:
    """Validation queries with products of other near-duplicate groups; `TeacherError` when there are too few."""
    columns = ["query", "text", "row_id", "group_id"]
    asked = [row for table in pairs.tables("pairs/valid/", columns) for row in table.to_pylist()]
    if not asked:
        raise TeacherError(f"{pairs.path}: has no validation pair to judge the teacher by; set max_valid_reviews")
    catalogue: dict[int, dict[str, Any]] = {}
    trained = (row for table in pairs.tables("pairs/train/", columns) for row in table.to_pylist())
    for row in chain(asked, trained):
        if len(catalogue) >= CATALOGUE:
            break
        catalogue.setdefault(row["row_id"], row)
    generator = np.random.default_rng([seed, 2])
    products = list(catalogue.values())
    chosen = [asked[place] for place in generator.permutation(len(asked))[:count]]
    texts = []
    for row in chosen:
        order = generator.permutation(len(products))
        others = (products[place]["text"] for place in order if products[place]["group_id"] != row["group_id"])
        texts.append([row["text"], *(text for text, _ in zip(others, range(candidates - 1), strict=False))])
    if (fewest := min(map(len, texts))) < candidates:
        raise TeacherError(f"{pairs.path}: {fewest} products to rank for a query, {candidates} were asked for; "
                           "lower candidates")
    return Questions([row["query"] for row in chosen], [row["row_id"] for row in chosen], texts)


def compared(config: ScorePairsConfig, pairs: Artifact) -> dict[str, Any]:
    """The facts of a teacher that may teach; `TeacherError` with the figures for another one, unless forced."""
    questions = draw_questions(pairs, config.queries, config.candidates, config.seed)
    teacher = questions.reciprocal_ranks(build_pair_scorer(config.teacher))
    student = questions.reciprocal_ranks(build_pair_scorer(PairScorerConfig(encoder=config.student)))
    figures = (f"mean reciprocal rank among {config.candidates} products over {len(teacher)} validation queries: "
               f"teacher {teacher.mean():.4f}, student {student.mean():.4f}")
    outcome, difference = "improved", None
    try:
        interval = require_better_teacher(teacher, student, Units.of(questions.products), config.gate).difference
        difference = [interval.mean, interval.low, interval.high]
    except TeacherError as error:
        outcome = str(error)
        if not config.force:
            raise TeacherError(f"{error} ({figures}); set force=true to learn from it nevertheless") from None
    log.info("%s: %s", figures, outcome)
    return {"identity": config.teacher.identity(), "student": encoder_identity(config.student), "outcome": outcome,
            "difference": difference, "teacher_mrr": float(teacher.mean()), "student_mrr": float(student.mean()),
            "queries": len(teacher), "forced": outcome != "improved"}


def require_its_student(facts: Mapping[str, Any], student: TextEncoderConfig, pairs: Path) -> None:
    """Raise `TeacherError` unless the pairs of these facts have scores of a teacher judged against `student`."""
    teacher = facts.get("teacher")
    if teacher is None:
        raise TeacherError(f"contrastive.distillation: the pairs of {pairs} have no teacher's scores; make them with "
                           "the job score_pairs and train on its output")
    if not teacher["forced"] and teacher["student"]["weights_sha256"] != encoder_identity(student)["weights_sha256"]:
        raise TeacherError(f"{pairs}: its teacher was shown to be better than another encoder than {student.model}; "
                           "run score_pairs with student set to the encoder that the training starts from")

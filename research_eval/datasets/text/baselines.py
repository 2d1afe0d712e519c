"""The linear baselines of a text set: logistic regression on TF-IDF of words and word pairs, and of characters too.

They take seconds to minutes, so they are fitted on request only. Their scores stay in the cache under the hash of the
rows, and every later run on these rows has them.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from research_eval.datasets.text.cache import unwritable
from research_eval.datasets.text.splits import Rows
from research_eval.errors import ConfigError
from research_eval.files import write_atomically
from research_eval.system.environment import check_fits
from research_eval.system.untrusted import parse_json, read_limited

log = logging.getLogger(__name__)

PREFIXES = {"validation": "val", "test": "test"}
SCORES = {f"{prefix}_{score}" for prefix in PREFIXES.values() for score in ("acc", "f1")}
VECTORS = 25  # arrays of the size of the weights that the optimiser (L-BFGS) holds
MAX_BYTES = 10_000  # of a file with scores
WORDS, WITH_CHARACTERS = "tfidf_logreg", "tfidf_char_logreg"  # names in the facts of the data
FILES = {WORDS: "tfidf", WITH_CHARACTERS: "tfidf_char"}  # the beginnings of the names of the files with scores
CHARACTERS = (2, 5)  # lengths of character n-grams, within words


def stored_scores(path: Path) -> dict[str, float]:
    """The scores that `fit_linear_baseline` has stored; empty if there are none, or if the file is damaged."""
    if not path.is_file():
        return {}
    try:
        scores = parse_json(read_limited(path, MAX_BYTES, "a file of scores"), str(path))
    except ConfigError as problem:
        log.warning("%s It is ignored.", problem)
        return {}
    right = isinstance(scores, dict) and set(scores) <= SCORES and all(map(_is_share, scores.values()))
    return scores if right else {}


def _is_share(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value) and 0 <= value <= 1


def fit_linear_baseline(rows: Mapping[str, Rows], path: Path, baseline: str = WORDS) -> dict[str, float]:
    """Fit the baseline to the training rows and store its scores at `path`, unless they are there already.

    Raises ConfigError as `linear_scores` does, and if the folder cannot be written.
    """
    scores = stored_scores(path)
    if not scores:
        scores = linear_scores(rows, baseline)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(scores).encode())
        except OSError as error:
            raise unwritable(path.parent, error) from error
    return scores


def linear_scores(rows: Mapping[str, Rows], baseline: str = WORDS) -> dict[str, float]:
    """Accuracy and macro-F1 on validation and test: `val_acc`, `val_f1`, `test_acc`, `test_f1`; one core, no seed.

    Raises ConfigError if scikit-learn is not installed, if no text has a word, and if there is not enough memory.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import accuracy_score, f1_score
    except ImportError as error:
        raise ConfigError(
            "--baselines: TF-IDF + logistic regression needs scikit-learn: pip install scikit-learn"
        ) from error
    train = rows["train"]
    what = " of words and characters" if baseline == WITH_CHARACTERS else ""
    log.info("fitting TF-IDF%s + logistic regression to %s texts", what, f"{len(train.texts):,}")
    vectorizer, features = _features(train.texts, baseline)
    num_classes = len(set(train.labels.tolist()))
    num_bytes = 8 * VECTORS * num_classes * features.shape[1]
    check_fits(num_bytes, f"--baselines: logistic regression of {num_classes:,} classes")
    model = LogisticRegression(C=10, max_iter=1000).fit(features, train.labels)
    scores = {}
    for name, prefix in PREFIXES.items():
        if name in rows:
            guesses = model.predict(vectorizer.transform(rows[name].texts))
            scores[f"{prefix}_f1"] = float(f1_score(rows[name].labels, guesses, average="macro"))
            scores[f"{prefix}_acc"] = float(accuracy_score(rows[name].labels, guesses))
    return scores


def _features(texts: list[str], baseline: str) -> tuple[Any, Any]:
    """A fitted vectorizer and the features of the texts. A word has to be in two texts, unless no word is."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_union

    for fewest in (2, 1):
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=fewest)
        if baseline == WITH_CHARACTERS:
            letters = TfidfVectorizer(analyzer="char_wb", ngram_range=CHARACTERS, sublinear_tf=True, min_df=fewest)
            vectorizer = make_union(vectorizer, letters)
        try:
            return vectorizer, vectorizer.fit_transform(texts)
        except ValueError:
            log.debug("no word is in %d texts", fewest)
    raise ConfigError("--baselines: the training texts have no word of two letters, so there is no TF-IDF")

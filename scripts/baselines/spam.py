"""TF-IDF and logistic regression on the texts of a data part, the splits and the measure being its own.

python scripts/baselines/spam.py [spam|docstrings]
"""

import sys
import time

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

import framework as fw


def main(name: str) -> None:
    fw.discover()
    data = fw.datasets.build(name)
    began = time.perf_counter()
    scores = []
    for weight in (
        None,
        "balanced",
    ):  # evenly, where the classes of the test are not as frequent as in training
        last = LogisticRegression(C=10, max_iter=1000, class_weight=weight)
        model = make_pipeline(TfidfVectorizer(sublinear_tf=True, min_df=2), last)
        model.fit(data.texts["train"], data.labels["train"])
        scores += [model.score(data.texts[part], data.labels[part]) for part in ("val", "test")]
    seconds = time.perf_counter() - began
    print(
        f"{name}: TF-IDF + logistic regression, val {scores[0]:.4f}, test accuracy {scores[1]:.4f}; "
        f"classes weighted evenly, val {scores[2]:.4f}, test accuracy {scores[3]:.4f}; {seconds:.1f} s"
    )


if __name__ == "__main__":
    main(*sys.argv[1:] or ["spam"])

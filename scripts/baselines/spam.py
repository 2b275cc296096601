"""TF-IDF and logistic regression on the texts of a data part, with its splits.

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
    # balanced weights, because class frequencies differ between training and test
    for title, weight in {"": None, "balanced classes, ": "balanced"}.items():
        classifier = LogisticRegression(C=10, max_iter=1000, class_weight=weight)
        model = make_pipeline(TfidfVectorizer(sublinear_tf=True, min_df=2), classifier)
        model.fit(data.texts["train"], data.labels["train"])
        val = model.score(data.texts["val"], data.labels["val"])
        test = model.score(data.texts["test"], data.labels["test"])
        scores.append(f"{title}val {val:.4f}, test accuracy {test:.4f}")
    seconds = time.perf_counter() - began
    print(f"{name}: TF-IDF + logistic regression, {'; '.join(scores)}; {seconds:.1f} s")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["spam"])

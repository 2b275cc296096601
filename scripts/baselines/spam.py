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
    model = make_pipeline(TfidfVectorizer(sublinear_tf=True, min_df=2), LogisticRegression(C=10, max_iter=1000))
    model.fit(data.texts["train"], data.labels["train"])
    val, test = (model.score(data.texts[part], data.labels[part]) for part in ("val", "test"))
    seconds = time.perf_counter() - began
    print(f"{name}: TF-IDF + logistic regression, val {val:.4f}, test accuracy {test:.4f}, {seconds:.1f} s")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["spam"])

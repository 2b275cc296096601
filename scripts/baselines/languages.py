#!/usr/bin/env python3
"""Logistic regression on fixed features of the Asterisk prompts, with the split of `languages`.

The features are mean and deviation over time of 20 MFCC and of their slopes. The validation split
selects C.
"""

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import framework as fw


def statistics(inputs: torch.Tensor) -> torch.Tensor:
    """Return features (rows, 80) of waveforms with masks."""
    shape = tuple(inputs.shape[1:])
    mfcc = fw.blocks.build("mfcc", shape, sample_rate=8000, coefficients=20)
    features = torch.cat([mfcc(part) for part in inputs.split(64)])
    slopes = torch.cat([features[:, :-1].diff(dim=2), features[:, -1:, 1:]], dim=1)
    return torch.cat([pooled(features), pooled(slopes)], dim=1)


def pooled(x: torch.Tensor) -> torch.Tensor:
    return fw.blocks.build("masked_pool", tuple(x.shape[1:]), pool="statistics")(x)


@torch.no_grad()
def features_and_languages(split: fw.TensorSplit) -> tuple[torch.Tensor, torch.Tensor]:
    waveforms, languages = split.tensors
    return statistics(waveforms), languages


def main() -> None:
    fw.discover()
    data = fw.datasets.build("asterisk")
    train = features_and_languages(data.train)
    val = features_and_languages(data.val)
    test = features_and_languages(data.test)
    models = []
    for c in (0.01, 0.1, 1, 10):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000))
        models.append(model.fit(*train))
    best = max(models, key=lambda model: model.score(*val))
    languages = test[1]
    most_frequent = languages.bincount().max() / len(languages)
    print(
        f"MFCC statistics and logistic regression (C={best[-1].C:g}): "
        f"val accuracy {best.score(*val):.4f}, test accuracy {best.score(*test):.4f}; "
        f"always the most frequent language: {most_frequent:.4f}"
    )


if __name__ == "__main__":
    main()

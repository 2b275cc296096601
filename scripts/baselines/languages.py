#!/usr/bin/env python3
"""What the languages of the Asterisk prompts come to without learnt features.

Mean and deviation over time of 20 MFCC and of their slopes, then logistic regression, on the very split of the
experiment `languages`. Its C is chosen on the validation split.
"""

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import framework as fw


def statistics(inputs: torch.Tensor) -> torch.Tensor:
    """Return (rows, 80) of waveforms with their masks."""
    shape = tuple(inputs.shape[1:])
    mfcc = fw.blocks.build("mfcc", shape, sample_rate=8000, coefficients=20)
    features = torch.cat([mfcc(part) for part in inputs.split(64)])
    slopes = torch.cat([features[:, :-1].diff(dim=2), features[:, -1:, 1:]], dim=1)
    pools = [
        fw.blocks.build("masked_pool", tuple(x.shape[1:]), pool="statistics")(x)
        for x in (features, slopes)
    ]
    return torch.cat(pools, dim=1)


def main() -> None:
    fw.discover()
    data = fw.datasets.build("asterisk")
    with torch.no_grad():
        splits = [
            (statistics(split.tensors[0]), split.tensors[1])
            for split in (data.train, data.val, data.test)
        ]
    train, val, test = splits
    models = [
        make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)).fit(*train)
        for c in (0.01, 0.1, 1, 10)
    ]
    best = max(models, key=lambda model: model.score(*val))
    most_frequent = test[1].bincount().max() / len(test[1])
    print(
        f"MFCC statistics and logistic regression (C={best[-1].C:g}): val accuracy {best.score(*val):.4f}, "
        f"test accuracy {best.score(*test):.4f}; always the most frequent language: {most_frequent:.4f}"
    )


if __name__ == "__main__":
    main()

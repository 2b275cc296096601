"""Logistic regression on the pixels of Fashion-MNIST: the same split, standardised as the networks see it."""

import time

from sklearn.linear_model import LogisticRegression

import framework as fw

fw.discover()
data = fw.datasets.build("fashion_mnist")
(x, y), (test_x, test_y) = (
    tuple(tensor.flatten(1).numpy() if tensor.ndim > 1 else tensor.numpy() for tensor in part[:])
    for part in (data.train, data.test)
)
began = time.perf_counter()
model = LogisticRegression(C=0.01, max_iter=100).fit(x, y)
accuracy, seconds = model.score(test_x, test_y), time.perf_counter() - began
print(
    f"logistic regression on {x.shape[1]} pixels: test accuracy {accuracy:.4f} in {seconds:.0f} s"
)

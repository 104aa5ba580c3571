"""A linear support vector machine on features too many for a coordinate solver: scikit-learn's objective, by L-BFGS."""

from __future__ import annotations

import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

MEMORY = 20  # pairs of differences that L-BFGS keeps
ROWS = 1000  # of a Gram matrix computed at once
# Added to a Gram matrix's diagonal, as shares of its mean: rounding to float32 leaves it not quite positive. The least
# that serves is taken; features that go together closely, or an image given twice, need more.
JITTERS = (1e-5, 1e-4, 1e-3, 1e-2)


class LinearSVM:
    """One linear classifier a class against the others, squared hinge loss, L2 regularisation.

    Minimises what scikit-learn's `LinearSVC` does, its intercept regularised as there:
    |w|^2 / 2 + |b|^2 / 2 + c * sum over images and classes of max(0, 1 - t (w x + b))^2, t = 1 for the class, else -1.
    """

    def __init__(
        self, features: Tensor, labels: Tensor, c: float, iterations: int = 100, tolerance: float = 1e-2
    ) -> None:
        """Train.

        Args:
            features: float32 (N, d), each of about unit variance.
            labels: int64 (N,), 0 .. classes - 1.
            c: weight of the loss against the regularisation.
            iterations: of L-BFGS, at most.
            tolerance: end where the gradient's largest value has fallen to this share of what it was at first.
        """
        classes = int(labels.max()) + 1
        target = torch.full((len(labels), classes), -1.0, device=features.device)
        target[torch.arange(len(labels)), labels] = 1.0
        shape = features.shape[1] + 1, classes
        self.weight = torch.zeros(shape, device=features.device)

        def loss(weight: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
            """The objective and its gradient; sums that the line search compares are in float64."""
            self.weight = torch.from_numpy(weight.reshape(shape)).to(features)
            margin = (1 - target * self.scores(features)).clamp_(min=0)
            slope = (-2 * c) * target * margin
            gradient = self.weight + torch.cat([(slope.T @ features).T, slope.sum(0, keepdim=True)])
            value = weight @ weight / 2 + c * margin.double().square().sum().item()
            return float(value), gradient.double().cpu().numpy().ravel()

        zero = np.zeros(self.weight.numel())
        steepest = np.abs(loss(zero)[1]).max()
        options = {"maxiter": iterations, "maxcor": MEMORY, "gtol": tolerance * steepest, "ftol": 0.0}
        with threadpool_limits(1, "blas"):  # scipy's threads would wait for work on the cores that torch's need
            found = scipy.optimize.minimize(loss, zero, jac=True, method="L-BFGS-B", options=options)
        loss(found.x)

    def scores(self, features: Tensor) -> Tensor:
        """(N, d) -> (N, classes)."""
        return torch.addmm(self.weight[-1], features, self.weight[:-1])

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of the images (N, d) whose highest score is their label's."""
        return (self.scores(features).argmax(1) == labels).float().mean().item()


class Coordinates:
    """Fewer numbers for images with more features than there are images, the same classifier (Schölkopf et al. 2001).

    The best weights are a sum of training images, so only the scalar products between these matter: any features with
    the same Gram matrix serve. `values` are the triangular ones, N numbers an image instead of d.
    """

    def __init__(self, features: Tensor) -> None:
        """From float32 (N, d); where d is not above N they stay as they are."""
        self._features = features
        self.values = features
        if features.shape[0] < features.shape[1]:
            gram = torch.zeros(len(features), len(features), dtype=torch.float64, device=features.device)
            for start in range(0, len(features), ROWS):  # only the lower triangle is looked at
                stop = start + ROWS
                gram[start:stop, :stop] = features[start:stop] @ features[:stop].T
            mean = gram.diagonal().mean().clamp(min=1e-9)  # 0 where no feature differs
            for jitter in JITTERS:
                gram.diagonal().add_(jitter * mean)
                factor, failed = torch.linalg.cholesky_ex(gram)
                if not failed:
                    break
            self.values = factor.to(features)

    def of_first(self, count: int) -> Tensor:
        """`values` of the first `count` images, without the columns that are zero in all of them."""
        return self.values[:count] if self.values is self._features else self.values[:count, :count]

    def weight(self, found: Tensor) -> Tensor:
        """(N + 1, classes), weights for `values`, to (d + 1, classes), for features; the last row is the intercepts."""
        if self.values is self._features:
            return found
        shares = torch.linalg.solve_triangular(self.values.T, found[:-1], upper=True)
        return torch.cat([self._features.T @ shares, found[-1:]])

"""A linear support vector machine on features too many for a coordinate solver: scikit-learn's objective, by L-BFGS."""

from __future__ import annotations

import torch
from torch import Tensor

MEMORY = 20  # pairs of differences that L-BFGS keeps


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
            tolerance: end where the gradient's norm has fallen to this share of what it was at first.
        """
        classes = int(labels.max()) + 1
        target = torch.full((len(labels), classes), -1.0, device=features.device)
        target[torch.arange(len(labels)), labels] = 1.0
        self.weight = torch.zeros(features.shape[1] + 1, classes, device=features.device)
        optimizer = torch.optim.LBFGS(
            [self.weight], max_iter=1, history_size=MEMORY, line_search_fn="strong_wolfe", tolerance_grad=0
        )

        def loss() -> Tensor:  # with its gradient written out: autograd would keep more
            margin = (1 - target * self.scores(features)).clamp_(min=0)
            slope = (-2 * c) * target * margin
            self.weight.grad = self.weight + torch.cat([(slope.T @ features).T, slope.sum(0, keepdim=True)])
            return self.weight.square().sum() / 2 + c * margin.square().sum()

        loss()
        assert self.weight.grad is not None
        at_first = self.weight.grad.norm()
        for _ in range(iterations):
            optimizer.step(loss)
            if self.weight.grad.norm() <= tolerance * at_first:
                break

    def scores(self, features: Tensor) -> Tensor:
        """(N, d) -> (N, classes)."""
        return torch.addmm(self.weight[-1], features, self.weight[:-1])

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of the images (N, d) whose highest score is their label's."""
        return (self.scores(features).argmax(1) == labels).float().mean().item()

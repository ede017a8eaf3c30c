"""Two classifiers of frozen features: weighted kNN, and logistic regression (the linear probe)."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # C, as scikit-learn calls it: larger is weaker


class Neighbours(NamedTuple):
    """Of each query [n, k], the most similar first: cosine similarity float32, and row number int64."""

    similarity: Tensor
    rows: Tensor


def nearest(queries: Tensor, candidates: Tensor, k: int) -> Neighbours:
    """The `k` rows of `candidates` [m, F] (all of them, if fewer) nearest to each of `queries` [n, F].

    Queries go in chunks: memory is O(m), never n × m.
    """
    queries, candidates = F.normalize(queries), F.normalize(candidates)
    k = min(k, len(candidates))
    parts = [(chunk @ candidates.T).topk(k, dim=1) for chunk in queries.split(max(1, 2**24 // len(candidates)))]
    return Neighbours(torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts]))


def knn_scores(found: Neighbours, labels: Tensor, classes: int, *, k: int, temperature: float) -> Tensor:
    """Class scores [n, classes]: votes of the `k` nearest, weighted by exp(similarity / τ) over that of the nearest.

    (Wu et al., arXiv 1805.01978, section 3.4.) `labels` [m] are of the candidates. A class without a vote has −inf.
    """
    similarity = found.similarity[:, :k]
    weights = ((similarity - similarity[:, :1]) / temperature).exp().clamp(min=1e-30)  # in range for any τ
    votes = similarity.new_zeros(len(similarity), classes).scatter_add_(1, labels[found.rows[:, :k]], weights)
    return votes.masked_fill_(votes == 0, -math.inf)


def knn_sweep(
    found: Neighbours, labels: Tensor, classes: int, truth: Tensor, ks: list[int], temperatures: list[float]
) -> list[dict[str, float]]:
    """Top-1 in percent for each k and temperature; `truth` [n] are the queries' own classes."""
    return [
        {"k": k, "temperature": t, "top1": accuracy(knn_scores(found, labels, classes, k=k, temperature=t), truth, 1)}
        for t in temperatures
        for k in ks
    ]


def accuracy(scores: Tensor, truth: Tensor, top: int) -> float:
    """Percent of rows of `scores` [n, classes] whose own class `truth` [n] is among the `top` highest (above −inf)."""
    values, predicted = scores.topk(min(top, scores.shape[1]), dim=1)
    hits = (predicted == truth[:, None]) & (values > -math.inf)
    return 100 * hits.any(dim=1).double().mean().item()


def confusion(scores: Tensor, truth: Tensor, classes: int) -> Tensor:
    """Counts [classes, classes] int64 on the CPU: row the true class, column the predicted one."""
    pairs = truth * classes + scores.argmax(dim=1)
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes).cpu()


class LinearProbe(NamedTuple):
    """Logits [m, classes] of the queries; the penalty C; and top-1 in percent, for each C tried, on the part of the
    training images that the choice was made on (empty where they are too few to leave some out)."""

    scores: Tensor
    penalty: float
    tried: dict[float, float]


def linear_probe(
    features: Tensor, labels: Tensor, classes: int, queries: Tensor, say: Callable[[str], object] = lambda line: None
) -> LinearProbe:
    """Logistic regression on standardised `features` [n, F] with `labels` [n], applied to `queries` [m, F].

    C is the best of `PENALTIES` on a tenth of the training images (of each class, where it has ten); the classifier is
    then fitted to all of them. The queries' labels are no argument: nothing can be tuned on them.
    """
    held_out = torch.from_numpy(_every_tenth_of_a_class(labels.cpu().numpy())).to(features.device)
    tried: dict[float, float] = {}
    best, best_weights = PENALTIES[len(PENALTIES) // 2], None
    if held_out.any():
        fit, check = features[~held_out], features[held_out]
        fit, check = _standardised(fit, fit), _standardised(fit, check)
        weights = None
        for penalty in PENALTIES:  # from strong to weak: each starts where the one before ended
            weights = _logistic_regression(fit, labels[~held_out], classes, penalty, weights)
            tried[penalty] = accuracy(_logits(check, weights), labels[held_out], 1)
            say(f"linear probe: C = {penalty:g} gives {tried[penalty]:.2f} % on the training images left out for this")
            if tried[penalty] > tried.get(best, -1) or best_weights is None:
                best, best_weights = penalty, weights
        del fit, check
    final = _logistic_regression(_standardised(features, features), labels, classes, best, best_weights)
    return LinearProbe(_logits(_standardised(features, queries), final), best, tried)


def _every_tenth_of_a_class(labels: np.ndarray) -> np.ndarray:
    """Mask [n]: in a random order sorted by class, every tenth."""
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    mask = np.zeros(len(labels), dtype=bool)
    mask[order[9::10]] = True
    return mask


def _standardised(reference: Tensor, rows: Tensor) -> Tensor:
    """`rows` less the mean of `reference`, over its standard deviation. A constant column becomes 0 there."""
    std = reference.std(dim=0, correction=0)
    return (rows - reference.mean(dim=0)) / torch.where(std > 0, std, 1)


def _logits(rows: Tensor, weights: Tensor) -> Tensor:
    return torch.addmm(weights[-1], rows, weights[:-1])


def _logistic_regression(rows: Tensor, labels: Tensor, classes: int, penalty: float, start: Tensor | None) -> Tensor:
    """Weights [F + 1, classes], the last row the bias, that minimise C·Σ cross-entropy + ‖weights without bias‖²/2.

    The objective and the stopping rule are those of scikit-learn's LogisticRegression, whose data and gradients would
    have to fit the host.
    """
    weights = rows.new_zeros(rows.shape[1] + 1, classes) if start is None else start.clone()
    weights.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=200, tolerance_grad=1e-4, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(_logits(rows, weights), labels) + weights[:-1].square().sum() / (2 * penalty * len(rows))
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()

"""How faithful a model is to the one it stands for: predictions that flip, and probabilities that can be believed."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats
from scipy.special import log_softmax

from distill.common.records import Calibration, Flips
from distill.evaluation.intervals import bootstrap
from distill.tasks import scorers
from distill.tasks.scorers import Scorer

BINS = 15
"""Of the calibration error (as Guo et al. 2017 choose)."""

TEMPERATURES = (0.01, 100.0)
"""What a temperature is looked for between."""


def flips(
    right: NDArray[np.bool_], baseline: NDArray[np.bool_], classes: Mapping[str, NDArray[np.bool_]] | None = None
) -> Flips:
    """Rows that a model gets right and its baseline does not, the other way round, and McNemar's exact test of both.

    The p-value is two-sided: the chance of a split at least as uneven if a flip went either way with a chance of a half
    (McNemar 1947, without the approximation). Those of the classes are Holm's over the classes.

    Args:
        right: B, whether the model is right; baseline alike.
        classes: for each class, of which rows it is: B.
    """
    gained, lost = right & ~baseline, ~right & baseline
    counts = {name: (int((gained & rows).sum()), int((lost & rows).sum())) for name, rows in (classes or {}).items()}
    values = holm([mcnemar(*each) for each in counts.values()])
    of_classes = {
        name: {"gained": each[0], "lost": each[1], "p": p}
        for (name, each), p in zip(counts.items(), values, strict=True)
    }
    total = int(gained.sum()), int(lost.sum())
    return Flips(*total, mcnemar(*total), of_classes)


def mcnemar(gained: int, lost: int) -> float:
    """Compute the two-sided p-value of McNemar's exact test (McNemar 1947): the binomial test of a fair coin.

    Args:
        gained: rows that a model gets right and its baseline does not.
        lost: rows the other way round. Where both are 0, the p-value is 1.
    """
    return float(stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def holm(p_values: ArrayLike) -> list[float]:
    """Holm's step-down correction (Holm 1979): adjusted p-values, in the order in which they are given."""
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    return np.minimum(adjusted, 1).tolist()


def calibration_of(logits: ArrayLike, truth: ArrayLike) -> Calibration:
    """How far a model's probabilities can be believed, and the temperature that mends them.

    The temperature is fitted on a random half of the rows (seeded) and judged on the other half, by what it takes off
    the negative log-likelihood there.

    Args:
        logits: B×L×C, of L distributions over C outcomes a row (L is 1 but for sets of labels).
        truth: B×L, the outcomes that came true.
    """
    logits, truth = np.asarray(logits, dtype=np.float64), np.asarray(truth, dtype=np.int64)
    of_rows = negative_log_likelihoods(logits, truth)
    ece, interval = bootstrap(calibration_error(logits, truth), len(logits))
    fitted, judged = halves(len(logits))
    temperature = fit_temperature(logits[fitted], truth[fitted]) if len(fitted) else None
    found = Calibration(
        ece=ece,
        interval=list(interval),
        brier=float(brier_scores(logits, truth).mean()),
        nll=float(of_rows.mean()),
        temperature=temperature,
        bins=reliability_bins(logits, truth),
    )
    if temperature is None:
        return found
    mended = negative_log_likelihoods(logits[judged] / temperature, truth[judged])
    gain, (low, high) = bootstrap(scorers.mean(of_rows[judged] - mended), len(judged))
    errors = (calibration_error(each, truth[judged]) for each in (logits[judged], logits[judged] / temperature))
    before, after = (scorers.whole(each, len(judged)) for each in errors)
    held_out = {"nll_gain": gain, "nll_gain_low": low, "nll_gain_high": high, "ece": before, "ece_mended": after}
    return Calibration(**{**vars(found), "held_out": held_out})


def halves(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Draw the numbers of the rows that something is fitted or chosen on, and of those that judge it: always the same.

    Args:
        count: of all rows.
    """
    order = np.random.default_rng(0).permutation(count)
    return order[: count // 2], order[count // 2 :]


def calibration_error(logits: NDArray[np.float64], truth: NDArray[np.int64], *, bins: int = BINS) -> Scorer:
    """Expected calibration error: the mean distance of confidence and accuracy over bins of as many predictions each.

    The confidence of a prediction is the probability of its most likely outcome (Guo et al. 2017, equation 3, with the
    equal-mass bins of Nguyen and O'Connor 2015). Bins are of all rows, and stay in resamples. The error of a perfectly
    calibrated model is not 0 but what chance leaves in the bins.

    Args:
        logits: B×L×C; truth: B×L.
    """
    confidence = _probability_of_likeliest(logits)
    right = logits.argmax(-1) == truth
    order = np.argsort(confidence.ravel(), kind="stable")
    of_row = np.arange(confidence.size) // confidence.shape[1]
    gaps = np.zeros((len(confidence), bins + 1))
    gaps[:, bins] = confidence.shape[1]
    distances = (right - confidence).ravel()
    for number, chosen in enumerate(np.array_split(order, bins)):
        np.add.at(gaps[:, number], of_row[chosen], distances[chosen])

    def score(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = weights @ gaps
        return np.abs(sums[..., :bins]).sum(-1) / sums[..., bins]

    return score


def reliability_bins(logits: NDArray[np.float64], truth: NDArray[np.int64], *, bins: int = BINS) -> list[list[float]]:
    """Mean confidence, share that is right and number of predictions in each bin of the calibration error.

    Args:
        logits: B×L×C; truth: B×L.
        bins: of as many predictions each, the least confident first; empty ones are left out.
    """
    confidence, right = _probability_of_likeliest(logits).ravel(), (logits.argmax(-1) == truth).ravel()
    chosen = [each for each in np.array_split(np.argsort(confidence, kind="stable"), bins) if len(each)]
    return [[float(confidence[each].mean()), float(right[each].mean()), float(len(each))] for each in chosen]


def confidences(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """B: the probability of the most likely outcome, the mean over a row's L distributions.

    Args:
        logits: B×L×C.
    """
    return _probability_of_likeliest(logits).mean(-1)


def _probability_of_likeliest(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(log_softmax(logits, axis=-1).max(-1))


def brier_scores(logits: NDArray[np.float64], truth: NDArray[np.int64]) -> NDArray[np.float64]:
    """B: the squared distance of probabilities and outcomes, summed over outcomes: from 0 to 2 (Brier 1950).

    Args:
        logits: B×L×C; truth: B×L, over whose L distributions the mean is taken.
    """
    probabilities = np.exp(log_softmax(logits, axis=-1))
    outcomes = np.arange(logits.shape[-1]) == truth[..., None]
    return np.square(probabilities - outcomes).sum(-1).mean(-1)


def negative_log_likelihoods(logits: NDArray[np.float64], truth: NDArray[np.int64]) -> NDArray[np.float64]:
    """B: −log of the probability of what came true, in nats, the mean over a row's L distributions.

    Args:
        logits: B×L×C; truth: B×L.
    """
    of_truth = np.take_along_axis(log_softmax(logits, axis=-1), truth[..., None], axis=-1)
    return -of_truth[..., 0].mean(-1)


def fit_temperature(logits: NDArray[np.float64], truth: NDArray[np.int64]) -> float:
    """The T for which softmax(z/T) gives the outcomes the greatest likelihood (Guo et al. 2017, section 4.2).

    Looked for between 0.01 and 100; it is near 0.01 where every prediction is right, and no T the likeliest.

    Args:
        logits: B×L×C; truth: B×L.
    """

    def loss(log_temperature: float) -> float:
        return float(negative_log_likelihoods(logits / np.exp(log_temperature), truth).mean())

    found = optimize.minimize_scalar(
        loss, bounds=tuple(np.log(TEMPERATURES)), method="bounded", options={"xatol": 1e-5}
    )
    return float(np.exp(found.x))

"""The objective against the paper's formulas, computed plainly in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dreambooth.common.streams import normal
from dreambooth.objectives.losses import denoising_loss, prior_preservation_loss
from dreambooth.objectives.variance_preserving import PREDICTIONS, Prediction, VariancePreserving

ALPHAS_SQUARED = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
"""Stable Diffusion's schedule."""
TIMES = (0, 1, 60, 250, 600, 999)
ROW = (1, 1, 1)

# x-hat from what the network says, and the factor between the squared error in x and the one in its own prediction.
X_HAT: dict[Prediction, Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "epsilon": lambda z, said, alpha, sigma: (z - sigma * said) / alpha,
    "v_prediction": lambda z, said, alpha, sigma: alpha * z - sigma * said,
    "sample": lambda _z, said, _alpha, _sigma: said,
}
PLAIN_FACTOR: dict[Prediction, Callable[[np.ndarray], np.ndarray]] = {
    "epsilon": lambda snr: snr,
    "v_prediction": lambda snr: snr + 1,
    "sample": lambda snr: np.ones_like(snr),
}


def make_schedule(prediction: Prediction, terminal: float | None = None) -> VariancePreserving:
    alphas_squared = ALPHAS_SQUARED.copy()
    if terminal is not None:
        alphas_squared[-1] = terminal
    return VariancePreserving(torch.from_numpy(alphas_squared).float(), prediction)


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    """x, epsilon and what a network said, for `TIMES`."""
    shape = (len(TIMES), 4, 3, 3)
    return normal(shape, "x"), normal(shape, "epsilon"), normal(shape, "said")


def alpha_sigma() -> tuple[np.ndarray, np.ndarray]:
    alpha_squared = ALPHAS_SQUARED[list(TIMES)].reshape(-1, *ROW)
    return alpha_squared**0.5, (1 - alpha_squared) ** 0.5


def test_noise_is_added_as_the_paper_says() -> None:
    x, epsilon, _ = drawn()
    alpha, sigma = alpha_sigma()
    z_t = make_schedule("epsilon").add_noise(x, epsilon, torch.tensor(TIMES))
    np.testing.assert_allclose(z_t, alpha * x.double().numpy() + sigma * epsilon.double().numpy(), atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_targets_are_what_leads_back_to_x(prediction: Prediction) -> None:
    x, epsilon, _ = (value.double().numpy() for value in drawn())
    alpha, sigma = alpha_sigma()
    schedule, t = make_schedule(prediction), torch.tensor(TIMES)
    target = schedule.target(torch.from_numpy(x).float(), torch.from_numpy(epsilon).float(), t).double().numpy()
    formula = {"epsilon": epsilon, "v_prediction": alpha * epsilon - sigma * x, "sample": x}[prediction]
    np.testing.assert_allclose(target, formula, atol=1e-5)
    np.testing.assert_allclose(X_HAT[prediction](alpha * x + sigma * epsilon, target, alpha, sigma), x, atol=1e-4)


@pytest.mark.parametrize("min_snr_gamma", [None, 1.0, 5.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_in_every_parametrization_the_weighted_error_is_one_of_x(
    prediction: Prediction, min_snr_gamma: float | None
) -> None:
    x, epsilon, said = drawn()
    alpha, sigma = alpha_sigma()
    snr = (alpha**2 / sigma**2).ravel()
    z_t = alpha * x.double().numpy() + sigma * epsilon.double().numpy()
    x_hat = X_HAT[prediction](z_t, said.double().numpy(), alpha, sigma)
    factor = PLAIN_FACTOR[prediction](snr) if min_snr_gamma is None else np.minimum(snr, min_snr_gamma)
    expected = factor * ((x_hat - x.double().numpy()) ** 2).mean((1, 2, 3))
    schedule = make_schedule(prediction)
    target, weight = (
        schedule.target(x, epsilon, torch.tensor(TIMES)),
        schedule.weight(torch.tensor(TIMES), min_snr_gamma),
    )
    rows = [denoising_loss(said[[row]], target[[row]], weight[[row]]) for row in range(len(TIMES))]
    np.testing.assert_allclose(rows, expected, rtol=1e-3)
    np.testing.assert_allclose(denoising_loss(said, target, weight), expected.mean(), rtol=1e-3)


# Signal to noise at `TIMES`: 1175.47, 585.864, 15.9132, 2.06553, 0.191586, 0.00468192.
@pytest.mark.parametrize(
    ("prediction", "weights"),
    [
        ("epsilon", [0.00425362, 0.00853440, 0.314204, 1, 1, 1]),
        ("v_prediction", [0.00424998, 0.00851986, 0.295627, 0.673793, 0.160782, 0.00466010]),
        ("sample", [5, 5, 5, 2.06553, 0.191586, 0.00468192]),
    ],
)
def test_min_snr_weights_keep_their_values(prediction: Prediction, weights: list[float]) -> None:
    np.testing.assert_allclose(make_schedule(prediction).weight(torch.tensor(TIMES), 5.0), weights, rtol=5e-4)


@pytest.mark.parametrize("min_snr_gamma", [None, 5.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_time_without_any_signal_has_a_finite_loss_and_gradient(
    prediction: Prediction, min_snr_gamma: float | None
) -> None:
    schedule = make_schedule(prediction, terminal=0.0)
    x, epsilon, said = drawn()
    t = torch.full((len(TIMES),), 999)
    z_t, target, weight = (
        schedule.add_noise(x, epsilon, t),
        schedule.target(x, epsilon, t),
        schedule.weight(t, min_snr_gamma),
    )
    torch.testing.assert_close(z_t, epsilon)
    if prediction == "v_prediction":
        torch.testing.assert_close(target, -x)
    loss = denoising_loss(said.requires_grad_(), target, weight)
    loss.backward()
    assert said.grad is not None
    assert torch.isfinite(loss)
    assert said.grad.isfinite().all()
    assert weight.isfinite().all()
    # The limit of the weights as the signal vanishes.
    nearly = make_schedule(prediction, terminal=1e-9).weight(t, min_snr_gamma)
    torch.testing.assert_close(weight, nearly, atol=1e-6, rtol=1e-6)


def test_an_unknown_prediction_type_is_named() -> None:
    with pytest.raises(ValueError, match="'flow_prediction', which is not trainable here"):
        VariancePreserving(torch.ones(3), "flow_prediction")  # type: ignore[arg-type]


GOLDEN = {
    ("epsilon", None): (1.592500, 2.015106),
    ("epsilon", 5.0): (0.174181, 2.015106),
    ("v_prediction", None): (1.608815, 1.904888),
    ("v_prediction", 5.0): (0.169294, 0.540515),
    ("sample", None): (1.946295, 1.995824),
    ("sample", 5.0): (9.731473, 1.337995),
}
"""The instance and prior terms of `drawn()`, halved."""


@pytest.mark.parametrize(("prediction", "min_snr_gamma"), GOLDEN)
def test_both_terms_keep_their_values(prediction: Prediction, min_snr_gamma: float | None) -> None:
    x, epsilon, said = drawn()
    schedule, t = make_schedule(prediction), torch.tensor(TIMES)
    rows = (said, schedule.target(x, epsilon, t), schedule.weight(t, min_snr_gamma))
    loss = prior_preservation_loss(*(each.split(3) for each in rows), prior_weight=1.0)
    assert loss.prior is not None
    assert (loss.instance.item(), loss.prior.item()) == pytest.approx(GOLDEN[prediction, min_snr_gamma], rel=1e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_estimate_of_a_perfect_answer_is_the_clean_image(prediction: Prediction) -> None:
    x, epsilon, _ = drawn()
    objective, t = make_schedule(prediction), torch.tensor(TIMES)
    z_t, answer = objective.add_noise(x, epsilon, t), objective.target(x, epsilon, t)
    torch.testing.assert_close(objective.estimate_x(z_t, answer, t), x, atol=2e-3, rtol=1e-3)


def test_times_are_drawn_by_their_key_alone_and_reach_from_0_to_the_last() -> None:
    objective = make_schedule("epsilon")
    times = [objective.draw_t(0, "rex", "t", step) for step in range(20 * objective.steps)]
    assert times == [objective.draw_t(0, "rex", "t", step) for step in range(20 * objective.steps)]
    assert (min(times), max(times)) == (0, objective.steps - 1)

"""Rates of kinds of devices, measured and estimated."""

import pytest

from pipeline.catalog.rates import CUDA_PER_CPU, rate_on

H200, L4 = "NVIDIA H200", "NVIDIA L4"


@pytest.mark.parametrize(
    ("kind", "measured", "found"),
    [
        (H200, {H200: 900.0, "cpu": 5.0}, 900.0),
        ("cpu", {H200: 900.0, "cpu": 5.0}, 5.0),
        # Nothing is known but the rate from when the model was added.
        ("cpu", {}, 7.0),
        (H200, {}, 7.0 * CUDA_PER_CPU),
        # Another kind was measured.
        (H200, {"cpu": 5.0}, 5.0 * CUDA_PER_CPU),
        (H200, {L4: 300.0, "cpu": 5.0}, 300.0),
        (H200, {L4: 300.0, "NVIDIA A100": 500.0}, 300.0),
        ("cpu", {L4: 300.0}, 300.0 / CUDA_PER_CPU),
        ("mps", {L4: 300.0}, 300.0 / CUDA_PER_CPU),
        ("mps", {"cpu": 5.0}, 5.0),
        ("cpu", {"mps": 50.0}, 7.0),
    ],
)
def test_the_rate_on_a_kind_of_device(kind: str, measured: dict[str, float], found: float) -> None:
    assert rate_on(kind, measured, added=7.0) == found

"""The canary as the doctor knows it."""

from pipeline import canary as doctors
from workers import canary as workers


def test_doctor_and_workers_know_the_same_canary() -> None:
    assert doctors.CANARY == workers.CANARY

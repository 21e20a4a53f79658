"""Job options: those that decide a result, and those that a row keeps."""

from pipeline.core.options import JobOptions, KeptOptions, Precision


def test_a_job_of_before_has_the_payload_of_one_that_demands_nothing() -> None:
    assert "precision" not in JobOptions().decisive()
    assert "precision" not in JobOptions(precision="auto").decisive()  # type: ignore[arg-type]
    assert JobOptions(precision=Precision.FLOAT32).decisive()["precision"] == "float32"


def test_options_of_before_are_read() -> None:
    assert KeptOptions.from_json({}).precision is Precision.AUTO
    kept = KeptOptions(precision=Precision.FLOAT32)
    assert KeptOptions.from_json(kept.to_json()) == kept

"""Options of the commands that run processes."""

import pytest

from pipeline.cli.processes import _Device, _precision, _tokenizer_threads
from pipeline.core.errors import UserError

CPU, GPU = _Device("cpu", 2**30, "cpu"), _Device("cuda:0", 2**30, "NVIDIA H200")


@pytest.mark.parametrize(
    ("wish", "devices", "told"),
    [
        ("auto", [CPU], ""),
        ("float32", [CPU, GPU], ""),
        ("bfloat16", [GPU], ""),
        ("bfloat16", [CPU], "bfloat16 is for CUDA devices; cpu computes in float32.\n"),
        ("float16", [GPU, CPU], "float16 is for CUDA devices; cpu computes in float32.\n"),
    ],
)
def test_a_precision_that_a_device_lacks_is_said(
    capsys: pytest.CaptureFixture[str], wish: str, devices: list[_Device], told: str
) -> None:
    assert _precision(wish, devices) == wish
    assert capsys.readouterr().err == told


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(UserError, match=r'--precision "int8": choose auto, float32, bfloat16 or float16\.'):
        _precision("int8", [CPU])


def test_tokenisers_share_the_cores_beside_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert _tokenizer_threads([CPU], 2) == {"TOKENIZERS_PARALLELISM": "false"}
    assert _tokenizer_threads([GPU, GPU], 2) == {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": "4"}

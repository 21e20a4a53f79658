"""Model folders that would run code when loaded: they are refused in one sentence, and no code runs."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from pipeline.catalog.models import weights_sha256
from pipeline.core.errors import ModelError
from tests.acceptance.fleet import Fleet
from workers.encoders.weights import WeightsSource
from workers.oneshot import describe


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """Return the path that the code would create."""
    return tmp_path / "it-ran"


class Evil:
    """Object that leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def code(mark: Path) -> str:
    """Return the source of a module that leaves a mark when it is imported."""
    return f"import pathlib\npathlib.Path({str(mark)!r}).touch()\nclass Custom:\n    pass\n"


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """Return a function that copies a model, so that a test can change it."""

    def made(model: Path) -> Path:
        return Path(shutil.copytree(model, tmp_path / "model"))

    return made


def test_weights_that_are_pickles_are_not_added(
    database: str, redis_url: str, engine: Engine, bundled_model: Path, copy: Any, mark: Path, tmp_path: Path
) -> None:
    fleet = Fleet(engine, {"VECTORMILL_DATABASE_URL": database, "VECTORMILL_REDIS_URL": redis_url}, tmp_path)
    folder = copy(bundled_model)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    done = fleet.cli("models", "add", "evil", "--path", str(folder), check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if "safetensors" in line]
    assert "pytorch_model.bin" in line
    assert not mark.exists()
    assert not fleet.scalar("select count(*) from vectormill.models where name = 'evil'")


def test_no_part_of_a_model_is_a_pickle(static_model: Path, copy: Any, mark: Path) -> None:
    folder = copy(static_model)
    parts = json.loads((folder / "modules.json").read_bytes())
    dense = {"idx": 1, "name": "1", "path": "1_Dense", "type": "sentence_transformers.models.Dense"}
    (folder / "modules.json").write_text(json.dumps([*parts, dense]))
    (folder / "1_Dense").mkdir()
    (folder / "1_Dense" / "config.json").write_text('{"activation_function": "torch.nn.modules.linear.Identity"}')
    (folder / "1_Dense" / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(ModelError, match=r"1_Dense/pytorch_model.bin isn't .safetensors"):
        describe(WeightsSource(path=str(folder)))
    assert not mark.exists()


@pytest.mark.parametrize("listed", ["{", "7", "[7]", "[{}]"])
def test_a_list_of_parts_that_is_none_is_told(static_model: Path, copy: Any, listed: str) -> None:
    folder = copy(static_model)
    (folder / "modules.json").write_text(listed)
    with pytest.raises(ModelError, match=r"modules\.json"):
        weights_sha256(folder)


def test_a_part_of_the_models_own_code_is_refused(static_model: Path, copy: Any, mark: Path) -> None:
    folder = copy(static_model)
    (folder / "custom.py").write_text(code(mark))
    parts = json.loads((folder / "modules.json").read_bytes())
    (folder / "modules.json").write_text(json.dumps([{**parts[0], "type": "custom.Custom"}]))
    with pytest.raises(ModelError, match=r"custom\.Custom"):
        describe(WeightsSource(path=str(folder)))
    assert not mark.exists()


def test_code_that_a_configuration_names_is_not_run(bundled_model: Path, copy: Any, mark: Path) -> None:
    folder = copy(bundled_model)
    (folder / "custom.py").write_text(code(mark))
    classes = dict.fromkeys(("AutoConfig", "AutoModel", "AutoTokenizer"), "custom.Custom")
    for file in ("config.json", "tokenizer_config.json"):
        told = json.loads((folder / file).read_bytes())
        (folder / file).write_text(json.dumps({**told, "auto_map": classes}))
    with pytest.raises(ModelError, match="auto_map"):
        describe(WeightsSource(path=str(folder)))
    assert not mark.exists()


def test_a_model_of_an_unknown_kind_is_not_run(bundled_model: Path, copy: Any, mark: Path) -> None:
    folder = copy(bundled_model)
    (folder / "custom.py").write_text(code(mark))
    told = json.loads((folder / "config.json").read_bytes())
    auto_map = {"AutoConfig": "custom.Custom", "AutoModel": "custom.Custom"}
    (folder / "config.json").write_text(json.dumps({**told, "model_type": "custom", "auto_map": auto_map}))
    with pytest.raises(ModelError, match="auto_map"):
        describe(WeightsSource(path=str(folder)))
    (folder / "config.json").write_text(json.dumps({**told, "model_type": "custom"}))
    with pytest.raises(ModelError, match="can't be loaded"):
        describe(WeightsSource(path=str(folder)))
    assert not mark.exists()

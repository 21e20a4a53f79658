"""Check of a model's folder, which refuses whatever sentence-transformers would guess. Loads no weights."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Never

from safetensors import SafetensorError, safe_open

from pipeline.core.errors import ModelError

#: Modules of a dense text encoder whose vectors don't depend on the rest of a batch.
_KNOWN = frozenset(
    {
        *("Transformer", "StaticEmbedding", "Router", "Asym", "Pooling", "Dense", "Normalize", "LayerNorm", "Dropout"),
        "WeightedLayerPooling",
    }
)
#: Other modules of sentence-transformers, and why a model with one is refused.
_OTHERS = {
    "CLIPModel": "it reads images too",
    **dict.fromkeys(("WordEmbeddings", "WordWeights", "BoW"), "it splits texts into words by rules of its own"),
    **dict.fromkeys(("CNN", "LSTM"), "a text's vector depends on what is beside it in a batch"),
    **dict.fromkeys(
        ("SpladePooling", "MLMTransformer", "SparseAutoEncoder", "SparseStaticEmbedding", "CSRSparsity"),
        "its vectors are sparse",
    ),
    **dict.fromkeys(("MultiVectorMask", "TokenPooling"), "it gives a vector for each token"),
    "LogitScore": "it scores pairs of texts",
}
_MODEL_TYPES = {
    "CrossEncoder": "it scores pairs of texts",
    "SparseEncoder": "its vectors are sparse",
    "MultiVectorEncoder": "it gives a vector for each token",
}
#: Sets of files that make a tokeniser. Without any, transformers invents a vocabulary of five tokens.
_TOKENIZERS = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"), ("*.model",))
_POOLING_FLAGS = ("cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
_DENSE_KEYS = frozenset(
    {
        *("in_features", "out_features", "bias", "activation_function", "module_input_name", "module_output_name"),
        "use_residual",
    }
)
_TRANSFORMER_CONFIGS = (
    "sentence_bert_config.json",
    *(f"sentence_{kind}_config.json" for kind in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta")),
    "sentence_xlnet_config.json",
)
_AUTO_CLASSES = frozenset({"AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor"})
_NUMBERED = re.compile(r"\d+_\w+")


def check_layout(folder: Path, pooling: str | None) -> None:
    """Check that a folder states all that decides a vector, in ways that vectormill computes exactly.

    Args:
        folder: the model's folder.
        pooling: cls, mean or lasttoken, for a folder without modules.json.

    Raises:
        ModelError: the check fails; the message names the file and the fix.
    """
    told = _json(folder / "config_sentence_transformers.json")
    kind = told.get("model_type") or "SentenceTransformer"
    if kind != "SentenceTransformer":
        why = _MODEL_TYPES.get(kind, "that is another kind of model")
        raise ModelError(
            f"{folder}: config_sentence_transformers.json says {kind}: {why}; vectormill takes dense text encoders."
        )
    if (folder / "modules.json").exists():
        if pooling:
            raise ModelError(f"{folder}: modules.json says how it pools; leave the pooling out.")
        _check_modules(folder)
    else:
        _check_bare(folder, pooling, has_settings=bool(told))


def _check_bare(folder: Path, pooling: str | None, *, has_settings: bool) -> None:
    """Check a folder that transformers' own tools wrote."""
    heads = _json(folder / "config.json").get("architectures") or []
    if head := next((one for one in heads if re.search("For(Sequence|Token)Class|ForQuestion|ForMultiple", one)), None):
        raise ModelError(
            f"{folder}: config.json says {head}, a CrossEncoder or classifier; vectormill takes dense text encoders."
        )
    if has_settings:
        raise ModelError(
            f"{folder}: there is a config_sentence_transformers.json but no modules.json; copy the whole folder."
        )
    if not pooling:
        raise ModelError(
            f"{folder}: no modules.json, so nothing says how it pools; copy the whole folder, or name the pooling as "
            "the model's page does: cls, mean or lasttoken."
        )
    _check_transformer(folder, folder)


def _check_modules(folder: Path) -> None:
    try:
        listed = [(str(one["type"]), str(one["path"])) for one in json.loads((folder / "modules.json").read_bytes())]
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder}: modules.json isn't a list of modules with their types and paths.") from error
    modules = list(_flat(folder, folder / "modules.json", [(kind, folder / path) for kind, path in listed]))
    for kind, part in modules:
        _check_module(folder, kind, part)
    parts = [part for _, part in modules]
    for weights in sorted(folder.glob("*/*.safetensors")):
        if weights.parent not in parts and _NUMBERED.fullmatch(weights.parent.name):
            raise ModelError(
                f"{folder}: {weights.parent.name} holds weights, but modules.json doesn't list it, so that they would "
                "be left out; list it, or delete it."
            )
    if any(kind == "WeightedLayerPooling" for kind, _ in modules):
        _check_layers_are_given(folder, [part for kind, part in modules if kind == "Transformer"])


def _flat(folder: Path, says: Path, listed: list[tuple[str, Path]]) -> Iterator[tuple[str, Path]]:
    """Yield the kind and folder of each module, including those within routers."""
    for kind, part in listed:
        name = kind.rsplit(".", 1)[-1]
        if not kind.startswith("sentence_transformers."):
            raise ModelError(
                f"{folder}: {says.relative_to(folder)} names {kind}, code that isn't sentence-transformers' own; "
                "vectormill runs no code of a model's."
            )
        if name not in _KNOWN:
            why = _OTHERS.get(name, "vectormill doesn't know it")
            raise ModelError(f"{folder}: {says.relative_to(folder)} lists {name}: {why}; it can't be run here.")
        if name not in ("Router", "Asym"):
            yield name, part
            continue
        file = next((one for one in (part / "router_config.json", part / "config.json") if _json(one)), None)
        types = _json(file).get("types") if file else None
        if not file or not isinstance(types, dict):
            raise ModelError(f"{folder}: the router in {part.name or '.'} doesn't list its modules.")
        yield from _flat(folder, file, [(str(kind), part / name) for name, kind in types.items()])


def _check_module(folder: Path, kind: str, part: Path) -> None:
    match kind:
        case "Transformer":
            _check_transformer(folder, part)
        case "StaticEmbedding":
            _check_static(folder, part / "model.safetensors")
        case "Pooling":
            _check_pooling(folder, part / "config.json")
        case "Dense":
            _check_dense(folder, part / "config.json")


def _check_transformer(folder: Path, part: Path) -> None:
    def refuse(name: str, why: str) -> Never:
        raise ModelError(f"{folder}: {(part / name).relative_to(folder)} {why}.")

    if (part / "adapter_config.json").exists():
        refuse("adapter_config.json", "is an adapter of another model; merge it into that and save the result")
    for name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        told = _json(part / name).get("auto_map")
        if isinstance(told, dict) and (named := _AUTO_CLASSES & told.keys()):
            refuse(
                name,
                f"names code of the model's own (auto_map: {min(named)}), which isn't run; if transformers' own class "
                "is the same model, delete auto_map in a copy",
            )
    if not any(all(any(part.glob(file)) for file in files) for files in _TOKENIZERS):
        refuse("tokenizer.json", "is missing, and so is any other vocabulary; copy the whole folder")
    says = next((name for name in _TRANSFORMER_CONFIGS if _json(part / name)), _TRANSFORMER_CONFIGS[0])
    told = _json(part / says)
    if (task := told.get("transformer_task", "feature-extraction")) != "feature-extraction":
        refuse(says, f"says {task}; vectormill takes dense text encoders")
    if (kinds := set(told.get("modality_config", {"text": {}}))) != {"text"}:
        others = ", ".join(sorted(kinds - {"text"}))
        refuse(says, f"says that it reads {others or 'no text'}; vectormill takes encoders of plain text alone")
    for key in ("query_expansion", "tokenizer_name_or_path"):
        if told.get(key):
            refuse(says, f"has {key}, which vectormill doesn't follow")


def _check_static(folder: Path, file: Path) -> None:
    try:
        with safe_open(file, framework="numpy") as weights:
            names = set(weights.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: {file.relative_to(folder)} isn't there, or isn't safetensors.") from error
    if names != {"embedding.weight"} and not {"embeddings"} <= names <= {"embeddings", "mapping", "weights"}:
        raise ModelError(
            f"{folder}: {file.relative_to(folder)} holds {', '.join(sorted(names))}; of a static model it must be "
            "embedding.weight, or embeddings with mapping and weights."
        )


def _check_pooling(folder: Path, file: Path) -> None:
    told = _json(file)
    if not told.get("pooling_mode") and not any(told.get(f"pooling_mode_{flag}") for flag in _POOLING_FLAGS):
        raise ModelError(f"{folder}: {file.relative_to(folder)} doesn't say how to pool; add pooling_mode.")


def _check_dense(folder: Path, file: Path) -> None:
    told, where = _json(file), f"{folder}: {file.relative_to(folder)}"
    if not str(told.get("activation_function", "")).startswith("torch."):
        raise ModelError(
            f"{where} must name an activation_function of torch's own, such as torch.nn.modules.linear.Identity; "
            "another one would be replaced by Tanh."
        )
    if unknown := sorted(told.keys() - _DENSE_KEYS):
        raise ModelError(f"{where} has {', '.join(unknown)}, which sentence-transformers would ignore.")


def _check_layers_are_given(folder: Path, transformers: list[Path]) -> None:
    for part in transformers:
        if not _json(part / "config.json").get("output_hidden_states"):
            raise ModelError(
                f"{folder}: {(part / 'config.json').relative_to(folder)} lacks output_hidden_states: true, without "
                "which WeightedLayerPooling does nothing."
            )


def _json(file: Path) -> dict[str, Any]:
    """Return the JSON object that a file holds; empty if there is no file.

    Raises:
        ModelError: the file holds something else.
    """
    try:
        told = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ModelError(f"{file} isn't valid JSON.") from error
    if not isinstance(told, dict):
        raise ModelError(f"{file} isn't a JSON object.")
    return told

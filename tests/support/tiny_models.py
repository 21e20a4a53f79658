"""Models of every kind, made in place: random weights with a fixed seed, two layers, 32 dimensions."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer import modules as st
from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer
from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

SIZE = 32
_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
_TEXTS = [
    "The quick brown fox jumps over the lazy dog, 42 times.",
    "In chapter 7 the miller's naïve daughter grinds rye, at last: word 0123456789 unbelievable café",
    "query: passage: search_document: classify Represent this sentence for retrieval",
    "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ",
]


@dataclass(frozen=True, slots=True)
class Kind:
    """Kind of model, and the maker of an example."""

    name: str
    make: Callable[[Path], None]
    #: Pattern of the refusal's message. Empty if the model is accepted, with vectors equal to the library's.
    refused: str = ""
    #: Pooling given to `models add`.
    pooling: str | None = None


@cache
def _words(*, lower: bool = True) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lower)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(_TEXTS * 3, trainers.WordPieceTrainer(vocab_size=300, special_tokens=_SPECIALS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def _tokenizer(*, lower: bool = True, **how: Any) -> Any:
    named = {f"{name.strip('[]').lower()}_token": name for name in _SPECIALS}
    how = {"model_max_length": 64, **how}
    return tf.BertTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_words(lower=lower).to_str()), do_lower_case=lower, **named, **how
    )


@cache
def _bytes() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(_TEXTS * 3, trainer)
    return tokenizer


def _byte_tokenizer(template: str, **how: Any) -> Any:
    tokenizer = Tokenizer.from_str(_bytes().to_str())
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), ("</s>", 2)])
    how = {"model_max_length": 64, **how}
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        **how,
    )


def _sizes(tokenizer: Any, **more: Any) -> dict[str, Any]:
    common = {"hidden_size": SIZE, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return {"vocab_size": len(tokenizer), "max_position_embeddings": 64, **common, **more}


def _body(folder: Path, model: Any, tokenizer: Any) -> Path:
    with torch.no_grad():
        for weight in model.parameters():  # freshly initialised weights are so small that texts hardly differ
            weight += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _bert(folder: Path, *, tokenizer: Any = None, kind: Any = tf.BertModel, **config: Any) -> Path:
    tokenizer = tokenizer or _tokenizer()
    return _body(folder, kind(tf.BertConfig(**_sizes(tokenizer, **config))), tokenizer)


def _beside(folder: Path) -> Path:
    return folder.with_name(folder.name + ".body")


def _pooled(folder: Path, body: Path, *then: Any, pooling: Any = "mean", first: Any = None, **how: Any) -> None:
    transformer = st.Transformer(str(body), **(first or {}))
    size = transformer.get_embedding_dimension()
    pool = st.Pooling(size, **(pooling if isinstance(pooling, dict) else {"pooling_mode": pooling}))
    SentenceTransformer(modules=[transformer, pool, *then], device="cpu", **how).save(str(folder))


def _plain(folder: Path, *then: Any, **how: Any) -> None:
    _pooled(folder, _bert(_beside(folder)), *then, **how)


def _change(file: Path, **values: Any) -> None:
    """Change values of a JSON file. None removes one."""
    told = {**(json.loads(file.read_bytes()) if file.exists() else {}), **values}
    file.write_text(json.dumps({name: value for name, value in told.items() if value is not None}))


def _reweigh(file: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def _changed(change: Callable[[Path], None], *then: Any, **how: Any) -> Callable[[Path], None]:
    """Return a maker of a plain model whose folder is changed afterwards."""

    def make(folder: Path) -> None:
        _plain(folder, *then, **how)
        change(folder)

    return make


def _weights(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    return _changed(lambda folder: _reweigh(folder / "model.safetensors", change))


def _static(size: int = SIZE, dtype: torch.dtype = torch.float32, cut: dict[str, Any] | None = None) -> Any:
    tokenizer = Tokenizer.from_str(_words().to_str())
    if cut:
        tokenizer.enable_truncation(**cut)
    return st.StaticEmbedding(tokenizer, embedding_weights=torch.randn(tokenizer.get_vocab_size(), size).to(dtype))


def _save(folder: Path, *modules: Any, **how: Any) -> None:
    SentenceTransformer(modules=list(modules), device="cpu", **how).save(str(folder))


def _roberta(folder: Path, kind: Any = tf.RobertaModel) -> None:
    tokenizer = _byte_tokenizer("<s> $A </s>", model_max_length=62)
    config = kind.config_class(**_sizes(tokenizer, pad_token_id=1, bos_token_id=0, eos_token_id=2))
    _pooled(folder, _body(_beside(folder), kind(config), tokenizer))


def _roberta_beyond(folder: Path) -> None:
    _roberta(folder)
    _change(folder / "tokenizer_config.json", model_max_length=64)


def _mpnet(folder: Path) -> None:
    tokenizer = _byte_tokenizer("<s> $A </s>", model_max_length=62)
    config = tf.MPNetConfig(**_sizes(tokenizer, pad_token_id=1, bos_token_id=0, eos_token_id=2))
    _pooled(folder, _body(_beside(folder), tf.MPNetModel(config), tokenizer), st.Normalize())


def _t5(folder: Path) -> None:
    tokenizer = _byte_tokenizer("$A </s>", model_max_length=512)
    config = tf.T5Config(
        vocab_size=len(tokenizer), d_model=SIZE, d_kv=16, d_ff=64, num_layers=2, num_heads=2, pad_token_id=1
    )
    body = _body(_beside(folder), tf.T5ForConditionalGeneration(config), tokenizer)
    dense = st.Dense(SIZE, 24, bias=False, activation_function=torch.nn.Identity())
    _pooled(folder, body, dense, st.Normalize())


def _qwen(folder: Path, kind: Any = tf.Qwen2ForCausalLM, **config: Any) -> None:
    tokenizer = _byte_tokenizer("$A </s>", padding_side="left", model_max_length=128)
    sizes = _sizes(tokenizer, num_key_value_heads=1, max_position_embeddings=128, **config)
    body = _body(_beside(folder), kind(kind.config_class(**sizes)), tokenizer)
    prompts = {"query": "Represent this sentence for retrieval: ", "document": ""}
    _pooled(folder, body, st.Normalize(), pooling="lasttoken", prompts=prompts)


def _gpt2(folder: Path) -> None:
    tokenizer = _byte_tokenizer("$A </s>", padding_side="left")
    config = tf.GPT2Config(vocab_size=len(tokenizer), n_embd=SIZE, n_layer=2, n_head=2, n_positions=64)
    _pooled(folder, _body(_beside(folder), tf.GPT2Model(config), tokenizer), pooling="lasttoken")


def _xlnet(folder: Path) -> None:
    tokenizer = _byte_tokenizer(
        "$A </s>:0 <s>:2", padding_side="left", model_input_names=["input_ids", "token_type_ids", "attention_mask"]
    )
    config = tf.XLNetConfig(vocab_size=len(tokenizer), d_model=SIZE, n_layer=2, n_head=2, d_inner=64)
    _pooled(folder, _body(_beside(folder), tf.XLNetModel(config), tokenizer))


def _distilbert(folder: Path) -> None:
    tokenizer = _tokenizer(model_input_names=["input_ids", "attention_mask"])
    config = tf.DistilBertConfig(
        vocab_size=len(tokenizer), dim=SIZE, n_layers=2, n_heads=2, hidden_dim=64, max_position_embeddings=64
    )
    _pooled(folder, _body(_beside(folder), tf.DistilBertForMaskedLM(config), tokenizer), pooling="cls")


def _modernbert(folder: Path) -> None:
    tokenizer = _tokenizer(model_input_names=["input_ids", "attention_mask"], model_max_length=256)
    config = tf.ModernBertConfig(
        **_sizes(
            tokenizer, max_position_embeddings=256, pad_token_id=0, local_attention=16, global_attn_every_n_layers=2
        )
    )
    _pooled(folder, _body(_beside(folder), tf.ModernBertModel(config), tokenizer))


def _router(folder: Path) -> None:
    body = _bert(_beside(folder))
    document = [st.Transformer(str(body)), st.Pooling(SIZE), st.Dense(SIZE, 24)]
    router = st.Router.for_query_document(query_modules=[_static(24)], document_modules=document)
    _save(folder, router, st.Normalize(), prompts={"query": "query: ", "document": "passage: "})


def _router_of_lengths(folder: Path) -> None:
    document, query = _bert(_beside(folder)), _bert(folder.with_name(folder.name + ".query"))
    routes = {
        "query": [st.Transformer(str(query), max_seq_length=16), st.Pooling(SIZE, "cls")],
        "document": [st.Transformer(str(document), max_seq_length=48), st.Pooling(SIZE)],
    }
    _save(folder, st.Router(routes))


def _router_of_heads(folder: Path) -> None:
    heads = st.Router.for_query_document(query_modules=[st.Dense(SIZE, 16)], document_modules=[st.Dense(SIZE, 16)])
    _plain(folder, heads)


def _router_of_sizes(folder: Path) -> None:
    _save(folder, st.Router.for_query_document(query_modules=[_static(16)], document_modules=[_static(24)]))


def _router_of_other_names(folder: Path) -> None:
    _save(folder, st.Router({"query": [_static()], "doc": [_static()]}))


def _half(folder: Path) -> None:
    body = _bert(_beside(folder))
    _pooled(folder, body, st.Dense(SIZE, 24), first={"model_kwargs": {"dtype": torch.float16}})


def _added_tokens(folder: Path) -> None:
    tokenizer = _tokenizer()
    tokenizer.add_tokens(["unbelievabilities", "miller's"])
    _pooled(folder, _bert(_beside(folder), tokenizer=tokenizer))


def _clip(folder: Path) -> None:
    sides = {"hidden_size": SIZE, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = _byte_tokenizer("<s> $A </s>", model_max_length=32)
    text = {**sides, "vocab_size": len(tokenizer), "max_position_embeddings": 32, "eos_token_id": 2}
    config = tf.CLIPConfig(
        text_config=text, vision_config={**sides, "image_size": 16, "patch_size": 8}, projection_dim=16
    )
    _body(folder, tf.CLIPModel(config), tokenizer)
    listed = {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    (folder / "modules.json").write_text(json.dumps([listed]))
    both = {
        kind: {"method": f"get_{kind}_features", "method_output_name": "pooler_output"} for kind in ("text", "image")
    }
    _change(folder / "sentence_bert_config.json", modality_config=both, module_output_name="sentence_embedding")


def _cross_encoder(folder: Path) -> None:
    body = _bert(_beside(folder), kind=tf.BertForSequenceClassification, num_labels=1)
    CrossEncoder(str(body), device="cpu").save_pretrained(str(folder))


def _splade(folder: Path) -> None:
    body = _bert(_beside(folder), kind=tf.BertForMaskedLM)
    SparseEncoder(modules=[MLMTransformer(str(body)), SpladePooling()], device="cpu").save(str(folder))


def _late_interaction(folder: Path) -> None:
    MultiVectorEncoder(str(_bert(_beside(folder))), device="cpu").save(str(folder))


def _words_of_its_own(folder: Path, *then: Any) -> None:
    vocabulary = ["PADDING", "the", "quick", "brown", "fox", "over", "lazy", "dog", "word"]
    words = st.WordEmbeddings(WhitespaceTokenizer(vocabulary), torch.randn(len(vocabulary), SIZE))
    size = then[-1].get_embedding_dimension() if then else SIZE
    _save(folder, words, *then, st.Pooling(size))


def _without_modules(folder: Path) -> None:
    _bert(folder)


def _without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def _modules(folder: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    file = folder / "modules.json"
    file.write_text(json.dumps(change(json.loads(file.read_bytes()))))


def _layers(folder: Path) -> None:
    body = _bert(_beside(folder), output_hidden_states=True)
    transformer = st.Transformer(str(body))
    weighted = st.WeightedLayerPooling(SIZE, num_hidden_layers=2, layer_start=1)
    with torch.no_grad():
        weighted.layer_weights.copy_(torch.tensor([1.0, 3.0]))
    _save(folder, transformer, weighted, st.Pooling(SIZE))


def _misnamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("attention.self.query", "attention.self.q"): weight for name, weight in weights.items()}


def _of_norms(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("output.LayerNorm", "output.layernorm"): weight for name, weight in weights.items()}


def _tall(folder: Path) -> None:
    _change(folder / "sentence_bert_config.json", max_seq_length=100)


def _settings(**values: Any) -> Callable[[Path], None]:
    return lambda folder: _change(folder / "config_sentence_transformers.json", **values)


_PROMPTS = {"query": "query: ", "document": "passage: "}
#: In the order of the table in docs/explanation/decisions/0014-a-model-is-proven-both-ways-or-refused.md.
KINDS = (
    Kind("BERT, mean", _plain),
    Kind(
        "BERT, cls, Dense with Tanh, Normalize",
        lambda at: _plain(at, st.Dense(SIZE, 24), st.Normalize(), pooling="cls"),
    ),
    Kind("cls and mean, concatenated", lambda at: _plain(at, pooling=("cls", "mean"))),
    Kind("max", lambda at: _plain(at, pooling="max")),
    Kind("mean_sqrt_len_tokens", lambda at: _plain(at, pooling="mean_sqrt_len_tokens")),
    Kind("weightedmean", lambda at: _plain(at, pooling="weightedmean")),
    Kind("WeightedLayerPooling", _layers),
    Kind(
        "Normalize in the middle, LayerNorm, Dropout, Dense with GELU",
        lambda at: _plain(
            at,
            st.Normalize(),
            st.LayerNorm(SIZE),
            st.Dropout(0.5),
            st.Dense(SIZE, 24, activation_function=torch.nn.GELU()),
        ),
    ),
    Kind("prompts for queries and documents", lambda at: _plain(at, prompts=_PROMPTS)),
    Kind(
        "prompts, include_prompt: false",
        lambda at: _plain(at, prompts=_PROMPTS, pooling={"pooling_mode": "mean", "include_prompt": False}),
    ),
    Kind(
        "weightedmean, include_prompt: false for queries only",
        lambda at: _plain(
            at, prompts={"query": "query: "}, pooling={"pooling_mode": "weightedmean", "include_prompt": False}
        ),
    ),
    Kind(
        "default_prompt_name, prompts of other tasks",
        lambda at: _plain(
            at, prompts={"classify": "classify ", "passage": "passage: "}, default_prompt_name="classify"
        ),
    ),
    Kind("Router: static queries, BERT documents, prompts", _router),
    Kind("Router: two BERTs, 16 and 48 tokens", _router_of_lengths),
    Kind("Router of two Dense after one BERT", _router_of_heads),
    Kind("query_length 8, document_length 24", lambda at: _plain(at, first={"query_length": 8, "document_length": 24})),
    Kind(
        "max_seq_length 16, similarity dot",
        lambda at: _plain(at, first={"max_seq_length": 16}, similarity_fn_name="dot"),
    ),
    Kind("truncate_dim 8", lambda at: _plain(at, truncate_dim=8)),
    Kind(
        "do_lower_case over a cased tokeniser",
        lambda at: _pooled(at, _bert(_beside(at), tokenizer=_tokenizer(lower=False)), first={"do_lower_case": True}),
    ),
    Kind(
        "truncated at the left",
        lambda at: _pooled(at, _bert(_beside(at), tokenizer=_tokenizer(truncation_side="left"))),
    ),
    Kind(
        "special tokens in texts split",
        lambda at: _pooled(at, _bert(_beside(at), tokenizer=_tokenizer(split_special_tokens=True))),
    ),
    Kind("tokens added to tokeniser and weights", _added_tokens),
    Kind("weights with a language model's head, no pooler", lambda at: _headed(at)),
    Kind("DistilBERT, of a masked language model", _distilbert),
    Kind("ModernBERT: rotary and local attention", _modernbert),
    Kind("RoBERTa: positions from 2", _roberta),
    Kind("XLM-RoBERTa", lambda at: _roberta(at, tf.XLMRobertaModel)),
    Kind("MPNet: relative positions", _mpnet),
    Kind("T5: the encoder of an encoder-decoder, Dense", _t5),
    Kind("Qwen2: causal, padded at the left, last token, prompts", _qwen),
    Kind("Qwen3: heads of another size than their share", lambda at: _qwen(at, tf.Qwen3Model, head_dim=24)),
    Kind("BERT in float16, Dense", _half),
    Kind("static", lambda at: _save(at, _static())),
    Kind("static in float16, Normalize", lambda at: _save(at, _static(dtype=torch.float16), st.Normalize())),
    Kind(
        "static, truncated at 12 tokens from the left",
        lambda at: _save(at, _static(cut={"max_length": 12, "direction": "left"}), prompts=_PROMPTS),
    ),
    Kind("transformer alone, pooling cls", _without_modules, pooling="cls"),
    Kind("transformer alone, pooling mean", _without_modules, pooling="mean"),
    Kind("transformer alone, pooling lasttoken", _without_modules, pooling="lasttoken"),
    Kind("transformer alone", _without_modules, "no modules.json"),
    Kind("pooling given twice", _plain, "modules.json says how it pools", pooling="mean"),
    Kind("misnamed matrices", _weights(_misnamed), "attention.self.query"),
    Kind("misnamed norms, which are filled with ones", _weights(_of_norms), "LayerNorm"),
    Kind(
        "a layer is missing",
        _weights(lambda all_: {name: one for name, one in all_.items() if "layer.1." not in name}),
        "layer.1",
    ),
    Kind(
        "a layer more than config.json says",
        _changed(lambda at: _change(at / "config.json", num_hidden_layers=1)),
        "layer.1",
    ),
    Kind(
        "weights that aren't numbers",
        _weights(lambda all_: {name: one * float("nan") for name, one in all_.items()}),
        "finite",
    ),
    Kind(
        "Dense left out of modules.json",
        _changed(lambda at: _modules(at, lambda listed: listed[:2]), st.Dense(SIZE, 24)),
        "2_Dense",
    ),
    Kind(
        "Dense without weights",
        _changed(_without("2_Dense/model.safetensors"), st.Dense(SIZE, 24)),
        "model.safetensors",
    ),
    Kind(
        "Dense with an activation that isn't torch's",
        _changed(
            lambda at: _change(at / "2_Dense/config.json", activation_function="transformers.activations.GELUTanh"),
            st.Dense(SIZE, 24),
        ),
        "activation_function",
    ),
    Kind(
        "Pooling without a mode",
        _changed(lambda at: _change(at / "1_Pooling/config.json", pooling_mode=None)),
        "pooling_mode",
    ),
    Kind("no tokeniser", _changed(_without("tokenizer.json")), "tokenizer.json"),
    Kind(
        "a tokeniser with more tokens than the weights",
        _changed(lambda at: _byte_tokenizer("$A </s>").save_pretrained(at)),
        "rows",
    ),
    Kind("max_seq_length above the positions", _changed(_tall), "max_seq_length"),
    Kind("RoBERTa with a bound of its positions, which begin at 2", _roberta_beyond, "model_max_length"),
    Kind("GPT-2: absolute positions, padded at the left", _gpt2, "batch"),
    Kind("XLNet: token types of its own", _xlnet, "token"),
    Kind("Router: sizes differ", _router_of_sizes, "document has 24 and a query has 16"),
    Kind("Router without a route for documents", _router_of_other_names, "document"),
    Kind("CrossEncoder", _cross_encoder, "CrossEncoder"),
    Kind(
        "classifier without modules.json, pooling given",
        lambda at: _none(_bert(at, kind=tf.BertForSequenceClassification)),
        "CrossEncoder or classifier",
        pooling="mean",
    ),
    Kind("SparseEncoder (SPLADE)", _splade, "sparse"),
    Kind("MultiVectorEncoder (late interaction)", _late_interaction, "each token"),
    Kind("CLIP: texts and images", _clip, "image"),
    Kind(
        "CLIP, as it was saved before",
        _changed(
            lambda at: _modules(at, lambda listed: [{**listed[0], "type": "sentence_transformers.models.CLIPModel"}])
        ),
        "CLIPModel",
    ),
    Kind("WordEmbeddings", _words_of_its_own, "WordEmbeddings"),
    Kind("WordEmbeddings, CNN", lambda at: _words_of_its_own(at, st.CNN(SIZE, 8)), "WordEmbeddings|CNN"),
    Kind("WordEmbeddings, LSTM", lambda at: _words_of_its_own(at, st.LSTM(SIZE, 8)), "WordEmbeddings|LSTM"),
    Kind("BoW", lambda at: _save(at, st.BoW(["the", "quick", "fox"])), "BoW"),
    Kind(
        "code by auto_map",
        _changed(lambda at: _change(at / "config.json", auto_map={"AutoModel": "own.Model"})),
        "auto_map",
    ),
    Kind(
        "a module of its own code",
        _changed(
            lambda at: _modules(at, lambda listed: [*listed, {**listed[1], "idx": 2, "name": "2", "type": "own.Head"}])
        ),
        "own.Head",
    ),
    Kind("adapter", _changed(lambda at: _change(at / "adapter_config.json", base_model_name_or_path="x")), "adapter"),
    Kind(
        "query expansion",
        _changed(lambda at: _change(at / "sentence_bert_config.json", query_expansion={"length": 8})),
        "query_expansion",
    ),
    Kind(
        "weights as a pickle",
        _changed(lambda at: _none((at / "model.safetensors").rename(at / "pytorch_model.bin"))),
        "safetensors",
    ),
)


def _none(_: Path) -> None:
    pass


def _headed(folder: Path) -> None:
    _plain(folder)
    body = _bert(folder.with_name(folder.name + ".head"), kind=tf.BertForMaskedLM)
    shutil.copy(body / "model.safetensors", folder / "model.safetensors")

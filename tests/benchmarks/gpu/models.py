"""BERT models of known sizes with random weights, and a WordPiece tokeniser trained on the spot."""

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, BertTokenizerFast
from transformers.utils.logging import disable_progress_bar

from tests.benchmarks.running_text import manual

MOST_TOKENS = 512
_SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
#: Size of BERT's own vocabulary, for the embeddings; and one that splits the manual's words about as often as that.
_EMBEDDED_WORDS, _TRAINED_WORDS = 30_522, 3_000


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of a model."""

    name: str
    layers: int
    width: int
    heads: int
    inner: int

    def tiny(self) -> "Shape":
        """Return a shape for trials, where only the way matters."""
        return replace(self, layers=2, width=self.width // 8, inner=self.inner // 8)


MINILM = Shape("MiniLM", 6, 384, 12, 1_536)
BGE_LARGE = Shape("bge-large", 24, 1_024, 16, 4_096)


@cache
def tokenizer() -> Tokenizer:
    """Return the tokeniser."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=_TRAINED_WORDS, special_tokens=_SPECIALS, show_progress=False)
    made.train_from_iterator([manual()], trainer)
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


def make_model(shape: Shape, folder: Path, device: str) -> Path:
    """Make a model with mean pooling and vectors of length 1 in `folder`, on `device` since that is faster; return the
    folder."""
    config = BertConfig(
        vocab_size=_EMBEDDED_WORDS,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.inner,
        max_position_embeddings=MOST_TOKENS,
        # Activations keep their size. With the usual, smaller weights all texts have nearly the same vector.
        initializer_range=shape.width**-0.5,
    )
    disable_progress_bar()
    torch.manual_seed(0)
    with TemporaryDirectory() as body:
        with torch.device(device):
            BertModel(config).save_pretrained(body)
        BertTokenizerFast(tokenizer_object=tokenizer(), model_max_length=MOST_TOKENS).save_pretrained(body)
        modules = [Transformer(body), Pooling(shape.width, "mean"), Normalize()]
        SentenceTransformer(modules=modules, device="cpu").save(str(folder))
    return folder

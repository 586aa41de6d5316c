"""A Hugging Face Transformer in and out: `from_pretrained`, compressed, and `save_pretrained` where the shapes allow.

The checkpoint is a tiny one made here, so that nothing is downloaded; any encoder of yours takes its place.
"""

import torch
from transformers import BertConfig, BertForSequenceClassification

from featherweight import Context, Data, compress, run
from featherweight.techniques import Distill, PruneChannels, PruneWeights, QuantizeWeights

GOOD, BAD, WORDS, LENGTH = range(4, 12), range(12, 20), 64, 12

config = BertConfig(
    vocab_size=WORDS,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=LENGTH,
)
torch.manual_seed(0)
BertForSequenceClassification(config).save_pretrained("checkpoint")


def sentences(count, seed):
    """Return words `[count, 12]` with their mask, and whether more of them are good than bad."""
    draw = torch.Generator().manual_seed(seed)
    words = torch.randint(4, WORDS, (count, LENGTH), generator=draw)
    mood = sum((words == word).sum(1) for word in GOOD) - sum((words == word).sum(1) for word in BAD)
    return {"input_ids": words, "attention_mask": torch.ones_like(words)}, (mood > 0).long()


model = BertForSequenceClassification.from_pretrained("checkpoint")
train = [sentences(64, seed) for seed in range(40)]
optimizer = torch.optim.AdamW(model.train().parameters(), 3e-3)
for _ in range(3):
    for inputs, target in train:
        optimizer.zero_grad()
        model(**inputs, labels=target).loss.backward()
        optimizer.step()

data = Data(
    example=sentences(1, 0)[0],
    train=train,
    validate=[sentences(200, 1000)],
    test=[sentences(200, 2000)],
    output="logits",  # which part of what the model returns loss and score look at
)
recipe = PruneChannels(ratio=0.25) + Distill(epochs=2) + QuantizeWeights(bits=6)  # heads, units and width leave
small = compress(model.eval(), data, "size<=25%, drop<=5pt", recipe, out="small.fw")
print(small.report.verdict["text"])
print("runs without transformers:", small.run(sentences(2, 5)[0])[0].shape)

sparse, _ = run(PruneWeights(ratio=0.5, epochs=1), model, Context(data=data, teacher=model))
# every shape is as it was, so the usual format holds it
sparse.save_pretrained("sparse")
print(BertForSequenceClassification.from_pretrained("sparse").num_parameters(), "parameters, half of the matrices zero")

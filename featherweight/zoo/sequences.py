"""Recurrent and temporal networks: every way people wire `nn.LSTM` and `nn.GRU`, and dilated convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from featherweight.zoo.images import CLASSES

WORDS = 100


class LSTMClassifier(nn.Module):
    """An embedding and an LSTM with one or more layers, read at the last step.

    Paper: Hochreiter and Schmidhuber, "Long Short-Term Memory", Neural Computation 1997; with a projection: Sak et al., "Long
    Short-Term Memory Recurrent Neural Network Architectures for Large Scale Acoustic Modeling", Interspeech 2014.
    """

    def __init__(self, hidden: int, layers: int = 1, projection: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 48)
        self.lstm = nn.LSTM(48, hidden, num_layers=layers, batch_first=True, proj_size=projection)
        self.fc = nn.Linear(projection or hidden, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[n, steps]` tokens to `[n, 10]`."""
        out, _ = self.lstm(self.embedding(tokens))
        return self.fc(out[:, -1, :])  # type: ignore[no-any-return]


class BiLSTMClassifier(nn.Module):
    """A bidirectional LSTM over features, averaged over time.

    Paper: Graves and Schmidhuber, "Framewise Phoneme Classification with Bidirectional LSTM Networks", IJCNN 2005.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(20, 64, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(64 * 2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, steps, 20]` to `[n, 10]`."""
        out, _ = self.rnn(x)
        return self.fc(out.mean(dim=1))  # type: ignore[no-any-return]


class GRUClassifier(nn.Module):
    """A GRU with time first, started from explicit zeros.

    Paper: Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", EMNLP 2014.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hidden_size = 64
        self.gru = nn.GRU(20, self.hidden_size)
        self.fc = nn.Linear(self.hidden_size, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, steps, 20]` to `[n, 10]`."""
        start = torch.zeros(1, x.size(0), self.hidden_size)
        _, last = self.gru(x.transpose(0, 1), start)
        return self.fc(last.squeeze(0))  # type: ignore[no-any-return]


class StackedBiLSTM(nn.Module):
    """Two bidirectional layers; the last states of both directions are joined.

    Paper: the encoder of Conneau et al., "Supervised Learning of Universal Sentence Representations", EMNLP 2017.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 48, padding_idx=0)
        self.lstm = nn.LSTM(48, 48, num_layers=2, bidirectional=True, batch_first=True, dropout=0.3)
        self.dropout = nn.Dropout(0.3)
        self.hidden = nn.Linear(2 * 48, 64)
        self.fc = nn.Linear(64, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """`[n, steps]` tokens to `[n, 10]`."""
        _, (h_n, _) = self.lstm(self.dropout(self.embedding(tokens)))
        both = torch.cat((h_n[-2], h_n[-1]), dim=1)
        return self.fc(torch.relu(self.hidden(self.dropout(both))))  # type: ignore[no-any-return]


class Seq2Seq(nn.Module):
    """GRU encoder and decoder with dot-product attention, taught with the right previous words.

    Paper: Luong et al., "Effective Approaches to Attention-based Neural Machine Translation", EMNLP 2015.
    """

    def __init__(self, width: int = 48, hidden: int = 64) -> None:
        super().__init__()
        self.source = nn.Embedding(WORDS, width)
        self.target = nn.Embedding(WORDS, width)
        self.encoder = nn.GRU(width, hidden, batch_first=True)
        self.decoder = nn.GRU(width, hidden, batch_first=True)
        self.combine = nn.Linear(2 * hidden, hidden)
        self.out = nn.Linear(hidden, WORDS)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """`[n, steps]` and `[n, words]` tokens to `[n, words, 100]`."""
        memory, state = self.encoder(self.source(source))
        steps, _ = self.decoder(self.target(target), state)
        weights = F.softmax(torch.bmm(steps, memory.transpose(1, 2)), dim=-1)
        context = torch.bmm(weights, memory)
        return self.out(torch.tanh(self.combine(torch.cat((steps, context), dim=-1))))  # type: ignore[no-any-return]


class TiedLanguageModel(nn.Module):
    """An LSTM language model whose embedding and output layer share one weight.

    Paper: Press and Wolf, "Using the Output Embedding to Improve Language Models", EACL 2017.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.encoder = nn.Embedding(WORDS, width)
        self.rnn = nn.LSTM(width, width, 2, dropout=0.2, batch_first=True)
        self.decoder = nn.Linear(width, WORDS)
        self.decoder.weight = self.encoder.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """`[n, steps]` tokens to `[n, steps, 100]`."""
        out, _ = self.rnn(self.encoder(tokens))
        return self.decoder(out)  # type: ignore[no-any-return]


class CRNN(nn.Module):
    """Convolutions, columns of the map as steps, stacked bidirectional LSTMs, a class for each step.

    Paper: Shi et al., "An End-to-End Trainable Neural Network for Image-Based Sequence Recognition", TPAMI 2017.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1),
            nn.ReLU(True),
            nn.MaxPool2d(2, 2),
            nn.Conv2d(24, 48, 3, padding=1, bias=False),
            nn.BatchNorm2d(48),
            nn.ReLU(True),
            nn.MaxPool2d((2, 1)),
        )
        self.rnn1 = nn.LSTM(48 * 4, 64, bidirectional=True)
        self.embed = nn.Linear(128, 64)
        self.rnn2 = nn.LSTM(64, 64, bidirectional=True)
        self.fc = nn.Linear(128, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, 1, 16, w]` to `[n, w / 2, 10]`."""
        x = self.cnn(x)
        x = x.permute(3, 0, 1, 2).flatten(2)
        x, _ = self.rnn1(x)
        steps, batch, width = x.size()
        x = self.embed(x.reshape(steps * batch, width)).view(steps, batch, -1)
        x, _ = self.rnn2(x)
        return self.fc(x).permute(1, 0, 2)  # type: ignore[no-any-return]


class TemporalBlock(nn.Module):
    """Two causal dilated convolutions with weight norm and a shortcut."""

    def __init__(self, inner: int, outer: int, dilation: int) -> None:
        super().__init__()
        self.padding = 2 * dilation
        self.conv1 = weight_norm(nn.Conv1d(inner, outer, 3, padding=self.padding, dilation=dilation))
        self.conv2 = weight_norm(nn.Conv1d(outer, outer, 3, padding=self.padding, dilation=dilation))
        self.dropout = nn.Dropout(0.2)
        self.downsample = nn.Conv1d(inner, outer, 1) if inner != outer else None

    def forward(self, x: Tensor) -> Tensor:
        """`[n, inner, steps]` to `[n, outer, steps]`."""
        out = self.dropout(F.relu(self.conv1(x)[:, :, : -self.padding].contiguous()))
        out = self.dropout(F.relu(self.conv2(out)[:, :, : -self.padding].contiguous()))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)))


class TCN(nn.Module):
    """Temporal convolutional network.

    Paper: Bai et al., "An Empirical Evaluation of Generic Convolutional and Recurrent Networks for Sequence Modeling", 2018.
    """

    def __init__(self, widths: tuple[int, ...] = (32, 48, 48)) -> None:
        super().__init__()
        inner = (20, *widths[:-1])
        self.network = nn.Sequential(
            *(TemporalBlock(i, o, 2**n) for n, (i, o) in enumerate(zip(inner, widths, strict=True)))
        )
        self.linear = nn.Linear(widths[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, steps, 20]` to `[n, 10]`."""
        return self.linear(self.network(x.transpose(1, 2))[:, :, -1])  # type: ignore[no-any-return]

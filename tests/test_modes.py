"""Evaluation mode of copies that are only asked."""

from __future__ import annotations

import torch
from torch import nn

from featherweight.modes import answering


def test_a_copy_that_is_asked_says_the_same_and_leaves_the_model_as_it_is():
    model = nn.Sequential(
        nn.Conv3d(1, 2, 2), nn.Flatten(2), nn.Conv1d(2, 2, 1), nn.Unflatten(2, (2, 4)), nn.Conv2d(2, 3, 2)
    )
    model.append(nn.Dropout(0.5)).train()
    asked = answering(model, torch.device("cpu"))
    assert asked[4].weight.is_contiguous(memory_format=torch.channels_last)
    assert model[4].weight.is_contiguous()
    assert not model[4].weight.is_contiguous(memory_format=torch.channels_last)
    assert model.training
    inputs = torch.randn(5, 1, 2, 3, 5)
    inside = model[:5](inputs)
    torch.testing.assert_close(asked(inputs), inside)

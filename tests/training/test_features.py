"""What is read of two models, put side by side."""

import torch

from distill.training.features import Representations, token_places


def test_states_stand_at_the_places_of_another_batch_however_both_are_padded():
    right = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    left = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 1, 1], [0, 1, 1, 1, 1]])
    longer = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
    for mask in (right, left, longer):
        for other in (right, left, longer):
            numbers = (other.cumsum(1) * other).float()  # 1, 2, … at the tokens
            maps = (10 * numbers[:, :, None] + numbers[:, None, :]).unsqueeze(1)
            states = numbers.unsqueeze(-1)
            found = Representations([states], [maps], [[states, 2 * states]], states, states[:, 0])
            moved = found.at_tokens(token_places(mask, other))
            expected = (mask.cumsum(1) * mask).float()
            assert torch.equal(moved.hidden[0][..., 0] * mask, expected)
            assert torch.equal(moved.embedding[..., 0] * mask, expected)
            assert torch.equal(moved.relations[0][1][..., 0] * mask, 2 * expected)
            both = mask[:, None, :, None] * mask[:, None, None, :]
            assert torch.equal(
                moved.attention[0] * both, (10 * expected[:, None, :, None] + expected[:, None, None]) * both
            )
            assert torch.equal(moved.pooled, found.pooled)

import math

import pytest
import torch

from hf_dino.position_embeddings_dino_detr import sine_box_embedding, sine_position_embedding


def slow_position_embedding(mask, d_model, temperature, offset):
    """Sines and cosines of DETR cell by cell: y in the first half, then x, each counted within the image."""
    embedding = torch.zeros(*mask.shape, d_model, dtype=torch.float64)
    for image, row, column in mask.nonzero().tolist():
        y = (mask[image, : row + 1, column].sum().item() + offset) / mask[image, :, column].sum().item()
        x = (mask[image, row, : column + 1].sum().item() + offset) / mask[image, row].sum().item()
        for half, fraction in enumerate((y, x)):
            for channel in range(d_model // 2):
                angle = 2 * math.pi * fraction / temperature ** (2 * (channel // 2) / (d_model // 2))
                value = math.cos(angle) if channel % 2 else math.sin(angle)
                embedding[image, row, column, half * d_model // 2 + channel] = value
    return embedding


@pytest.mark.parametrize(("temperature", "offset"), [(20, 0.0), (10000, -0.5)])
def test_position_embedding_equals_a_slow_one(temperature, offset):
    mask = torch.zeros(2, 5, 7, dtype=torch.bool)
    mask[0], mask[1, :3, :4] = True, True
    embedding = sine_position_embedding(mask, 16, temperature, offset)
    expected = slow_position_embedding(mask, 32, temperature, offset)
    torch.testing.assert_close(embedding[mask].double(), expected[mask], rtol=0, atol=1e-5)


def test_position_embedding_is_computed_in_float32():
    """In bf16, cells could not be counted beyond 256."""
    mask = torch.ones(1, 2, 400, dtype=torch.bool)
    embedding = sine_position_embedding(mask, 16, 20, 0.0)
    torch.testing.assert_close(embedding.double(), slow_position_embedding(mask, 32, 20, 0.0), rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sine_position_embedding(mask, 16, 20, 0.0), embedding)


def test_sine_box_embedding_is_y_x_width_height_of_transformers_formula():
    box = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    embedding = sine_box_embedding(box, dim=8).view(4, 4, 2)  # coordinate, frequency, sine and cosine
    for row, coordinate in zip(embedding, (0.2, 0.1, 0.3, 0.4)):
        for frequency, (sine, cosine) in enumerate(row):
            angle = torch.tensor(coordinate * 2 * torch.pi / 10000 ** (2 * frequency / 8))
            torch.testing.assert_close(sine, angle.sin().double(), rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(cosine, angle.cos().double(), rtol=1e-6, atol=1e-6)

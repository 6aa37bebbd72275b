"""audit: pictures of the inputs, and of who decides where."""

import numpy as np
import pytest
import torch
from auditing import SPEC, Images, audit, images

from modreg_fast.audit import examples


def test_share_maps():
    """By hand: the left half of the image decides by rgb alone, the right half evenly; the first row has no label."""
    x = {"rgb": torch.full((1, 3, 4, 4), 2.0), "depth": torch.full((1, 1, 4, 4), 6.0)}
    y = torch.zeros(1, 4, 4, dtype=torch.long)
    y[:, 0] = -100
    left = torch.tensor([1.0, 1, 0, 0])

    def model(x):  # the norm over three equal channels of rgb against the one of depth
        score = x["rgb"].sum(1) * 3**0.5 + (1 - left) * x["depth"][:, 0]
        return torch.stack([score, -score], 1)

    (example,) = audit(model, [(x, y)]).examples
    rgb, even = [int(examples.COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)], [244] * 3
    assert (example.shares[1:, :2] == [*rgb, 255]).all() and (example.shares[1:, 2:] == [*even, 255]).all()
    assert (example.shares[0, :, 3] == 0).all() and example.inputs["rgb"].shape == (4, 4, 3)


def test_scales_of_a_map_add_up():
    """A coarse pixel spreads its energy over the fine ones that it covers."""
    fine, coarse = torch.zeros(1, 4, 4), torch.zeros(1, 2, 2)
    fine[0, 0, 0], coarse[0, 0, 0] = 3, 8
    other = torch.full((1, 4, 4), 1.0)
    inputs = {"a": torch.zeros(1, 1, 4, 4), "b": torch.zeros(1, 1, 4, 4)}
    (example,) = examples.examples(inputs, [[fine, coarse], [other, torch.zeros(1, 2, 2)]], ["a", "b"], 4)
    a = np.array([[np.sqrt(9 + 64 / 4), 4], [4, 4]])  # energy 3^2 + 8^2 / 4, and 8^2 / 4
    expected = examples.mixed(torch.from_numpy(np.stack([a / (a + 1), 1 / (a + 1)]))).round().numpy()
    assert np.array_equal(example.shares[:2, :2, :3], expected)
    assert (example.shares[2:, 2:, :3] == [int(examples.COLOURS[1][i : i + 2], 16) for i in (1, 3, 5)]).all()


def test_colours_of_shares():
    """Grey at equal shares, the full colour alone, between them by the root of the distance from equality."""
    shares = torch.tensor([[0.5, 1.0, 0.75, 0.25], [0.5, 0.0, 0.25, 0.75]]).double()
    one, two = (np.array([int(c[i : i + 2], 16) for i in (1, 3, 5)]) for c in examples.COLOURS[:2])
    strength = 0.5**0.5
    expected = [[244] * 3, one, 244 + strength * (one - 244), 244 + strength * (two - 244)]
    np.testing.assert_allclose(examples.mixed(shares).numpy(), expected)
    assert examples.ramp(3) == ["rgb({} {} {})".format(*c) for c in (one, [244] * 3, two)]


@pytest.mark.parametrize("channels", [1, 2, 3, 100])
def test_pictures_of_inputs(channels):
    picture = examples._picture(torch.randn(channels, 6, 7))
    assert picture.shape == (6, 7, 3) and picture.dtype == np.uint8 and picture.min() == 0 and picture.max() == 255
    assert (channels > 2) != bool((picture[..., 0] == picture[..., 2]).all())
    assert not examples._picture(torch.full((channels, 2, 2), 3.0)).any()  # nothing to spread


def test_maps_that_do_not_lie_over_each_other():
    x = {"rgb": torch.randn(2, 3, 8, 8), "depth": torch.randn(2, 1, 4, 4)}
    model = lambda x: x["rgb"].mean((2, 3)) + x["depth"].mean((2, 3))  # noqa: E731
    assert audit(model, [(x, torch.zeros(2, dtype=torch.long))]).examples == []
    assert audit(Images(), images(), SPEC, ignore_index=255, maps=0).examples == []

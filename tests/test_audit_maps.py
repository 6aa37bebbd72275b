"""audit: pictures of the inputs, and of who decides where."""

import numpy as np
import pytest
import torch
from auditing import SPEC, Images, Vectors, audit, images, vectors
from torch import nn

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
    (example,), _ = examples.examples(inputs, [[fine, coarse], [other, torch.zeros(1, 2, 2)]], ["a", "b"], 4)
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


def test_picture_of_a_large_input():
    """More values than torch.quantile takes, in three channels."""
    picture = examples._picture(torch.arange(3 * 2400 * 2400, dtype=torch.float32).reshape(3, 2400, 2400))
    assert picture.shape == (2400, 2400, 3) and picture.min() == 0 and picture.max() == 255


@pytest.mark.parametrize("image", [(8, 8), (8, 12), (9, 13), (32, 28)])
@pytest.mark.parametrize("before", [0, 1, 5])
def test_tokens_are_patches_of_the_image(image, before):
    """The map of tokens is that of the same features as a map; tokens of no place, and rows that fill no patch, do not show."""

    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoders = nn.ModuleDict({"rgb": nn.Conv2d(3, 6, 4, 4), "depth": nn.Conv2d(1, 6, 4, 4)})
            self.tokens = nn.ModuleDict({m: nn.Identity() for m in self.encoders})
            self.head = nn.Linear(6, 5)

        def forward(self, x):
            patches = [encoder(x[m]).flatten(2).mT for m, encoder in self.encoders.items()]
            tokens = [torch.cat([y.new_ones(len(y), before, 6), y], 1) for y in patches]
            return self.head(sum(token(y) for token, y in zip(self.tokens.values(), tokens, strict=True)).tanh().mean(1))

    model, names = Patches(), ("rgb", "depth")
    data = [({"rgb": torch.randn(3, 3, *image), "depth": torch.randn(3, 1, *image)}, torch.randint(5, (3,)))]
    tokens = audit(model, data, {m: f"tokens.{m}" for m in names}, channel_dim=-1)
    maps = audit(model, data, {m: f"encoders.{m}" for m in names})
    assert len(tokens.examples) == 3 and tokens.no_maps == "" and tokens.examples[0].shares[..., 3].all()
    for one, other in zip(tokens.examples, maps.examples, strict=True):
        assert one.shares.shape == (image[0] // 4, image[1] // 4, 4) and np.array_equal(one.shares, other.shares)
        assert one.inputs["rgb"].shape == (*image, 3)


def test_central_slice_of_volumes():
    """The slice is decided by rgb alone on the left; the slices around it are not shown. A coarse scale spreads over the depth too."""
    volumes = {"a": torch.zeros(1, 1, 5, 4, 4), "b": torch.zeros(1, 2, 5, 4, 4)}
    volumes["a"][0, 0, 2, 0] = 1
    one, other, coarse = torch.full((1, 4, 4, 4), 9.0), torch.ones(1, 4, 4, 4), torch.full((1, 2, 2, 2), 8.0)
    one[0, 2] = 0
    maps, nothing = [[one, coarse], [other, torch.zeros(1, 2, 2, 2)]], torch.zeros(4, 4)
    (example,), no_maps = examples.examples(volumes, maps, ["a", "b"], 4)
    a = nothing + 8**0.5  # energy 8^2 over the 8 voxels that a coarse one covers
    expected = examples.mixed(torch.stack([a / (a + 1), 1 / (a + 1)]).double()).round().numpy()
    assert no_maps == "" and np.array_equal(example.shares[..., :3], expected)
    assert (example.inputs["a"][0] == 255).all() and not example.inputs["a"][1:].any() and example.inputs["b"].shape == (4, 4, 3)
    (cubes,), _ = examples.examples({m: x[:, :, :4] for m, x in volumes.items()}, [[torch.ones(1, 9)]] * 2, ["a", "b"], 4)
    assert cubes.shares.shape == (2, 2, 4)  # 2 x 2 x 2 cubes behind a class token


def test_maps_that_do_not_lie_over_each_other():
    x = {"rgb": torch.randn(2, 3, 8, 8), "depth": torch.randn(2, 1, 4, 4)}
    model = lambda x: x["rgb"].mean((2, 3)) + x["depth"].mean((2, 3))  # noqa: E731
    result = audit(model, [(x, torch.zeros(2, dtype=torch.long))])
    assert result.examples == [] and result.no_maps.endswith("not lie on one grid of rows and columns: rgb 8 x 8; depth 4 x 4.")
    assert f"No maps. {result.no_maps}" in result.to_html()


def test_no_maps_and_nothing_to_say():
    for result in (audit(Images(), images(), SPEC, ignore_index=255, maps=0), audit(Vectors(), vectors())):
        assert result.examples == [] and result.no_maps == "" and "Where each modality decides" not in result.to_html()

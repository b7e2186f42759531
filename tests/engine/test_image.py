"""The image: resized to the video, encoded as its first frames."""

import pytest
import torch
from comfyui_skyreels.skyreels.conditioning.latents import (
    to_model_space,
)
from comfyui_skyreels.skyreels.errors import OptionError, ShapeError
from comfyui_skyreels.skyreels.image import ImageSettings, encode_image, fit_image
from comfyui_skyreels.skyreels.runtime import TorchRuntime
from comfyui_skyreels.skyreels.vae.budget import encode_bytes, streamed_bytes
from comfyui_skyreels.skyreels.vae.model import VideoVAE
from PIL import Image
from support import tiny

pytestmark = pytest.mark.usefixtures("fast_convolutions")

RUNTIME = TorchRuntime()


@pytest.fixture(scope="module")
def vae():
    return tiny.randomize(VideoVAE(tiny.VAE))


def picture(height: int, width: int, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(0, 256, (1, height, width, channels), generator=generator)
    return values.float() / 255


def test_an_image_of_the_right_size_is_only_rescaled():
    image = picture(32, 48)
    video = fit_image(image, 48, 32)
    assert torch.equal(video[0, :, 0], image[0].permute(2, 0, 1) * 2 - 1)


@pytest.mark.parametrize(("height", "width"), [(100, 40), (40, 100), (33, 47), (7, 200)])
def test_crop_and_resize_equal_the_official_preprocessing(height, width):
    from diffusers.video_processor import VideoProcessor

    image = picture(height, width)
    pil = Image.fromarray((image[0] * 255).round().byte().numpy())
    th, tw = 32, 48
    # the official procedure: centre crop to the target's proportions, then Lanczos
    if height / width > th / tw:
        crop_w, crop_h = width, int(width * th / tw)
    else:
        crop_w, crop_h = int(height * tw / th), height
    box = ((width - crop_w) / 2, (height - crop_h) / 2, (width + crop_w) / 2, (height + crop_h) / 2)
    expected = VideoProcessor(vae_scale_factor=8).preprocess(pil.crop(box), height=th, width=tw)
    torch.testing.assert_close(fit_image(image, tw, th)[:, :, 0], expected, atol=1e-6, rtol=0)


def test_stretch_equals_the_diffusers_preprocessing():
    from diffusers.video_processor import VideoProcessor

    image = picture(50, 70)
    pil = Image.fromarray((image[0] * 255).round().byte().numpy())
    expected = VideoProcessor(vae_scale_factor=8).preprocess(pil, height=32, width=48)
    actual = fit_image(image, 48, 32, "stretch")[:, :, 0]
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)


def test_pad_keeps_the_whole_image_between_black_bars():
    video = fit_image(torch.ones(1, 32, 16, 3), 64, 32, "pad")[0, :, 0]
    assert torch.equal(video[:, :, 24:40], torch.ones(3, 32, 16))
    assert torch.equal(video[:, :, :24], -torch.ones(3, 32, 24))


def test_alpha_is_dropped():
    image = picture(32, 32, channels=4)
    assert torch.equal(fit_image(image, 32, 32), fit_image(image[..., :3], 32, 32))


def test_frame_is_encoded_alone_and_scaled(vae):
    image = picture(32, 48)
    conditioning = encode_image(vae, image, width=48, height=32, num_frames=9, runtime=RUNTIME)
    with torch.inference_mode():
        expected = to_model_space(vae.encode(fit_image(image, 48, 32)))
    assert conditioning.image_latents.shape == (1, 16, 1, 4, 6)
    assert torch.equal(conditioning.image_latents, expected)
    assert torch.equal(conditioning.padded()[:, :, :1], expected)
    assert conditioning.padded()[:, :, 1:].abs().max() == 0
    assert conditioning.latent_shape == (1, 16, 3, 4, 6)


def test_an_end_picture_is_encoded_alone_and_lies_at_the_last_latent_frame(vae):
    size = {"width": 48, "height": 32, "num_frames": 9, "runtime": RUNTIME}
    start, end = picture(50, 70), picture(32, 48).flip(1)
    settings = ImageSettings(latent_strength=0.5)
    both = encode_image(vae, start, settings, end_image=end, **size)
    plain = encode_image(vae, start, settings, **size)
    assert torch.equal(both.image_latents, plain.image_latents)
    assert plain.end_latents is None
    alone = encode_image(vae, end, settings, **size)
    assert torch.equal(both.end_latents, alone.image_latents)
    padded = both.padded()
    assert torch.equal(padded[:, :, :-1], plain.padded()[:, :, :-1])
    assert torch.equal(padded[:, :, -1:], both.end_latents)


def test_an_end_picture_leaves_the_noise_of_the_first_one(vae):
    options = {"width": 48, "height": 32, "num_frames": 9, "seed": 4, "runtime": RUNTIME}
    settings = ImageSettings(noise_augmentation=0.1)
    plain = encode_image(vae, picture(32, 48), settings, **options)
    both = encode_image(vae, picture(32, 48), settings, end_image=picture(32, 48), **options)
    assert torch.equal(both.image_latents, plain.image_latents)
    assert not torch.equal(both.end_latents, plain.image_latents)  # noise of its own


def test_longer_prefix_fills_the_first_latent_frames(vae):
    clip = torch.rand(9, 32, 32, 3)
    conditioning = encode_image(
        vae,
        clip,
        ImageSettings(prefix_frames=5),
        width=32,
        height=32,
        num_frames=17,
        runtime=RUNTIME,
    )
    assert conditioning.image_latents.shape[2] == 2
    assert conditioning.padded()[:, :, 2:].abs().max() == 0


def test_a_prefix_that_does_not_fit_whole_is_encoded_in_pieces_with_the_same_result(
    vae, monkeypatch
):
    settings = ImageSettings(prefix_frames=97)
    size = {"width": 32, "height": 32, "num_frames": 101}
    clip = torch.rand(97, 32, 32, 3, generator=torch.Generator().manual_seed(0))
    whole = encode_image(vae, clip, settings, **size, runtime=RUNTIME)
    shape = torch.Size((1, 3, 97, 32, 32))
    room = streamed_bytes(vae.config, shape, torch.float32)
    assert room < encode_bytes(vae.config, shape, torch.float32)

    class Cramped(TorchRuntime):
        def free_bytes(self):
            return room

    monkeypatch.setattr(type(vae), "encode", lambda *_, **__: pytest.fail("encoded whole"))
    in_pieces = encode_image(vae, clip, settings, **size, runtime=Cramped())
    assert tiny.relative_error(in_pieces.image_latents, whole.image_latents) <= 1e-5


def test_augmentation_noise_follows_the_clips_noise_and_spares_black_bars(vae):
    seen = []

    class Spy(torch.nn.Module):
        source = None

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.config = vae.config

        def encode(self, video, *, check):
            seen.append(video)
            return vae.encode(video, check=check)

    image = torch.full((1, 32, 32, 3), 0.5)
    image[:, :, :8] = 0.0
    encode_image(
        Spy(), image, ImageSettings(noise_augmentation=0.25), width=32, height=32, num_frames=9,
        seed=5, runtime=RUNTIME,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    torch.randn(1, 16, 3, 4, 4, generator=generator)
    noise = torch.randn(1, 3, 1, 32, 32, generator=generator) * 0.25
    clean = fit_image(image, 32, 32)
    assert torch.equal(seen[0][..., :8], clean[..., :8])
    torch.testing.assert_close(seen[0][..., 8:], (clean + noise)[..., 8:])


def test_latent_strength_scales_the_image_latents(vae):
    size = {"width": 32, "height": 32, "num_frames": 5, "runtime": RUNTIME}
    full = encode_image(vae, picture(32, 32), **size)
    weak = encode_image(vae, picture(32, 32), ImageSettings(latent_strength=0.5), **size)
    assert torch.equal(weak.image_latents, full.image_latents * 0.5)


@pytest.mark.parametrize(
    ("image", "kwargs", "error", "words"),
    [
        (torch.ones(1, 3, 32, 2), {}, ShapeError, "3 or 4 channels"),
        (torch.ones(32, 32, 3), {}, ShapeError, "3 or 4 channels"),
        (torch.full((1, 32, 32, 3), torch.nan), {}, ShapeError, "NaN"),
        (torch.ones(1, 32, 32, 3), {"fit": "zoom"}, OptionError, "crop, pad, stretch"),
        (torch.ones(1, 32, 32, 3), {"noise_augmentation": -1.0}, OptionError, "0..1"),
        (torch.ones(1, 32, 32, 3), {"prefix_frames": 4}, ShapeError, "use 5"),
        (torch.ones(1, 32, 32, 3), {"prefix_frames": 5}, ShapeError, "has 1"),
    ],
)
def test_unusable_images_and_settings_are_explained(vae, image, kwargs, error, words):
    with pytest.raises(error, match=words):
        encode_image(
            vae, image, ImageSettings(**kwargs), width=32, height=32, num_frames=5, runtime=RUNTIME
        )


def test_a_clip_of_one_frame_has_no_room_for_an_end_picture(vae):
    size = {"width": 48, "height": 32, "num_frames": 1, "runtime": RUNTIME}
    with pytest.raises(ShapeError, match="no room for an end picture.* use at least 5 frames"):
        encode_image(vae, picture(32, 48), end_image=picture(32, 48), **size)


def test_interrupt_during_encoding_leaves_the_vae_usable(vae):
    class StopError(Exception):
        pass

    checks = iter(range(100))

    def check():
        if next(checks) == 4:
            raise StopError

    image = picture(32, 32)
    size = {"width": 32, "height": 32, "num_frames": 5}
    before = encode_image(vae, image, **size, runtime=RUNTIME)
    with pytest.raises(StopError):
        encode_image(vae, image, **size, runtime=TorchRuntime(on_check=check))
    after = encode_image(vae, image, **size, runtime=RUNTIME)
    assert torch.equal(before.image_latents, after.image_latents)


def test_an_image_of_integers_is_refused_with_the_conversion():
    with pytest.raises(ShapeError, match=r"float in \[0, 1\]; got torch.uint8. Convert with"):
        fit_image(torch.zeros(1, 32, 32, 3, dtype=torch.uint8), 32, 32)


def test_room_is_asked_for_before_the_vae_moves(vae):
    asked = []

    class Recording(TorchRuntime):
        def make_room(self, num_bytes):
            asked.append(num_bytes)

    image = torch.rand(1, 32, 32, 3)
    encode_image(vae, image, width=32, height=32, num_frames=9, runtime=Recording())
    assert asked
    assert asked[0] >= encode_bytes(vae.config, torch.Size((1, 3, 1, 32, 32)), torch.float32)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.linspace(0, 255, 32).expand(1, 32, 32).unsqueeze(-1).expand(1, 32, 32, 3), "by 255"),
        (
            torch.linspace(-1, 1, 32).expand(1, 32, 32).unsqueeze(-1).expand(1, 32, 32, 3),
            r"\+ 1\) / 2",
        ),
        (torch.full((1, 32, 32, 3), torch.inf), "infinity"),
    ],
)
def test_an_image_of_another_range_is_refused_with_its_conversion(image, words):
    with pytest.raises(ShapeError, match=words):
        fit_image(image, 32, 32)


def test_what_a_resize_overshoots_is_cut():
    image = torch.full((1, 32, 32, 3), 1.0001)
    image[:, 0] = -0.2
    fitted = fit_image(image, 32, 32)
    assert fitted.max() == 1.0
    assert fitted.min() == -1.0


def test_latents_that_overflow_in_the_vae_are_named_at_once():
    vae = tiny.randomize(VideoVAE(tiny.VAE)).half()
    for parameter in vae.parameters():
        parameter.data.fill_(60000)
    with pytest.raises(ShapeError, match="computes in float16: load it in bf16 or fp32"):
        encode_image(
            vae, torch.rand(1, 32, 32, 3), width=32, height=32, num_frames=5, runtime=TorchRuntime()
        )

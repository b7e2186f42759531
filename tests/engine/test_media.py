"""Image files become tensors, clips become files that a browser plays."""

import errno
import logging
import os
import struct
import sys
import weakref
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_skyreels.skyreels import media as video
from comfyui_skyreels.skyreels.errors import DependencyError, OptionError, ShapeError
from comfyui_skyreels.wiro_api.video import read_frames

Image = pytest.importorskip("PIL.Image")
av = pytest.importorskip("av")


def clip(frames: int = 5, height: int = 32, width: int = 48) -> torch.Tensor:
    """A smooth picture that moves sideways."""
    x = torch.linspace(0, 3, width)[None, None, :] + torch.arange(frames)[:, None, None] * 0.2
    y = torch.linspace(0, 2, height)[None, :, None]
    return torch.stack([x.sin() + 0 * y, (x + y).cos(), 0 * x + y.sin()], dim=-1) * 0.4 + 0.5


class Stopped(Exception):  # noqa: N818 - a host's own exception
    pass


# --- pictures


def saved(tmp_path, image, name="picture.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_a_picture_comes_as_floats_from_zero_to_one(tmp_path):
    image = Image.new("RGB", (6, 4), (255, 0, 51))
    got = video.read_image(saved(tmp_path, image))
    assert got.shape == (1, 4, 6, 3)
    assert got.dtype == torch.float32
    assert torch.equal(got, torch.tensor([1.0, 0.0, 0.2]).expand(1, 4, 6, 3))


def test_a_picture_lying_on_its_side_is_turned_upright(tmp_path):
    image = Image.new("RGB", (6, 4))
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate 90 degrees clockwise to view"
    got = video.read_image(saved(tmp_path, image, exif=exif.tobytes()))
    assert got.shape == (1, 6, 4, 3)
    assert got[0, 0, 3].tolist() == [1.0, 1.0, 1.0]
    assert got.sum() == 3.0


def test_alpha_is_dropped_and_the_colour_under_it_stays(tmp_path):
    got = video.read_image(saved(tmp_path, Image.new("RGBA", (4, 4), (255, 0, 51, 0))))
    assert got[0, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])


def test_a_palette_picture_with_transparency_gives_its_colours(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 255, 0, 51])
    got = video.read_image(saved(tmp_path, image, transparency=1))
    assert got[0, 0, 0].tolist() == pytest.approx([1.0, 0.0, 0.2])


def test_a_grey_picture_gives_three_equal_channels(tmp_path):
    got = video.read_image(saved(tmp_path, Image.new("L", (4, 4), 51)))
    assert torch.equal(got, torch.full((1, 4, 4, 3), 0.2))


def test_sixteen_bit_grey_keeps_its_depth(tmp_path):
    levels = np.array([[0, 300, 65535]], dtype=np.uint16)
    got = video.read_image(saved(tmp_path, Image.fromarray(levels)))
    assert got[0, 0, :, 1].tolist() == pytest.approx([0.0, 300 / 65535, 1.0])


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    path = saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert video.read_image(path)[0, 0, 0].tolist() == [1.0, 0.0, 0.0]


def test_a_missing_picture_is_named(tmp_path):
    with pytest.raises(OptionError, match=r"no image file .*gone\.png"):
        video.read_image(tmp_path / "gone.png")


def test_a_file_that_is_no_picture_is_refused(tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("these are notes")
    with pytest.raises(OptionError, match="not an image"):
        video.read_image(path)


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg"])
def test_a_damaged_picture_is_refused(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(noise), name)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(OptionError, match="damaged"):
        video.read_image(path)


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path):
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    data = b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    with pytest.raises(ShapeError, match="pixels: scale it down"):
        video.read_image(path)


def test_without_pillow_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DependencyError, match="pip install pillow"):
        video.read_image("any.png")


# --- videos


def test_a_video_is_what_browsers_play(tmp_path):
    path = tmp_path / "new" / "clip.mp4"
    video.write_video(path, clip())
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height, stream.average_rate) == (48, 32, 24)
        assert (context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1)
        assert context.color_range == 1
        assert sum(1 for _ in container.decode(stream)) == 5
    data = path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")
    assert [entry.name for entry in path.parent.iterdir()] == ["clip.mp4"]


def test_another_frame_rate_is_kept(tmp_path):
    video.write_video(tmp_path / "a.mp4", clip(), fps=12)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 12


@pytest.mark.parametrize("colour", [(0.8, 0.1, 0.1), (0.1, 0.8, 0.2), (0.2, 0.2, 0.9)])
def test_colours_survive_by_the_rules_the_file_states(tmp_path, colour):
    frames = torch.tensor(colour).expand(2, 32, 32, 3)
    video.write_video(tmp_path / "a.mp4", frames)
    with av.open(str(tmp_path / "a.mp4")) as container:
        frame = next(container.decode(video=0))
    planes = [bytes(plane)[0] for plane in frame.planes]
    y, cb, cr = (planes[0] - 16) / 219, (planes[1] - 128) / 224, (planes[2] - 128) / 224
    red, blue = y + 1.5748 * cr, y + 1.8556 * cb  # BT.709, limited range
    green = (y - 0.2126 * red - 0.0722 * blue) / 0.7152
    assert [red, green, blue] == pytest.approx(list(colour), abs=0.02)


def test_the_pictures_come_back_close_to_what_was_written(tmp_path):
    frames = clip()
    video.write_video(tmp_path / "a.mp4", frames)
    decoded = [frame for frame, _ in read_frames(tmp_path / "a.mp4")]
    error = torch.from_numpy(np.stack(decoded)).float() / 255 - frames
    assert error.pow(2).mean().sqrt() < 0.02


def test_the_clip_is_converted_in_pieces_that_lose_no_frame(tmp_path, monkeypatch):
    frames = clip(frames=7)
    whole = np.concatenate(list(video._chunks_of_bytes(frames)))
    monkeypatch.setattr(video, "_CHUNK_PIXELS", 2 * 32 * 48)
    pieces = list(video._chunks_of_bytes(frames))
    assert [len(piece) for piece in pieces] == [2, 2, 2, 1]
    assert np.array_equal(np.concatenate(pieces), whole)


def test_values_beyond_zero_and_one_are_clipped_and_nan_is_black_with_a_warning(caplog):
    frames = torch.tensor([-1.0, 2.0, torch.nan]).expand(1, 2, 2, 3)
    with caplog.at_level(logging.WARNING):
        [pixels] = video._chunks_of_bytes(frames)
    assert pixels[0, 0, 0].tolist() == [0, 255, 0]
    assert "NaN" in caplog.text


def test_a_stop_in_mid_write_leaves_the_old_file_and_no_part(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "_CHUNK_PIXELS", 1)
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    calls = []

    def check() -> None:
        calls.append(1)
        # x264 looks some 50 frames ahead, so it is late that the file begins
        if len(calls) == 80:
            assert (tmp_path / f"a.mp4.{os.getpid()}.part").exists()
            raise Stopped

    with pytest.raises(Stopped):
        video.write_video(path, clip(frames=80), check=check)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]
    assert path.read_bytes() == b"old"


def test_a_whole_file_replaces_the_old_one(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    video.write_video(path, clip())
    assert path.read_bytes()[4:8] == b"ftyp"


@pytest.mark.parametrize("shape", [(5, 31, 48, 3), (5, 32, 47, 3)])
def test_odd_sizes_are_refused(tmp_path, shape):
    with pytest.raises(ShapeError, match=f"{shape[2]}x{shape[1]} .*even"):
        video.write_video(tmp_path / "a.mp4", torch.zeros(shape))


@pytest.mark.parametrize("shape", [(32, 48, 3), (5, 32, 48, 4), (0, 32, 48, 3)])
def test_what_is_no_clip_is_refused(tmp_path, shape):
    with pytest.raises(ShapeError, match="A clip must be"):
        video.write_frames(tmp_path / "a.mp4", torch.zeros(shape))


@pytest.mark.parametrize("fps", [0, -24, float("nan")])
def test_an_impossible_frame_rate_is_refused(tmp_path, fps):
    with pytest.raises(OptionError, match="frames per second"):
        video.write_video(tmp_path / "a.mp4", clip(), fps=fps)


@pytest.mark.parametrize("name", ["a.mp4", "a.npy"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, name):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OptionError, match="cannot be written"):
        video.write_frames(tmp_path / "file" / name, clip())


def test_a_name_taken_by_a_folder_is_refused_and_leaves_no_part(tmp_path):
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(OptionError, match="cannot be written"):
        video.write_video(tmp_path / "a.mp4", clip())
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]


def test_npy_keeps_the_exact_numbers(tmp_path):
    frames = clip()
    video.write_frames(tmp_path / "a.npy", frames)
    got = np.load(tmp_path / "a.npy")
    assert got.dtype == np.float32
    assert np.array_equal(got, frames.numpy())
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.npy"]


def test_the_suffix_chooses_a_video(tmp_path):
    video.write_frames(tmp_path / "a.MP4", clip())
    assert (tmp_path / "a.MP4").read_bytes()[4:8] == b"ftyp"


@pytest.mark.parametrize("name", ["a.gif", "a"])
def test_another_suffix_is_refused_with_both_that_work(tmp_path, name):
    with pytest.raises(OptionError, match=r"\.mp4 .* or \.npy"):
        video.write_frames(tmp_path / name, clip())


def test_without_pyav_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DependencyError, match="pip install av"):
        video.write_video(tmp_path / "a.mp4", clip())


# --- clips that are read


def test_a_video_that_was_written_is_read_back(tmp_path):
    path = tmp_path / "clip.mp4"
    written = clip(9)
    video.write_video(path, written)
    got = video.read_clip(path)
    assert (got.shape, got.dtype) == ((9, 32, 48, 3), torch.float32)
    assert 0 <= got.min() <= got.max() <= 1
    # H.264 halves the resolution of colours; a clip that is one frame late is off by 0.04
    assert (got - written).abs().mean() < 0.02


def test_a_video_is_read_with_its_own_colour_matrix(tmp_path):
    """Read with BT.601's, the green would be off by 0.1."""
    path = tmp_path / "clip.mp4"
    colour = torch.tensor([0.2, 0.8, 0.3])
    video.write_video(path, colour.expand(3, 32, 48, 3))
    torch.testing.assert_close(video.read_clip(path)[1, 16, 24], colour, atol=0.012, rtol=0)


#: matrix of FFmpeg's code, its red and blue coefficients
MATRICES = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 2: (0.299, 0.114)}


@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize("is_full", [False, True], ids=["limited", "full"])
def test_colours_are_read_by_the_matrix_and_range_that_the_file_states(tmp_path, matrix, is_full):
    """Levels as they are in the file, and the colour that ITU-T H.273 makes of them."""
    y, cb, cr = levels = (100, 110, 160)
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_range = matrix, 2 if is_full else 1
        frame = av.VideoFrame(32, 32, "yuv420p")
        for plane, level in zip(frame.planes, levels, strict=True):
            plane.update(bytes([level]) * plane.buffer_size)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    offset, luma, chroma = (0, 255, 255) if is_full else (16, 219, 224)
    y, cb, cr = (y - offset) / luma, (cb - 128) / chroma, (cr - 128) / chroma
    kr, kb = MATRICES[matrix]
    red, blue = y + 2 * (1 - kr) * cr, y + 2 * (1 - kb) * cb
    green = (y - kr * red - kb * blue) / (1 - kr - kb)
    expected = torch.tensor([red, green, blue])
    # swscale's integer tables are off by up to three of 255
    torch.testing.assert_close(video.read_clip(path)[0, 16, 16], expected, atol=0.014, rtol=0)
    pixels, _ = next(iter(read_frames(path)))
    remote = torch.from_numpy(pixels)[16, 16] / 255
    torch.testing.assert_close(remote, expected, atol=0.014, rtol=0)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.npy"])
def test_a_full_disk_is_called_full_and_leaves_nothing(tmp_path, name, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(video._VideoFile, "put_pixels", full)
    monkeypatch.setattr(video._ArrayFile, "put", full)
    with pytest.raises(OptionError, match="its disk is full"):
        video.write_frames(tmp_path / name, torch.zeros(2, 32, 32, 3))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_really_full_is_called_full():
    for write in (video.write_video, video.write_npy):
        with pytest.raises(OptionError, match="its disk is full"), full_disk(video):
            write("clip.mp4", torch.rand(2, 32, 32, 3))


@contextmanager
def full_disk(module):
    """What is written goes to a device that is always full."""
    device = Path("/dev/full")
    if not device.exists():
        pytest.skip("this system has no /dev/full")

    @contextmanager
    def complete(path, *, keep=True):
        yield device

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_complete_file", complete)
        yield


def test_a_clip_of_the_models_rate_is_read_without_a_word(tmp_path, caplog):
    path = tmp_path / "clip.mp4"
    video.write_video(path, clip())
    video.read_clip(path)
    assert caplog.text == ""


def test_an_npy_file_gives_its_exact_numbers(tmp_path):
    path = tmp_path / "clip.npy"
    video.write_npy(path, clip())
    assert torch.equal(video.read_clip(path), clip())


def test_another_rate_and_sound_are_said_to_be_lost(tmp_path, caplog):
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        sound = container.add_stream("aac", rate=8000)
        for image in (clip(3) * 255).byte().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        silence = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        silence.sample_rate = 8000
        for each in (stream.encode(None), sound.encode(silence), sound.encode(None)):
            container.mux(each)
    assert len(video.read_clip(path)) == 3
    assert "30 frames per second, and the model makes 24" in caplog.text
    assert "sound of" in caplog.text


def test_reading_a_clip_can_be_stopped(tmp_path):
    path = tmp_path / "clip.mp4"
    video.write_video(path, clip())

    def check():
        raise Stopped

    with pytest.raises(Stopped):
        video.read_clip(path, check=check)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("notes.mp4", b"these are notes", "cannot be read as a video"),
        ("empty.mp4", b"", "cannot be read as a video"),
        ("notes.npy", b"these are notes", "not an array"),
    ],
)
def test_a_file_that_is_no_clip_is_refused(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(OptionError, match=words):
        video.read_clip(tmp_path / name)


def test_files_without_frames_are_refused(tmp_path):
    with pytest.raises(OptionError, match=r"no video file .*gone\.mp4"):
        video.read_clip(tmp_path / "gone.mp4")
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 64), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(OptionError, match="holds no video"):
        video.read_clip(sound)
    truncated = tmp_path / "cut.mp4"
    video.write_video(truncated, clip())
    truncated.write_bytes(truncated.read_bytes()[:-2000])
    with pytest.raises(OptionError, match="cannot be read|no frames"):
        video.read_clip(truncated)


@pytest.mark.parametrize(
    ("array", "error", "words"),
    [
        (np.zeros((5, 32, 48, 3)), OptionError, "float32"),
        (np.zeros((5, 3, 32, 48), np.float32), ShapeError, "frames, height, width, 3"),
        (np.array({"a": 1}, dtype=object), OptionError, "not an array"),
    ],
)
def test_an_npy_file_of_another_kind_is_refused(tmp_path, array, error, words):
    np.save(tmp_path / "clip.npy", array)
    with pytest.raises(error, match=words):
        video.read_clip(tmp_path / "clip.npy")


def test_a_clip_that_does_not_fit_the_memory_is_refused_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    video.write_video(path, clip(9))
    room = 2 * 5 * 3 * 32 * 48 * 4  # half of it holds four frames
    monkeypatch.setattr(video.TorchRuntime, "free_bytes", lambda self: room)
    with pytest.raises(ShapeError, match="more than 4 frames of 48x32.*cut it"):
        video.read_clip(path)


def test_without_pyav_a_clip_is_answered_with_the_command_that_installs_it(tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    video.write_video(path, clip())
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DependencyError, match="pip install av"):
        video.read_clip(path)


# --- the same frames make the same file


@pytest.mark.parametrize(("height", "width"), [(128, 64), (256, 32)])
def test_the_same_frames_make_the_same_bytes_whatever_memory_held_before(tmp_path, height, width):
    """With its macroblock tree x264 writes other bytes in a third of such runs."""
    ramp = torch.linspace(0, 0.6, width)[None, None, :, None]
    noise = torch.rand(13, height, width, 3, generator=torch.Generator().manual_seed(0))
    frames = ramp + 0.2 * noise
    files, random = set(), np.random.default_rng(0)
    for _ in range(12):
        dirty = [bytes([random.integers(256)]) * random.integers(1000, 400_000) for _ in range(40)]
        del dirty[::2]  # what x264 is given next was written to
        video.write_frames(tmp_path / "a.mp4", frames)
        files.add((tmp_path / "a.mp4").read_bytes())
    assert len(files) == 1


# --- files that are written while their frames are made


@pytest.mark.parametrize("name", ["a.mp4", "a.npy"])
def test_frames_that_come_in_groups_make_the_same_file(tmp_path, name):
    frames = clip(frames=13)
    (tmp_path / "whole").mkdir()
    video.write_frames(tmp_path / "whole" / name, frames)
    with video.open_frames(tmp_path / name, 13, 32, 48) as file:
        file.restart()
        file.write(frames[5:9])  # forgotten
        file.restart()
        for group in frames.split([1, 4, 8]):
            file.write(group)
        assert not (tmp_path / name).exists()
    assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [name, "whole"]


@pytest.mark.parametrize("error", [Stopped(), KeyboardInterrupt(), OSError("of a decode")])
@pytest.mark.parametrize("name", ["a.mp4", "a.npy"])
def test_a_clip_that_is_not_completed_leaves_the_old_file_and_no_part(tmp_path, name, error):
    (tmp_path / name).write_bytes(b"old")
    out = video.open_frames(tmp_path / name, 5, 32, 48)
    with pytest.raises(type(error)) as caught, out as file:
        file.restart()
        file.write(clip()[:3])
        raise error
    assert caught.value is error
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"old"


def test_what_the_thread_cannot_write_is_raised_at_the_next_frames_and_leaves_no_part(
    tmp_path, monkeypatch
):
    def fail(self, frames):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(video._ArrayFile, "put", fail)
    out = video.open_frames(tmp_path / "a.npy", 5, 32, 48)
    with (
        pytest.raises(OptionError, match=r"a\.npy cannot be written, because its disk is full"),
        out as file,
    ):
        file.restart()
        file.write(clip()[:3])
        file.write(clip()[3:])
        pytest.fail("was not told")
    assert list(tmp_path.iterdir()) == []


def test_at_most_two_groups_of_frames_exist(tmp_path, monkeypatch):
    alive = most = 0

    def gone() -> None:
        nonlocal alive
        alive -= 1

    with video.open_frames(tmp_path / "a.npy", 40, 32, 48) as file:
        file.restart()
        for _ in range(10):
            group = clip(frames=4)
            weakref.finalize(group, gone)
            alive += 1
            most = max(most, alive)
            file.write(group)
            del group
    assert most <= 3  # one is written and one is made; a thread lets go of its last one late

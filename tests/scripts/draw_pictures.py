"""Draw the pictures that the package ships; nothing in them comes from elsewhere (Apache-2.0).

    python tests/scripts/draw_pictures.py [FOLDER]

web/portrait.jpg is the first frame of every template that asks for a person; web/icon.png and
web/banner.jpg stand on the page of the registry, workflows/*.jpg in the template browser. The
shapes in them were made by the built-in model.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageEnhance, ImageFilter, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.workflows import ROOT, TITLES

#: of the portrait, in pixels; a size that the model was trained with
WIDTH, HEIGHT = 960, 544
#: everything is drawn this much larger and scaled down
SCALE = 2

Points = Sequence[tuple[float, float]]
Color = tuple[int, int, int]


def smooth(points: Points, per_part: int = 16) -> list[tuple[float, float]]:
    """A closed Catmull-Rom curve through points."""
    p = np.asarray(points, float)
    before, after, beyond = np.roll(p, 1, 0), np.roll(p, -1, 0), np.roll(p, -2, 0)
    t = np.linspace(0, 1, per_part, endpoint=False)[:, None, None]
    curve = 0.5 * (
        2 * p
        + (after - before) * t
        + (2 * before - 5 * p + 4 * after - beyond) * t**2
        + (3 * p - before - 3 * after + beyond) * t**3
    )
    return [tuple(point) for point in curve.transpose(1, 0, 2).reshape(-1, 2)]


def extent(mask: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns outside of which a mask is 0."""
    ranges = [np.flatnonzero(mask.any(axis)) for axis in (1, 0)]
    rows, columns = (slice(r[0], r[-1] + 1) if len(r) else slice(0) for r in ranges)
    return rows, columns


class Canvas:
    """A picture that shapes are laid on, from the back to the front; coordinates in its pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.size = (width * SCALE, height * SCALE)
        y, x = np.mgrid[0 : self.size[1], 0 : self.size[0]].astype(np.float32) / SCALE
        self.x, self.y = x, y
        self.pixels = np.zeros((*x.shape, 3), np.float32)

    def mask(self, points: Points, blur: float = 0.6, is_smooth: bool = True) -> np.ndarray:
        """[H, W] in 0..1, 1 inside of a closed curve."""
        curve = smooth(points) if is_smooth else points
        image = Image.new("L", self.size)
        ImageDraw.Draw(image).polygon([(x * SCALE, y * SCALE) for x, y in curve], fill=255)
        image = image.filter(ImageFilter.GaussianBlur(blur * SCALE))
        return np.asarray(image, np.float32) / 255

    def ellipse(self, x: float, y: float, width: float, height: float, blur: float) -> np.ndarray:
        """[H, W] in 0..1, 1 inside of an ellipse."""
        image = Image.new("L", self.size)
        box = [v * SCALE for v in (x - width / 2, y - height / 2, x + width / 2, y + height / 2)]
        ImageDraw.Draw(image).ellipse(box, fill=255)
        image = image.filter(ImageFilter.GaussianBlur(blur * SCALE))
        return np.asarray(image, np.float32) / 255

    def line(self, points: Points, width: float, blur: float) -> np.ndarray:
        """[H, W] in 0..1, 1 on an open polyline."""
        image = Image.new("L", self.size)
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        ImageDraw.Draw(image).line(scaled, fill=255, width=round(width * SCALE), joint="curve")
        image = image.filter(ImageFilter.GaussianBlur(blur * SCALE))
        return np.asarray(image, np.float32) / 255

    def paint(self, mask: np.ndarray, color: Color | np.ndarray, strength: float = 1.0) -> None:
        """Cover with a colour, or with a picture of colours."""
        part = extent(mask)
        alpha = (mask[part] * strength)[..., None]
        color = np.asarray(color, np.float32)
        color = color[part] if color.ndim == 3 else color
        self.pixels[part] = self.pixels[part] * (1 - alpha) + color * alpha

    def glow(self, mask: np.ndarray, color: Color, strength: float) -> None:
        """Add light."""
        part = extent(mask)
        self.pixels[part] += mask[part][..., None] * np.asarray(color, np.float32) * strength

    def blend(self, top: Color, bottom: Color, from_y: float, to_y: float) -> np.ndarray:
        """Colours that go from one at a height to another."""
        t = np.clip((self.y - from_y) / (to_y - from_y), 0, 1)[..., None]
        return np.asarray(top, np.float32) * (1 - t) + np.asarray(bottom, np.float32) * t

    def image(self) -> Image.Image:
        """The picture at its own size."""
        large = Image.fromarray(np.clip(self.pixels, 0, 255).astype(np.uint8))
        return large.resize((self.size[0] // SCALE, self.size[1] // SCALE), Image.LANCZOS)


def curve(points: Points) -> list[tuple[float, float]]:
    """An open curve through three points: start, a point it bends towards, end."""
    (ax, ay), (bx, by), (cx, cy) = points
    ts = np.linspace(0, 1, 24)
    return [
        ((1 - t) ** 2 * ax + 2 * t * (1 - t) * bx + t * t * cx,
         (1 - t) ** 2 * ay + 2 * t * (1 - t) * by + t * t * cy)
        for t in ts
    ]  # fmt: skip


def evening(canvas: Canvas, seed: int = 3) -> None:
    """Sky, a low sun at the left, hills and lights out of focus."""
    x, y = canvas.x, canvas.y
    height = canvas.size[1] / SCALE
    sky = canvas.blend((38, 52, 98), (236, 158, 108), 0, 0.8 * height)
    canvas.paint(np.ones_like(x), sky)
    sun = np.exp(-(((x - 150) / 300) ** 2) - ((y - 0.62 * height) / 170) ** 2)
    canvas.glow(sun, (120, 80, 20), 1.0)
    canvas.paint(canvas.ellipse(150, 0.63 * height, 96, 96, 7), (255, 226, 160), 0.95)
    for level, color, waves in ((0.70, (112, 82, 104), 130.0), (0.80, (66, 56, 84), 190.0)):
        edge = level * height + 18 * np.sin(x / waves + level * 9) + 9 * np.sin(x / 47 + level)
        canvas.paint(np.clip((y - edge) / 9 + 0.5, 0, 1), color, 0.92)
    draw = np.random.default_rng(seed)
    width = canvas.size[0] / SCALE
    for _ in range(34):
        at = draw.uniform(0, width), draw.uniform(0.66, 0.98) * height
        size = draw.uniform(8, 30)
        color = ((255, 206, 130), (255, 166, 110), (150, 190, 235))[draw.integers(3)]
        canvas.paint(canvas.ellipse(*at, size, size, 1.6), color, draw.uniform(0.10, 0.42))


def woman(canvas: Canvas, cx: float) -> None:
    """Head and shoulders of a woman in a green coat, lit from the left by the evening sun."""
    x, y = canvas.x, canvas.y

    def at(points: Points) -> list[tuple[float, float]]:
        return [(cx + px, py) for px, py in points]

    # hair behind the head, blown to the right
    hair = (44, 27, 28)
    back = at([(-112, 150), (-92, 70), (-20, 36), (62, 50), (112, 110), (134, 190), (172, 262),
               (216, 316), (150, 330), (96, 344), (-70, 340), (-110, 300),
               (-124, 226)])  # fmt: skip
    canvas.paint(canvas.mask(back, 1.4), hair)
    for bend in range(9):
        strand = curve(at([(96, 150 + 14 * bend), (130 + 4 * bend, 220 + 10 * bend),
                           (190 + 9 * bend, 262 + 8 * bend)]))  # fmt: skip
        canvas.paint(canvas.line(strand, 5 - 0.3 * bend, 1.0), hair, 0.85)

    # light of the sun along the left edge
    rim = canvas.mask(back, 2) - canvas.mask([(px + 7, py) for px, py in back], 4)
    canvas.glow(np.clip(rim, 0, 1) * (x < cx - 60), (255, 170, 96), 0.6)

    # coat
    coat = at([(-96, 410), (-190, 440), (-262, 486), (-300, 590), (300, 590), (268, 490),
               (196, 440), (98, 410), (0, 420)])  # fmt: skip
    side = np.clip((x - (cx - 270)) / 540, 0, 1)[..., None]
    cloth = np.float32((64, 138, 92)) * (1 - side) + np.float32((18, 66, 54)) * side
    folds = 9 * np.sin((x - cx) / 21 + y / 34)[..., None]
    canvas.paint(canvas.mask(coat, 1.0), cloth + folds)
    rim = canvas.mask(coat, 2) - canvas.mask([(px + 7, py + 4) for px, py in coat], 5)
    canvas.glow(np.clip(rim, 0, 1) * (x < cx - 60), (255, 180, 110), 0.5)

    # neck
    neck = at([(-44, 300), (-46, 372), (-74, 424), (0, 470), (74, 424), (48, 372), (46, 300)])
    canvas.paint(canvas.mask(neck, 1.0), canvas.blend((176, 116, 92), (214, 152, 122), 330, 430))
    canvas.paint(canvas.mask(at([(-46, 330), (0, 372), (48, 326), (50, 352), (0, 398), (-48, 356)]),
                             6), (120, 70, 62), 0.6)  # fmt: skip
    # light pullover and lapels
    knit = at([(-70, 418), (-34, 452), (0, 466), (36, 452), (70, 418), (60, 590), (-60, 590)])
    canvas.paint(canvas.mask(knit, 1.0), canvas.blend((240, 224, 200), (196, 172, 150), 420, 560))
    for mirror in (-1, 1):
        lapel = at([(mirror * px, py) for px, py in
                    [(70, 404), (118, 416), (150, 470), (84, 520), (40, 590), (26, 590),
                     (44, 500), (52, 450)]])  # fmt: skip
        canvas.paint(canvas.mask(lapel, 5), (6, 26, 22), 0.45)
        lapel = [(px, py - 3) for px, py in lapel]
        canvas.paint(canvas.mask(lapel, 1.0), (74, 150, 102) if mirror < 0 else (32, 92, 72))

    # face: an oval, warm on the left, cooler on the right
    face = at([(-84, 168), (-70, 108), (0, 88), (70, 108), (84, 168), (80, 236), (56, 294),
               (22, 326), (0, 331), (-22, 326), (-56, 294), (-80, 236)])  # fmt: skip
    mask = canvas.mask(face, 1.2)
    turn = np.clip((x - (cx - 84)) / 168, 0, 1)[..., None] ** 1.3
    skin = np.float32((250, 200, 166)) * (1 - turn) + np.float32((196, 132, 110)) * turn
    canvas.paint(mask, skin - 22 * np.clip((y - 250) / 90, 0, 1)[..., None])
    for side_x, strength in ((-46, 0.34), (44, 0.26)):
        canvas.paint(canvas.ellipse(cx + side_x, 246, 54, 40, 13) * mask, (232, 116, 100), strength)

    # eyes
    for mirror in (-1, 1):
        ex, ey = cx + mirror * 35, 202
        canvas.paint(canvas.ellipse(ex, ey - 6, 58, 34, 8) * mask, (150, 88, 78), 0.42)
        eye = [(ex - 22, ey + 2), (ex - 10, ey - 9), (ex + 6, ey - 10), (ex + 22, ey + 1),
               (ex + 8, ey + 9), (ex - 9, ey + 9)]  # fmt: skip
        opening = canvas.mask(eye, 0.6)
        canvas.paint(opening, (247, 240, 234))
        canvas.paint(canvas.ellipse(ex + 2, ey - 1, 21, 21, 0.7) * opening, (84, 112, 70))
        canvas.paint(canvas.ellipse(ex + 2, ey - 1, 10, 10, 0.6) * opening, (20, 16, 18))
        canvas.paint(canvas.ellipse(ex - 2, ey - 5, 5, 5, 0.5), (255, 255, 255), 0.95)
        canvas.paint(canvas.mask([(ex - 23, ey - 2), (ex, ey - 16), (ex + 23, ey - 3),
                                  (ex, ey - 5)], 1.4) * opening, (60, 34, 34), 0.5)  # fmt: skip
        lid = curve([(ex - 23, ey + 2), (ex - 2, ey - 21), (ex + 23, ey)])
        canvas.paint(canvas.line(lid, 3.6, 0.7), (48, 26, 26))
        flick = [(ex + 22, ey + 1), (ex + 29, ey - 6)]
        if mirror < 0:
            flick = [(ex - 22, ey + 2), (ex - 29, ey - 5)]
        canvas.paint(canvas.line(flick, 3.0, 0.7), (48, 26, 26))
        brow = curve([(ex - 27, ey - 27 + 3 * (mirror < 0)), (ex, ey - 42),
                      (ex + 27, ey - 27 + 3 * (mirror > 0))])  # fmt: skip
        canvas.paint(canvas.line(brow, 6.5, 1.3), (60, 36, 34), 0.9)

    # nose
    bridge = curve([(cx + 11, 196), (cx + 17, 232), (cx + 19, 256)])
    canvas.paint(canvas.line(bridge, 9, 5) * mask, (150, 88, 76), 0.42)
    canvas.paint(canvas.ellipse(cx + 1, 257, 34, 15, 5) * mask, (176, 104, 88), 0.45)
    canvas.paint(canvas.ellipse(cx - 3, 247, 13, 17, 5) * mask, (255, 226, 200), 0.65)
    for nostril in (-10, 11):
        canvas.paint(canvas.ellipse(cx + nostril, 261, 9, 5, 1.4), (110, 56, 52), 0.75)

    # a smile
    lips = at([(-31, 287), (-14, 283), (-5, 281), (0, 283), (6, 281), (15, 283), (32, 286),
               (19, 300), (1, 306), (-18, 301)])  # fmt: skip
    canvas.paint(canvas.mask(lips, 0.8), canvas.blend((176, 66, 70), (214, 98, 96), 284, 304))
    teeth = at([(-23, 288), (0, 288), (24, 287), (12, 294), (0, 296), (-12, 294)])
    canvas.paint(canvas.mask(teeth, 0.7), (250, 240, 232))
    canvas.paint(canvas.ellipse(cx, 303, 22, 5, 2.4), (255, 190, 180), 0.5)
    for corner in (-34, 35):
        canvas.paint(canvas.ellipse(cx + corner, 286, 7, 9, 2.6), (150, 84, 72), 0.55)
    canvas.paint(canvas.ellipse(cx, 316, 34, 7, 5) * mask, (170, 102, 86), 0.35)

    # hair over the forehead, parted, and down the left side
    left = at([(-8, 70), (14, 92), (-24, 120), (-58, 156), (-78, 214), (-84, 296), (-112, 338),
               (-126, 250), (-116, 150), (-78, 78)])  # fmt: skip
    right = at([(-10, 68), (40, 62), (92, 106), (110, 180), (118, 262), (128, 330), (92, 322),
                (84, 250), (80, 190), (58, 138), (26, 106), (2, 92)])  # fmt: skip
    for lock in (left, right):
        canvas.paint(canvas.mask(lock, 1.0), hair)
    for number in range(7):
        bend = number / 6
        shine = curve(
            at(
                [
                    (-18 - 6 * number, 80 + 3 * number),
                    (-66 - 20 * bend, 130 + 20 * bend),
                    (-88 - 22 * bend, 260 + 40 * bend),
                ]
            )
        )
        canvas.paint(canvas.line(shine, 2.4, 1.4), (150, 92, 66), 0.34)
        shine = curve(at([(8 + 9 * number, 74 + 4 * number), (84 + 16 * bend, 112 + 20 * bend),
                          (96 + 18 * bend, 240 + 50 * bend)]))  # fmt: skip
        canvas.paint(canvas.line(shine, 2.0, 1.4), (104, 64, 54), 0.34)
    # strands in the wind
    for number in range(6):
        strand = curve(at([(100, 150 + 24 * number), (128 + 4 * number, 228 + 16 * number),
                           (206 + 7 * number, 250 + 19 * number)]))  # fmt: skip
        canvas.paint(canvas.line(strand, 2.2, 0.8), hair, 0.7)


@cache
def portrait(width: int = WIDTH, height: int = HEIGHT, cx: float = 520) -> Image.Image:
    """A woman in a green coat in front of an evening sky."""
    canvas = Canvas(width, height)
    evening(canvas)
    woman(canvas, cx)
    grain = np.random.default_rng(0).normal(0, 1.6, canvas.x.shape)
    canvas.pixels += grain[..., None].astype(np.float32)
    return canvas.image()


def write(image: Image.Image, text: str, x: float, y: float, size: int, color: Color) -> None:
    """Text of one line, its top left corner at x, y."""
    ImageDraw.Draw(image).text((x, y), text, color, ImageFont.load_default(size))


def shade(image: Image.Image, height: int) -> None:
    """Darken the lowest rows of a picture, where a title will be."""
    dark = np.linspace(0, 0.86, height)[:, None] ** 0.7 * np.ones((1, image.width))
    mask = Image.fromarray((255 * dark).astype(np.uint8))
    image.paste((12, 14, 26), (0, image.height - height), mask)


def play_sign(image: Image.Image, x: float, y: float, size: float) -> None:
    """A disc with a triangle, as players have it."""
    large = Image.new("RGBA", (image.width * SCALE, image.height * SCALE))
    draw = ImageDraw.Draw(large)
    x, y, size = x * SCALE, y * SCALE, size * SCALE
    draw.ellipse((x - size, y - size, x + size, y + size), fill=(12, 14, 26, 150))
    half = size * 0.42
    draw.polygon([(x - 0.8 * half, y - half), (x - 0.8 * half, y + half), (x + 1.1 * half, y)],
                 fill=(255, 255, 255, 235))  # fmt: skip
    small = large.resize(image.size, Image.LANCZOS)
    image.paste(small, (0, 0), small)


# --- for the registry ---------------------------------------------------------------------------


def icon() -> Image.Image:
    """400x400: the portrait as a clip."""
    image = portrait().crop((295, 15, 745, 465)).resize((400, 400), Image.LANCZOS)
    play_sign(image, 322, 322, 52)
    return image


def banner() -> Image.Image:
    """1260x540, 21:9: the portrait and what it is for."""
    image = portrait(1260, 540, 930)
    dark = np.linspace(0.72, 0, 800)[None] * np.ones((540, 1))
    image.paste((16, 16, 34), (0, 0), Image.fromarray((255 * dark).astype(np.uint8)))
    write(image, "SkyReels V1", 60, 150, 92, (255, 255, 255))
    write(image, "a picture and a prompt become a video", 64, 262, 31, (255, 240, 222))
    write(image, "on your GPU  ·  on wiro.ai  ·  in ComfyUI", 64, 306, 31, (255, 240, 222))
    return image


# --- thumbnails of the templates ----------------------------------------------------------------

#: pixels of a thumbnail
CARD = 640


def card(image: Image.Image, title: str, line: str) -> Image.Image:
    """A square thumbnail: a title and a line below; the page lays a badge on the upper left."""
    shade(image, 220)
    write(image, title, 30, 508, 56, (255, 255, 255))
    write(image, line, 32, 582, 29, (226, 228, 240))
    return image


def person(title: str, line: str) -> Image.Image:
    """The card of a template whose first frame is the portrait."""
    image = portrait().crop((248, 0, 792, 544)).resize((CARD, CARD), Image.LANCZOS)
    play_sign(image, 86, 400, 46)
    return card(image, title, line)


def text_only(title: str, line: str) -> Image.Image:
    """The card of text to video: no picture is given, so the words are shown."""
    canvas = Canvas(CARD, CARD)
    evening(canvas)
    image = canvas.image().point(lambda value: 0.72 * value)
    for number, words in enumerate(('"A woman in a', "green coat turns", 'and smiles ..."')):
        write(image, words, 60, 170 + 66 * number, 54, (255, 250, 240))
    return card(image, title, line)


def several(title: str, line: str) -> Image.Image:
    """The card of a batch: four pictures, a clip of each."""
    image = Image.new("RGB", (CARD, CARD), (24, 26, 40))
    first = portrait().crop((248, 0, 792, 544)).resize((196, 196), Image.LANCZOS)
    for number in range(4):
        colors = np.asarray(first.convert("HSV")).copy()
        is_coat = (abs(colors[..., 0].astype(int) - 108) < 24) & (colors[..., 1] > 70)
        colors[..., 0][is_coat] += np.uint8(64 * number)
        picture = Image.fromarray(colors, "HSV").convert("RGB")
        play_sign(picture, 30, 166, 18)
        image.paste(picture, (120 + 204 * (number % 2), 92 + 204 * (number // 2)))
    return card(image, title, line)


def halves(title: str, line: str, labels: tuple[str, str] = ("here", "on Wiro")) -> Image.Image:
    """The card of a comparison: one picture in two halves."""
    image = person(title, line)
    right = ImageEnhance.Color(image.crop((320, 0, CARD, 496))).enhance(0.45)
    image.paste(right, (320, 0))
    ImageDraw.Draw(image).line((320, 0, 320, 496), (255, 255, 255), 4)
    write(image, labels[0], 200, 440, 36, (255, 255, 255))
    write(image, labels[1], 350, 440, 36, (255, 255, 255))
    return image


def thirds(title: str, line: str) -> Image.Image:
    """The card of two backends: a clip of each and their difference, side by side."""
    here = portrait().crop((413, 20, 627, 416))
    there = ImageEnhance.Color(portrait().crop((410, 22, 624, 418))).enhance(0.55)
    image = Image.new("RGB", (CARD, CARD), (12, 14, 26))
    image.paste(here, (0, 90))
    image.paste(there, (213, 90))
    image.paste(ImageEnhance.Brightness(ImageChops.difference(here, there)).enhance(3), (426, 90))
    for x in (213, 426):
        ImageDraw.Draw(image).line((x, 90, x, 485), (255, 255, 255), 3)
    for number, label in enumerate(("here", "on Wiro", "difference")):
        write(image, label, 14 + 213 * number, 100, 28, (255, 255, 255))
    return card(image, title, line)


def shapes(title: str, line: str, *clips: tuple[str, np.ndarray]) -> Image.Image:
    """The card of a template of the built-in model: frames [F, 64, 64, 3] that it made."""
    image = Image.new("RGB", (CARD, CARD), (24, 26, 40))
    size = 296 if len(clips) == 1 else 140
    for row, (prompt, frames) in enumerate(clips):
        top = 100 + 200 * row
        write(image, f'"{prompt}"', 32, top - 6, 25, (255, 210, 160))
        count = 2 if len(clips) == 1 else 4
        for number, at in enumerate(np.linspace(0, len(frames) - 1, count).round().astype(int)):
            picture = Image.fromarray((255 * frames[at]).round().astype(np.uint8))
            picture = picture.resize((size, size), Image.BICUBIC)
            image.paste(picture, (24 + number * (size + 10 if count == 2 else 150), top + 38))
    return card(image, title, line)


def built_in_clips() -> tuple[np.ndarray, np.ndarray]:
    """The clip of the quick start, and its continuation, as the built-in model makes them."""
    picture = Image.new("RGB", (64, 64), (0x20, 0x30, 0x60))
    picture.paste((0xE0, 0x30, 0x30), (38, 22, 58, 42))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        picture.save(folder / "picture.png")

        def generate(prompt: str, out: str, *inputs: str) -> np.ndarray:
            command = [sys.executable, "-m", "skyreels", "generate", *inputs, "--prompt", prompt,
                       "--frames", "17", "--out", str(folder / out)]  # fmt: skip
            subprocess.run(command, check=True, cwd=ROOT)
            return np.load(folder / out)

        first = generate("a red square moves left", "1.npy", str(folder / "picture.png"))
        both = generate("a red square moves down", "2.npy", "--extend", str(folder / "1.npy"))
    return first, both[len(first) :]


def thumbnails() -> dict[str, Image.Image]:
    """Template -> thumbnail."""
    left, down = built_in_clips()
    moves_left, moves_down = ("a red square moves left", left), ("moves down", down)
    return {
        "quick_start": shapes("Quick start", "built-in model, nothing to download", moves_left),
        "extend_video": shapes("Extend a video", "a clip, and what comes next", moves_left,
                               moves_down),
        "core_samplers": shapes("Core samplers", "SkyReels in KSampler", moves_left),
        "local_bf16": person("Image to video", "exact bf16, 24 GB card"),
        "local_low_memory": person("Image to video", "8-bit file, 12 GB card"),
        "local_gguf": person("Image to video", "GGUF file, 8 GB card"),
        "local_few_steps": person("Few steps, LoRA", "6 steps instead of 30"),
        "local_text_to_video": text_only("Text to video", "no picture, 12 GB card"),
        "remote": person("On Wiro", "no graphics card; costs money"),
        "wiro_batch": several("Many on Wiro", "a video of each picture; costs money"),
        "local_and_remote": halves("Here and on Wiro", "the same job, side by side; costs money"),
        "compare": thirds("One node", "here and on Wiro; costs money"),
    }  # fmt: skip


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    for folder in ("web", "workflows"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    portrait().save(root / "web" / "portrait.jpg", quality=93)
    icon().save(root / "web" / "icon.png", optimize=True)
    banner().save(root / "web" / "banner.jpg", quality=88)
    for name, image in thumbnails().items():
        image.save(root / "workflows" / f"{TITLES.get(name, name)}.jpg", quality=85)


if __name__ == "__main__":
    main()

"""What a shape did, read from the pixels of a clip.

The yardstick knows the empty ground and the shape's colour of its own clips. So how much of a pixel
is shape is the pixel's place on the line between the two, 0 at the ground and 1 at the shape; what
lies beside that line (wrong colours) counts less. Centre, size and opacity follow from that map.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import data

#: pixels of the centre beyond which a shape has moved
MOVED = 4.0
#: size, as a ratio of areas, beyond which it has grown or shrunk; true ones are 2.56 and 0.25
GREW, SHRANK = 1.4, 0.7
#: share of its opacity below which it has faded
FADED = 0.5
#: area of a shape of size 1, by shape
AREAS = torch.tensor([3.1416, 3.1684, 2.6937])


@dataclass(frozen=True)
class Case:
    """One clip asked for. scene: of one clip. prompt: what the model is told. size: of the clip."""

    scene: data.Scenes
    prompt: str
    size: data.Format = data.SMALL

    @property
    def verb(self) -> str:
        """What the shape shall do."""
        return data.VERBS[int(self.scene.verb[0])]

    def truth(
        self, frames: int | None = None, width: int | None = None, height: int | None = None
    ) -> Tensor:
        """[F, H, W, 3] in 0..1: the clip as it should be; of the case's size unless said."""
        video = data.render(
            self.scene, frames=frames or self.size.frames, width=width or self.size.size,
            height=height or self.size.size,
        )  # fmt: skip
        return (video[0] / 2 + 0.5).permute(1, 2, 3, 0).contiguous()

    def told(self, verb: str) -> "Case":
        """The same picture with another verb, in the plainest words."""
        scene = self.scene.with_verb(torch.tensor([data.VERBS.index(verb)]))
        return Case(scene, data.plain_prompt(*(int(n) for n in _what(scene))), self.size)

    def measured(self, clip: Tensor) -> "Finding":
        """What the shape did in [F, H, W, 3] in 0..1; pixels are those of clips of 64x64."""
        space = self.size.space
        if space == 1:
            return measure(clip, self.scene)
        clip = F.avg_pool2d(clip.permute(0, 3, 1, 2), space).permute(0, 2, 3, 1)
        return measure(clip, self.scene.magnified(1 / space))


@dataclass(frozen=True)
class Finding:
    """What happened between the first and the last frame.

    verb: as in data.VERBS. shift: x and y in pixels. growth: ratio of areas. opacity: ratio.
    colour, shape: of the last frame, names; "none" where nothing is left.
    """

    verb: str
    shift: tuple[float, float]
    growth: float
    opacity: float
    colour: str
    shape: str


def _what(scene: data.Scenes) -> tuple[Tensor, Tensor, Tensor]:
    return scene.colour[0], scene.shape[0], scene.verb[0]


def held_out_cases(
    count: int, seed: int = 11, width: int = data.SIZE, height: int = data.SIZE,
    size: data.Format = data.SMALL,
) -> list[Case]:  # fmt: skip
    """Balanced over the verbs; the shape has room to move either way and to grow.

    Args:
        size: that the cases, drawn as they are for the built-in model, are magnified to.
    """
    generator = torch.Generator().manual_seed(seed)
    per_verb = -(-count // len(data.VERBS))
    found: dict[int, list[Case]] = {verb: [] for verb in range(len(data.VERBS))}
    while any(len(cases) < per_verb for cases in found.values()):
        scenes = data.draw_scenes(64, generator, held_out=True, width=width, height=height, room=1)
        prompts = data.write_prompts(scenes, generator, wrong=0.0)
        for index, prompt in enumerate(prompts):
            scene = scenes.take(slice(index, index + 1))
            cases = found[int(scene.verb[0])]
            if len(cases) < per_verb and _has_room(scene, width, height):
                cases.append(Case(scene.magnified(size.space, size.time), prompt, size))
    by_turns = [case for row in zip(*found.values(), strict=True) for case in row]
    return by_turns[:count]


def _has_room(scene: data.Scenes, width: int, height: int) -> bool:
    reach = data.REACH[scene.shape[0]] * scene.size[0] * data.GROWTH
    x, y = scene.centre[0].tolist()
    left, right, up, down = reach.tolist()
    grows = x >= left and x + right <= width and y >= up and y + down <= height
    verb = data.VERBS[int(scene.verb[0])]
    if verb not in data.DIRECTIONS:
        return grows
    back = torch.tensor(data.DIRECTIONS[verb]) * -8.0  # the opposite verb has a place to go too
    reach = reach / data.GROWTH
    x, y = x + float(back[0]), y + float(back[1])
    return bool(
        x >= reach[0] and x + reach[1] <= width and y >= reach[2] and y + reach[3] <= height
    )


def opacity_map(clip: Tensor, scene: data.Scenes) -> Tensor:
    """How much of each pixel is shape.

    Args:
        clip: [F, H, W, 3] in 0..1.
    Returns:
        [F, H, W] about 0..1; noise of the ground is cut off below 0.2.
    """
    height, width = clip.shape[1:3]
    nothing = replace(scene, size=torch.tensor([-100.0]))
    still = nothing.with_verb(torch.tensor([data.VERBS.index("still")]))
    ground = data.render(still, frames=1, width=width, height=height)[0, :, 0].permute(1, 2, 0)
    ground = ground / 2 + 0.5
    line = scene.rgb[0] - ground
    offset = clip - ground
    along = (offset * line).sum(-1) / line.square().sum(-1)
    beside = (offset - along[..., None] * line).norm(dim=-1) / line.norm(dim=-1)
    raw = (along - 0.5 * beside).clamp(0, 1.2)
    return ((raw - 0.2) / 0.8).clamp(0, 1)


def measure(clip: Tensor, scene: data.Scenes) -> Finding:
    """Find out what the shape of a clip did.

    Args:
        clip: [F, H, W, 3] in 0..1. scene: its picture; the verb in it is not looked at.
    """
    opacity = opacity_map(clip[[0, -1]], scene)
    area = float(AREAS[scene.shape[0]] * scene.size[0] ** 2)
    first, last = _describe(opacity[0], area), _describe(opacity[-1], area)
    growth = last.area / max(first.area, 1.0)
    fading = last.opacity / max(first.opacity, 1e-3)
    shift = tuple((last.centre - first.centre).tolist())
    far, near = sorted((abs(shift[0]), abs(shift[1])), reverse=True)
    if fading < FADED:
        verb = "fade"
    elif growth > GREW:
        verb = "grow"
    elif growth < SHRANK:
        verb = "shrink"
    elif far > MOVED and near < far / 2:
        across = abs(shift[0]) > abs(shift[1])
        verb = ("right" if shift[0] > 0 else "left") if across else "down" if shift[1] > 0 else "up"
    else:
        verb = "still" if far <= MOVED else "askew"
    colour, shape = _recognise(clip[-1], opacity[-1], last, scene)
    return Finding(verb, (shift[0], shift[1]), growth, fading, colour, shape)


@dataclass(frozen=True)
class _Shape:
    """centre: [2] pixels. area: pixels if it were opaque. opacity: of its most opaque part."""

    centre: Tensor
    area: float
    opacity: float


def _describe(opacity: Tensor, area: float) -> _Shape:
    height, width = opacity.shape
    total = opacity.sum().clamp_min(1e-6)
    x = (opacity.sum(0) * (torch.arange(width) + 0.5)).sum() / total
    y = (opacity.sum(1) * (torch.arange(height) + 0.5)).sum() / total
    # an eighth of the area at the start: also a shape of half the size has that many pixels inside
    strongest = float(opacity.flatten().topk(max(4, int(area / 8))).values.mean())
    return _Shape(torch.stack([x, y]), float(total) / max(strongest, 0.05), strongest)


def _recognise(
    frame: Tensor, opacity: Tensor, found: _Shape, scene: data.Scenes
) -> tuple[str, str]:
    """The nearest colour of the palette, and the shape that covers best what is there."""
    if found.opacity < 0.3:
        return "none", "none"
    inside = opacity > 0.7 * found.opacity
    mean = frame[inside].mean(0)
    palette = torch.tensor(list(data.COLOURS.values()))
    colour = list(data.COLOURS)[int((palette - mean).norm(dim=1).argmin())]
    solid = (opacity / found.opacity).clamp(0, 1)
    reach = 1.1 * float(found.area) ** 0.5 + 4  # of the largest shape that is tried, blurred
    rows, columns = (
        _span(solid.any(axis), float(found.centre[1 - place]), reach)
        for place, axis in ((0, 1), (1, 0))
    )
    x = (torch.arange(columns.start, columns.stop) + 0.5)[None]
    y = (torch.arange(rows.start, rows.stop) + 0.5)[None]
    solid = solid[rows, columns]
    shifts = torch.cartesian_prod(*(torch.linspace(-1, 1, 5),) * 2)
    scores = []
    for shape in range(len(data.SHAPES)):
        size = (found.area / AREAS[shape]).sqrt() * torch.linspace(0.85, 1.15, 7)
        centre = (found.centre + shifts).repeat_interleave(len(size), 0)[:, None]
        which = torch.full((len(centre),), shape)
        drawn = data.coverage(which, centre, size.repeat(len(shifts))[:, None], x, y)
        soft = F.avg_pool2d(F.avg_pool2d(drawn, 3, 1, 1), 3, 1, 1)
        # the shape is asked for here, not its sharpness: the errors tell that
        overlaps = (
            torch.minimum(drawing, solid).sum((1, 2, 3))
            / torch.maximum(drawing, solid).sum((1, 2, 3))
            for drawing in (drawn, soft)
        )
        scores.append(max(float(overlap.max()) for overlap in overlaps))
    best = scores.index(max(scores))
    return colour, data.SHAPES[best] if scores[best] > 0.5 else "none"


def _span(is_there: Tensor, centre: float, reach: float) -> slice:
    """The rows or columns that hold something, and those around a centre."""
    places = is_there.nonzero().flatten().tolist()
    start = min([int(centre - reach), *places[:1]])
    stop = max([int(centre + reach) + 1, *(place + 1 for place in places[-1:])])
    return slice(max(start, 0), min(stop, len(is_there)))


def psnr(clip: Tensor, truth: Tensor) -> float:
    """Decibels of two clips in 0..1."""
    return float(-10 * (clip - truth).square().mean().clamp_min(1e-10).log10())


def flicker(clip: Tensor, case: Case) -> float:
    """Root mean square change of the ground from frame to frame, in steps of 1/255.

    Only pixels that the shape, as told, never touches.
    """
    truth = case.truth(*clip.shape[:1], clip.shape[2], clip.shape[1])
    empty = (truth - truth[:1]).abs().amax((0, 3)) < 1e-4
    empty &= opacity_map(truth[:1], case.scene)[0] == 0
    return float(clip.diff(dim=0)[:, empty].square().mean().sqrt() * 255)


def seam(clip: Tensor, case: Case, every: int) -> float:
    """How much larger the error's step is across tile borders than elsewhere; 1 is no seam.

    Args:
        every: distance of the borders in pixels.
    """
    error = clip - case.truth(*clip.shape[:1], clip.shape[2], clip.shape[1])
    steps = error.diff(dim=2).abs().mean((0, 1, 3))
    border = torch.arange(1, clip.shape[2]) % every == 0
    return float(steps[border].mean() / steps[~border].mean().clamp_min(1e-6))

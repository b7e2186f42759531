"""Procedural clips and their prompts: one coloured shape on a plain or smoothly shaded background.

Everything is drawn from a generator that is handed in, so a seed gives the same clips everywhere.
Pixels are computed from signed distances, one pixel of soft edge; nothing is downloaded or stored.

Held out: 32 of the 192 combinations of colour, shape and verb, four for every verb. No prompt that
names one is ever seen in training. Clips of them are: by the transformer under prompts that do not
say so ("it moves left") or that name another colour and shape, as otherwise it learns that a white
circle is the one thing that never moves left, and makes a square of it (kept its shape: 48 % of
held-out cases against 81 % of others); and by the VAE when it goes on (vae.py), as one that has
never seen a small green square has no latents for it.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

SIZE, FRAMES = 64, 17
COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.70, 0.15),
    "blue": (0.10, 0.20, 0.90),
    "yellow": (0.95, 0.90, 0.10),
    "magenta": (0.90, 0.10, 0.85),
    "cyan": (0.10, 0.85, 0.90),
    "white": (0.97, 0.97, 0.97),
    "orange": (1.00, 0.55, 0.05),
}
SHAPES = ("circle", "square", "triangle")
VERBS = ("left", "right", "up", "down", "still", "grow", "shrink", "fade")
#: (x, y) steps of a frame, in units of the speed; y points down
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
#: pixels a frame
SPEED = 1.5
#: size at the end of a clip over the size at its start
GROWTH, SHRINKAGE = 1.6, 0.5
#: reach from the centre to the left, right, top and bottom, in units of the size; by shape
REACH = torch.tensor([[1.0] * 4, [0.89] * 4, [1.247, 1.247, 1.44, 0.72]])


@dataclass(frozen=True)
class Format:
    """A size of clips: drawn as 64x64x17, then magnified in space and time."""

    space: int = 1
    time: int = 1

    @property
    def size(self) -> int:
        """Width and height in pixels."""
        return self.space * SIZE

    @property
    def frames(self) -> int:
        """Frames of a clip."""
        return self.time * (FRAMES - 1) + 1

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens in time, height and width."""
        return (self.frames - 1) // 4 + 1, self.size // 16, self.size // 16


#: of the built-in model (80 tokens) and of the second yardstick (192x192, 33 frames: 1,296 tokens)
SMALL, LARGE = Format(), Format(space=3, time=2)


@dataclass(frozen=True)
class Scenes:
    """A batch of B clips as numbers.

    colour, shape, verb: [B] int64, places in COLOURS, SHAPES and VERBS.
    centre: [B, 2] x and y in pixels at the start. size: [B] pixels, the radius of the circle.
    rgb: [B, 3] of the shape, 0..1. base, across, down: [B, 3] colour at the centre of the picture
        and its change over the picture's width and height.
    speed: [B] pixels a frame, of shapes that move.
    """

    colour: Tensor
    shape: Tensor
    verb: Tensor
    centre: Tensor
    size: Tensor
    rgb: Tensor
    base: Tensor
    across: Tensor
    down: Tensor
    speed: Tensor

    def __len__(self) -> int:
        return len(self.colour)

    def take(self, index: Tensor | slice) -> "Scenes":
        """Some of the clips."""
        return Scenes(*(getattr(self, field.name)[index] for field in fields(self)))

    def to(self, device: torch.device) -> "Scenes":
        """The same clips, to be drawn on a device."""
        return Scenes(*(getattr(self, field.name).to(device) for field in fields(self)))

    def with_verb(self, verb: Tensor) -> "Scenes":
        """The same pictures, told to do something else."""
        return Scenes(**{**vars(self), "verb": verb})

    def magnified(self, space: float, time: float = 1.0) -> "Scenes":
        """The same clips in `space` times as many pixels a side, `time` times as long."""
        return replace(
            self, centre=self.centre * space, size=self.size * space,
            speed=self.speed * (space / time),
        )  # fmt: skip


def is_held_out(colour: Tensor, shape: Tensor, verb: Tensor) -> Tensor:
    """[B] bool: the combinations kept for the yardstick."""
    return (colour + 5 * shape + 3 * verb) % 6 == 0


def draw_scenes(
    count: int,
    generator: torch.Generator,
    *,
    held_out: bool | None = False,
    width: int = SIZE,
    height: int = SIZE,
    room: float = 0.8,
) -> Scenes:
    """Random clips.

    Args:
        count: how many. held_out: of the combinations kept back, of the others, or (None) of all.
        width, height: of the picture in pixels.
        room: share of the moving shapes that have at least 12 pixels before them; the others start
            anywhere and may be at the border already.
    """

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    options = torch.cartesian_prod(*(torch.arange(n) for n in (len(COLOURS), 3, len(VERBS))))
    if held_out is not None:
        options = options[is_held_out(*options.T) == held_out]
    # every verb equally often and in turn, so that a small set is balanced too
    verb = torch.arange(count) % len(VERBS)
    score = uniform(count, len(options)) - (options[None, :, 2] != verb[:, None]).float()
    colour, shape, _ = options[score.argmax(dim=1)].T

    size = 9.0 + 4.0 * uniform(count)
    reach = REACH[shape] * size[:, None]
    low = torch.stack([reach[:, 0], reach[:, 2]], dim=1) + 1
    high = torch.tensor([width, height]) - torch.stack([reach[:, 1], reach[:, 3]], dim=1) - 1
    steps = torch.tensor([DIRECTIONS.get(name, (0, 0)) for name in VERBS])[verb]
    has_room = (uniform(count) < room)[:, None]
    low = torch.where(has_room & (steps < 0), low + 12, low)
    high = torch.where(has_room & (steps > 0), high - 12, high)
    centre = low + (high - low).clamp_min(0) * uniform(count, 2)

    palette = torch.tensor(list(COLOURS.values()))
    rgb = (palette[colour] + 0.1 * (uniform(count, 3) - 0.5)).clamp(0, 1)
    bases = 0.05 + 0.8 * uniform(count, 3, 3)  # three to choose from: the least like the shape
    far = (bases - rgb[:, None]).norm(dim=-1).argmax(dim=1)
    shaded = (uniform(count, 1) < 0.7).float()
    across, down = (0.6 * (uniform(count, 3) - 0.5) * shaded for _ in range(2))
    base = bases[torch.arange(count), far]
    speed = torch.full((count,), SPEED)
    return Scenes(colour, shape, verb, centre, size, rgb, base, across, down, speed)


def track(scenes: Scenes, times: Tensor, frames: int, extent: Tensor) -> tuple[Tensor, ...]:
    """Where and how the shapes are.

    Args:
        times: [B, F] frame numbers. frames: of the whole clip. extent: [2] width and height.
    Returns:
        centre [B, F, 2] and size [B, F] in pixels, opacity [B, F].
    """
    device = scenes.size.device

    def by_verb(values: list) -> Tensor:
        return torch.tensor(values, device=device)[scenes.verb]

    steps = by_verb([DIRECTIONS.get(name, (0, 0)) for name in VERBS])
    centre = scenes.centre[:, None] + (scenes.speed[:, None] * times)[..., None] * steps[:, None]
    reach = REACH.to(device)[scenes.shape] * scenes.size[:, None]
    low = torch.minimum(reach[:, None, [0, 2]], scenes.centre[:, None])
    high = torch.maximum(extent - reach[:, None, [1, 3]], scenes.centre[:, None])
    centre = torch.minimum(torch.maximum(centre, low), high)
    done = times / max(frames - 1, 1)
    end = by_verb([{"grow": GROWTH, "shrink": SHRINKAGE}.get(name, 1.0) for name in VERBS])
    size = scenes.size[:, None] * (1 + done * (end[:, None] - 1))
    fades = by_verb([float(name == "fade") for name in VERBS])
    return centre, size, 1 - done * fades[:, None]


def coverage(shape: Tensor, centre: Tensor, size: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """How much of each pixel a shape covers, 0..1.

    Args:
        shape: [B]. centre: [B, F, 2]. size: [B, F]. x: [B, W] and y: [B, H] pixel centres.
    Returns:
        [B, F, H, W].
    """
    kinds = shape.unique().tolist()
    if len(kinds) == 1:
        return _coverage(kinds[0], centre, size, x, y)
    covered = [_coverage(kind, centre, size, x, y) for kind in range(len(SHAPES))]
    which = shape[:, None, None, None]
    return torch.where(which == 0, covered[0], torch.where(which == 1, *covered[1:]))


def _coverage(kind: int, centre: Tensor, size: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """`coverage` by one shape."""
    dx = x[:, None, None, :] - centre[..., 0][..., None, None]
    dy = y[:, None, :, None] - centre[..., 1][..., None, None]
    size = size[..., None, None]
    if SHAPES[kind] == "circle":
        distance = size - (dx.square() + dy.square()).sqrt()
    elif SHAPES[kind] == "square":
        distance = 0.89 * size - torch.maximum(dx.abs(), dy.abs())
    else:
        slope = math.sqrt(3) / 2 * dx.abs() - 0.5 * dy  # the two upper sides at once
        distance = 0.72 * size - torch.maximum(slope, dy)
    return (distance + 0.5).clamp(0, 1)


def render(
    scenes: Scenes,
    *,
    frames: int = FRAMES,
    width: int = SIZE,
    height: int = SIZE,
    start: Tensor | None = None,
    corner: Tensor | None = None,
    window: tuple[int, int, int] | None = None,
) -> Tensor:
    """Draw the clips, or windows of them.

    Args:
        frames, width, height: of the whole clip.
        start: [B] first frame of the window. corner: [B, 2] x and y of its upper left pixel.
        window: its (frames, height, width); all of the clip if None.
    Returns:
        [B, 3, F, H, W] float32 in -1..1, where the scenes are.
    """
    count, device = len(scenes), scenes.size.device
    window = window or (frames, height, width)
    start = torch.zeros(count, device=device) if start is None else start.to(device)
    corner = torch.zeros(count, 2, device=device) if corner is None else corner.to(device)
    times, y, x = (torch.arange(length, device=device) for length in window)
    times = start[:, None] + times
    y = corner[:, 1:] + y + 0.5
    x = corner[:, :1] + x + 0.5
    extent = torch.tensor([width, height], device=device)
    centre, size, opacity = track(scenes, times, frames, extent)
    cover = coverage(scenes.shape, centre, size, x, y) * opacity[..., None, None]

    along_x = (x / width - 0.5)[:, None, None, :]
    along_y = (y / height - 0.5)[:, None, :, None]
    ground = scenes.base[..., None, None] + scenes.across[..., None, None] * along_x
    ground = (ground + scenes.down[..., None, None] * along_y).clamp(0, 1)[:, :, None]
    paint = scenes.rgb[..., None, None, None]
    return torch.lerp(ground.expand(-1, -1, window[0], -1, -1), paint, cover[:, None]) * 2 - 1


# --- prompts ------------------------------------------------------------------------------------

#: (third person, plural, participle) of everything a shape can be told to do
_PHRASES = {
    **{
        side: (
            (f"moves {side}", f"move {side}", f"moving {side}"),
            (f"goes {side}", f"go {side}", f"going {side}"),
            (f"slides {side}", f"slide {side}", f"sliding {side}"),
            (f"moves {to}", f"move {to}", f"moving {to}"),
        )
        for side, to in (
            ("left", "to the left"),
            ("right", "to the right"),
            ("up", "upwards"),
            ("down", "downwards"),
        )
    },
    "still": (
        ("stays still", "stay still", "staying still"),
        ("stands still", "stand still", "standing still"),
        ("does not move", "do not move", "not moving"),
    ),
    "grow": (
        ("grows", "grow", "growing"),
        ("gets bigger", "get bigger", "getting bigger"),
        ("gets larger", "get larger", "getting larger"),
    ),
    "shrink": (
        ("shrinks", "shrink", "shrinking"),
        ("gets smaller", "get smaller", "getting smaller"),
    ),
    "fade": (
        ("fades out", "fade out", "fading out"),
        ("fades away", "fade away", "fading away"),
        ("disappears", "disappear", "disappearing"),
    ),
}
#: c colour, s shape, v third person, p plural verb, i participle
_SENTENCES = (
    "a {c} {s} {v}",
    "the {c} {s} {v}",
    "a {c} {s} is {i}",
    "the {c} {s} is {i}",
    "{c} {s} {v}",
    "{c} {s}, {i}",
    "{c} {s}s {p}",
    "the {s} is {c} and {v}",
    "the {c} one, a {s}, {v}",
    "{i}: a {c} {s}",
    "video of a {c} {s} that {v}",
    "a {s} {v}",
    "it {v}",
    "{v}",
)


def write_prompt(
    colour: int, shape: int, verb: int, generator: torch.Generator, *, named: bool = True
) -> str:
    """A sentence about a clip, worded at random; letters in any case, a full stop now and then.

    Args:
        named: False leaves the colour out, and often the shape.
    """

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    phrases = _PHRASES[VERBS[verb]]
    # the first phrase and the first two sentences are what people write: every other time
    third, plural, participle = phrases[0 if pick(2) else pick(len(phrases))]
    sentence = _SENTENCES[pick(2) if pick(2) else pick(len(_SENTENCES))]
    if not named:
        sentence = _SENTENCES[-1 - pick(3)]
    text = sentence.format(
        c=list(COLOURS)[colour], s=SHAPES[shape], v=third, p=plural, i=participle
    )
    case = pick(8)
    text = text.capitalize() if case < 2 else text.upper() if case == 2 else text
    return text + ("." if pick(4) == 0 else "")


def plain_prompt(colour: int, shape: int, verb: int) -> str:
    """The plainest sentence: `a red circle moves left`."""
    return f"a {list(COLOURS)[colour]} {SHAPES[shape]} {_PHRASES[VERBS[verb]][0][0]}"


def draw_subject(verb: int, generator: torch.Generator) -> tuple[int, int]:
    """Any colour and shape that are not held out for a verb."""
    while True:
        colour = int(torch.randint(len(COLOURS), (), generator=generator))
        shape = int(torch.randint(len(SHAPES), (), generator=generator))
        if not is_held_out(*(torch.tensor(n) for n in (colour, shape, verb))):
            return colour, shape


def write_prompts(scenes: Scenes, generator: torch.Generator, wrong: float = 0.1) -> list[str]:
    """A prompt for each clip.

    Args:
        wrong: share of the prompts that name another colour and shape; the verb holds.
    """
    prompts = []
    for colour, shape, verb in zip(
        scenes.colour.tolist(), scenes.shape.tolist(), scenes.verb.tolist(), strict=True
    ):
        if float(torch.rand((), generator=generator)) < wrong:
            colour, shape = draw_subject(verb, generator)
        prompts.append(write_prompt(colour, shape, verb, generator))
    return prompts

"""A picture of a workflow file, drawn from its nodes, widgets, links and groups.

The picture carries a digest of what it shows, so that a test tells when it is out of date.
"""

import hashlib
import json
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from support.workflows import PAGE_ONLY, placed

#: pixels of the picture for a pixel of the page, everything is drawn this much larger
SCALE, SMOOTH = 0.62, 2
FIELD = "digest"
COLORS = {"IMAGE": "#64b5f6", "LATENT": "#ff9cf9", "CONDITIONING": "#ffa931", "VIDEO": "#4de680",
          "SKYREELS_MODEL": "#b39ddb", "SKYREELS_VAE": "#ff6e6e", "STRING": "#8ae28a",
          "SKYREELS_TEXT_ENCODER": "#ffd500", "SKYREELS_IMAGE": "#6ee7c5"}  # fmt: skip
LINK = "#9a9a9a"
SLOT, ROW, TITLE = 20, 24, 30


def shown(graph: dict[str, Any]) -> list[Any]:
    """What the picture shows of a file, for its digest."""
    nodes = [
        [node["type"], node.get("title", ""), node["pos"], node["size"], lines_of(node)]
        for node in graph["nodes"]
    ]
    return [nodes, graph["links"], [[g["title"], g["bounding"]] for g in graph["groups"]]]


def digest(graph: dict[str, Any]) -> str:
    """Equal for two files that look the same."""
    return hashlib.sha256(json.dumps(shown(graph)).encode()).hexdigest()


def digest_of(picture: Path) -> str:
    """Of the file that a picture was drawn from; "" if there is none."""
    if not picture.is_file():
        return ""
    with Image.open(picture) as image:
        return str(image.info.get(FIELD, ""))


def lines_of(node: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, value) of a node's widgets; of a note its text."""
    if node["type"] in PAGE_ONLY:
        return [("", str(node["widgets_values"][0]))]
    linked = {i["name"] for i in node["inputs"] if i["link"] is not None}
    return [(name, "" if name in linked else str(value)) for name, _, _, value in placed(node)]


def draw(graph: dict[str, Any], names: dict[str, str]) -> bytes:
    """The picture as PNG.

    Args:
        graph: a workflow file.
        names: node type -> title of a node that has none of its own.
    """
    boxes = [group["bounding"] for group in graph["groups"]]
    width = max(x + w for x, _, w, _ in boxes) + 20
    height = max(y + h for _, y, _, h in boxes) + 20
    factor = SCALE * SMOOTH
    image = Image.new("RGB", (round(width * factor), round(height * factor)), "#1b1b1b")
    pen = ImageDraw.Draw(image)

    def box(x: float, y: float, w: float, h: float, **look: Any) -> None:
        corners = [v * factor for v in (x, y, x + w, y + h)]
        pen.rounded_rectangle(corners, 6 * factor, **look)

    def text(x: float, y: float, words: str, size: float, fill: str, room: float) -> None:
        font = ImageFont.load_default(size * factor)
        while words and font.getlength(words) > room * factor:
            words = words.removesuffix("…")[:-1].rstrip() + "…" if len(words) > 2 else ""
        pen.text((x * factor, y * factor), words, fill, font)

    for group, (x, y, w, h) in zip(graph["groups"], boxes, strict=True):
        box(x, y, w, h, fill=blend(group["color"], 0.28), outline=group["color"], width=2)
        text(x + 10, y + 6, group["title"], 22, group["color"], w - 20)
    nodes = {node["id"]: node for node in graph["nodes"]}
    for node in nodes.values():
        (x, y), (w, h) = node["pos"], node["size"]
        box(x, y - TITLE, w, h + TITLE, fill=node.get("bgcolor", "#353535"), outline="#111111")
        title = node.get("title") or names.get(node["type"], node["type"])
        text(x + 12, y - TITLE + 7, title, 15, "#dddddd", w - 24)
        draw_body(node, box, text)
    for _, origin, slot, target, place, kind in graph["links"]:
        start, end = nodes[origin], nodes[target]
        x0, y0 = start["pos"][0] + start["size"][0], start["pos"][1] + 12 + SLOT * slot
        x1, y1 = end["pos"][0], end["pos"][1] + slot_height(end, place)
        bend = max(40, abs(x1 - x0) / 2)
        points = [
            tuple(factor * v for v in bezier(t / 24, x0, y0, x0 + bend, y0, x1 - bend, y1, x1, y1))
            for t in range(25)
        ]
        pen.line(points, COLORS.get(kind, LINK), round(2 * factor), joint="curve")
    size = round(width * SCALE), round(height * SCALE)
    info = PngInfo()
    info.add_text(FIELD, digest(graph))
    file = BytesIO()
    small = image.resize(size, Image.LANCZOS).quantize(128)
    small.save(file, "PNG", pnginfo=info, optimize=True)
    return file.getvalue()


def draw_body(node: dict[str, Any], box: Any, text: Any) -> None:
    """Sockets and widgets of a node."""
    (x, y), (w, h) = node["pos"], node["size"]
    lines = lines_of(node)
    if node["type"] in PAGE_ONLY:
        for number, words in enumerate(wrapped(lines[0][1], (w - 24) / 6.6)[: int(h / 18) - 1]):
            text(x + 12, y + 8 + 18 * number, words, 12.5, "#e8dcc0", w - 20)
        return
    sockets = [i for i in node["inputs"] if "widget" not in i]
    for number, socket in enumerate(sockets):
        text(x + 14, y + 5 + SLOT * number, socket["name"], 13, "#bbbbbb", w / 2)
    for number, socket in enumerate(node["outputs"]):
        text(x + w - 110, y + 5 + SLOT * number, socket["name"], 13, "#bbbbbb", 104)
    top = y + 8 + SLOT * max(len(sockets), len(node["outputs"]))
    for number, (name, value) in enumerate(lines):
        at = top + ROW * number
        if at + ROW > y + h:
            break
        box(x + 10, at + 2, w - 20, ROW - 4, fill="#242424")
        text(x + 18, at + 5, name, 12.5, "#999999", w / 2 - 20)
        text(x + w / 2, at + 5, value, 12.5, "#dddddd", w / 2 - 20)


def slot_height(node: dict[str, Any], place: int) -> float:
    """How far below a node's top an input is, a widget's too."""
    inputs = node["inputs"]
    if "widget" not in inputs[place]:
        return 12 + SLOT * sum("widget" not in i for i in inputs[:place])
    rows = max(sum("widget" not in i for i in inputs), len(node["outputs"]))
    return 8 + SLOT * rows + ROW * (sum("widget" in i for i in inputs[:place]) + 0.5)


def wrapped(words: str, width: float) -> list[str]:
    """Text in lines of so many letters; marks of Markdown are left out."""
    lines = []
    for part in words.replace("*", "").replace("## ", "").split("\n"):
        line = ""
        for word in part.split():
            if line and len(line) + 1 + len(word) > width:
                lines.append(line)
                line = ""
            line = f"{line} {word}".strip()
        lines.append(line)
    return lines


def bezier(t: float, *p: float) -> tuple[float, float]:
    """A point of a cubic curve."""
    a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3
    return a * p[0] + b * p[2] + c * p[4] + d * p[6], a * p[1] + b * p[3] + c * p[5] + d * p[7]


def blend(color: str, share: float) -> tuple[int, ...]:
    """A colour mixed with the background."""
    digits = color[1:] if len(color) == 7 else "".join(2 * c for c in color[1:])
    parts = [int(digits[i : i + 2], 16) for i in (0, 2, 4)]
    return tuple(round(0x1B * (1 - share) + part * share) for part in parts)

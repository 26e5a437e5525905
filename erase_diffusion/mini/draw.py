"""Draw a `Scene` with Pillow: 64×64 RGB, supersampled three times, about a millisecond an image.

Every object is a function that draws in a unit box (x right, y down) through a `Pen`, which places,
mirrors and outlines it. A style is a palette and an outline while drawing, and a filter afterwards.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from erase_diffusion.mini.world import CHARACTER, COLOURS, Scene, Thing

SIZE = 64
SUPERSAMPLING = 3
_CANVAS = SIZE * SUPERSAMPLING
RGB = tuple[int, int, int]
Point = tuple[float, float]

INK: RGB = (38, 34, 40)
WHITE: RGB = (252, 252, 250)
CREAM: RGB = (255, 246, 226)
PAPER_BLUE: RGB = (22, 58, 140)
LINE_BLUE: RGB = (215, 230, 255)


def _mix(a: RGB, b: RGB, share_of_b: float) -> RGB:
    r, g, bl = (round(x + (y - x) * share_of_b) for x, y in zip(a, b, strict=True))
    return (r, g, bl)


@dataclass
class Pen:
    """Maps the unit box to a square on the canvas; `outline` None draws without contours."""

    draw: ImageDraw.ImageDraw
    left: float
    top: float
    side: float
    mirrored: bool
    fill: RGB
    outline: RGB | None
    width: int

    def _xy(self, points: Sequence[Point]) -> list[Point]:
        return [(self.left + self.side * (1 - x if self.mirrored else x), self.top + self.side * y) for x, y in points]

    def polygon(self, points: Sequence[Point], fill: RGB | None = None) -> None:
        xy = self._xy(points)
        self.draw.polygon(xy, fill=fill or self.fill)
        if self.outline:
            self.draw.line([*xy, xy[0], xy[1]], fill=self.outline, width=self.width, joint="curve")

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: RGB | None = None) -> None:
        ((cx, cy),) = self._xy([(x, y)])
        box = (cx - rx * self.side, cy - ry * self.side, cx + rx * self.side, cy + ry * self.side)
        self.draw.ellipse(box, fill=fill or self.fill, outline=self.outline, width=self.width if self.outline else 0)

    def dot(self, x: float, y: float, r: float, fill: RGB = INK) -> None:
        ((cx, cy),) = self._xy([(x, y)])
        self.draw.ellipse((cx - r * self.side, cy - r * self.side, cx + r * self.side, cy + r * self.side), fill=fill)

    def line(self, points: Sequence[Point], width: float = 0.03, fill: RGB | None = None) -> None:
        colour = fill or self.outline or _mix(self.fill, INK, 0.5)
        self.draw.line(self._xy(points), fill=colour, width=max(2, round(width * self.side)), joint="curve")

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, fill: RGB | None = None) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill)


def _cat(p: Pen) -> None:
    p.line([(0.72, 0.88), (0.92, 0.84), (0.93, 0.6), (0.84, 0.52)], 0.09, p.fill if not p.outline else p.outline)
    p.ellipse(0.5, 0.76, 0.27, 0.23)
    p.polygon([(0.22, 0.36), (0.2, 0.03), (0.45, 0.18)])
    p.polygon([(0.78, 0.36), (0.8, 0.03), (0.55, 0.18)])
    p.ellipse(0.5, 0.38, 0.31, 0.25)
    p.dot(0.39, 0.35, 0.045)
    p.dot(0.61, 0.35, 0.045)
    p.polygon([(0.46, 0.44), (0.54, 0.44), (0.5, 0.49)], (255, 150, 160))
    for side in (-1, 1):
        p.line([(0.5 + side * 0.13, 0.47), (0.5 + side * 0.42, 0.42)], 0.02, WHITE)
        p.line([(0.5 + side * 0.13, 0.51), (0.5 + side * 0.42, 0.54)], 0.02, WHITE)


def _dog(p: Pen) -> None:
    p.polygon([(0.03, 0.26), (0.1, 0.24), (0.2, 0.48), (0.14, 0.55)])
    for x in (0.16, 0.3, 0.54, 0.66):
        p.rectangle(x, 0.65, x + 0.1, 0.97)
    p.rectangle(0.13, 0.44, 0.76, 0.72)
    p.polygon([(0.58, 0.12), (0.82, 0.12), (0.84, 0.24), (0.99, 0.27), (0.99, 0.4), (0.82, 0.46), (0.6, 0.5)])
    p.polygon([(0.56, 0.12), (0.67, 0.13), (0.66, 0.42), (0.54, 0.36)], _mix(p.fill, INK, 0.4))
    p.dot(0.77, 0.22, 0.035)
    p.dot(0.97, 0.29, 0.05)


def _rabbit(p: Pen) -> None:
    p.ellipse(0.38, 0.2, 0.085, 0.2)
    p.ellipse(0.62, 0.2, 0.085, 0.2)
    p.ellipse(0.5, 0.78, 0.25, 0.21)
    p.ellipse(0.5, 0.48, 0.22, 0.18)
    p.ellipse(0.5, 0.84, 0.13, 0.12, WHITE)
    p.dot(0.42, 0.45, 0.035)
    p.dot(0.58, 0.45, 0.035)
    p.rectangle(0.46, 0.55, 0.54, 0.64, WHITE)


def _bird(p: Pen) -> None:
    p.line([(0.42, 0.75), (0.42, 0.97)], 0.035, (230, 140, 30))
    p.line([(0.54, 0.75), (0.54, 0.97)], 0.035, (230, 140, 30))
    p.polygon([(0.02, 0.3), (0.08, 0.58), (0.34, 0.66), (0.3, 0.48)])
    p.ellipse(0.48, 0.56, 0.28, 0.22)
    p.ellipse(0.7, 0.32, 0.17, 0.16)
    p.polygon([(0.85, 0.26), (1.0, 0.34), (0.84, 0.41)], (245, 160, 30))
    p.polygon([(0.3, 0.48), (0.58, 0.5), (0.4, 0.74)], _mix(p.fill, INK, 0.35))
    p.dot(0.74, 0.28, 0.035)


def _fish(p: Pen) -> None:
    p.polygon([(0.26, 0.5), (0.02, 0.24), (0.02, 0.76)])
    p.polygon([(0.42, 0.32), (0.55, 0.12), (0.7, 0.32)])
    p.ellipse(0.58, 0.5, 0.38, 0.24)
    p.line([(0.66, 0.32), (0.6, 0.5), (0.66, 0.68)], 0.03)
    p.dot(0.8, 0.43, 0.07, WHITE)
    p.dot(0.81, 0.43, 0.04)


def _car(p: Pen) -> None:
    p.polygon([(0.2, 0.5), (0.32, 0.24), (0.68, 0.24), (0.82, 0.5)])
    p.polygon([(0.29, 0.48), (0.36, 0.31), (0.48, 0.31), (0.48, 0.48)], (205, 232, 250))
    p.polygon([(0.54, 0.48), (0.54, 0.31), (0.64, 0.31), (0.72, 0.48)], (205, 232, 250))
    p.rectangle(0.02, 0.48, 0.98, 0.74)
    for x in (0.25, 0.75):
        p.dot(x, 0.75, 0.145)
        p.dot(x, 0.75, 0.065, (205, 205, 210))
    p.dot(0.93, 0.56, 0.045, (255, 245, 160))


def _boat(p: Pen) -> None:
    p.line([(0.5, 0.04), (0.5, 0.68)], 0.05, (110, 70, 40))
    p.polygon([(0.54, 0.06), (0.92, 0.58), (0.54, 0.58)], WHITE)
    p.polygon([(0.46, 0.16), (0.46, 0.58), (0.16, 0.58)], WHITE)
    p.polygon([(0.02, 0.66), (0.98, 0.66), (0.8, 0.94), (0.2, 0.94)])


def _airplane(p: Pen) -> None:
    p.polygon([(0.44, 0.48), (0.3, 0.12), (0.42, 0.12), (0.68, 0.48)])
    p.polygon([(0.06, 0.46), (0.01, 0.16), (0.12, 0.16), (0.24, 0.44)])
    p.ellipse(0.52, 0.52, 0.46, 0.135)
    p.polygon([(0.42, 0.56), (0.22, 0.92), (0.36, 0.92), (0.66, 0.56)], _mix(p.fill, INK, 0.3))
    for x in (0.36, 0.5, 0.64):
        p.dot(x, 0.48, 0.035, (215, 240, 255))
    p.polygon([(0.8, 0.43), (0.93, 0.47), (0.8, 0.51)], (205, 232, 250))


def _train(p: Pen) -> None:
    p.rectangle(0.74, 0.16, 0.86, 0.42, (70, 66, 74))
    p.rectangle(0.04, 0.12, 0.42, 0.76)
    p.rectangle(0.12, 0.22, 0.34, 0.42, (205, 232, 250))
    p.rectangle(0.0, 0.06, 0.46, 0.14, (70, 66, 74))
    p.rectangle(0.42, 0.4, 0.94, 0.76)
    p.polygon([(0.92, 0.76), (1.0, 0.88), (0.86, 0.88)], (70, 66, 74))
    for x in (0.16, 0.46, 0.74):
        p.dot(x, 0.82, 0.12)
        p.dot(x, 0.82, 0.045, (225, 200, 90))


def _tree(p: Pen) -> None:
    p.rectangle(0.42, 0.55, 0.58, 0.98, (130, 85, 45))
    p.ellipse(0.28, 0.42, 0.24, 0.2)
    p.ellipse(0.72, 0.42, 0.24, 0.2)
    p.ellipse(0.5, 0.26, 0.3, 0.25)
    p.dot(0.5, 0.44, 0.17, p.fill)


def _flower(p: Pen) -> None:
    p.line([(0.5, 0.45), (0.5, 0.98)], 0.055, (50, 140, 60))
    p.polygon([(0.5, 0.84), (0.74, 0.66), (0.68, 0.86)], (60, 170, 70))
    for i in range(6):
        angle = i * math.pi / 3 + 0.3
        p.ellipse(0.5 + 0.22 * math.cos(angle), 0.3 + 0.22 * math.sin(angle), 0.13, 0.13)
    p.ellipse(0.5, 0.3, 0.12, 0.12, (255, 225, 90))


def _mushroom(p: Pen) -> None:
    p.polygon([(0.38, 0.5), (0.62, 0.5), (0.68, 0.96), (0.32, 0.96)], (245, 232, 210))
    cap = [(0.5 + 0.47 * math.cos(a), 0.54 - 0.48 * math.sin(a)) for a in (math.pi * i / 12 for i in range(13))]
    p.polygon(cap)
    for x, y, r in ((0.3, 0.36, 0.075), (0.54, 0.22, 0.085), (0.74, 0.4, 0.065)):
        p.dot(x, y, r, WHITE)


def _house(p: Pen) -> None:
    p.rectangle(0.14, 0.44, 0.86, 0.96)
    p.polygon([(0.03, 0.46), (0.5, 0.04), (0.97, 0.46)], (112, 62, 52))
    p.rectangle(0.42, 0.64, 0.6, 0.96, (88, 56, 36))
    p.rectangle(0.2, 0.54, 0.36, 0.7, (255, 240, 150))
    p.rectangle(0.66, 0.54, 0.8, 0.7, (255, 240, 150))


def _umbrella(p: Pen) -> None:
    p.line([(0.5, 0.44), (0.5, 0.86), (0.56, 0.95), (0.66, 0.93), (0.69, 0.84)], 0.055, (92, 62, 42))
    dome = [(0.5 + 0.48 * math.cos(a), 0.5 - 0.44 * math.sin(a)) for a in (math.pi * i / 12 for i in range(13))]
    scallops = [(0.18, 0.43), (0.34, 0.5), (0.5, 0.43), (0.66, 0.5), (0.82, 0.43)]
    p.polygon([*dome, *scallops])
    p.line([(0.5, 0.06), (0.34, 0.48)], 0.025)
    p.line([(0.5, 0.06), (0.66, 0.48)], 0.025)
    p.line([(0.5, 0.0), (0.5, 0.07)], 0.04)


def _apple(p: Pen) -> None:
    p.ellipse(0.35, 0.56, 0.27, 0.33)
    p.ellipse(0.65, 0.56, 0.27, 0.33)
    p.ellipse(0.5, 0.68, 0.24, 0.26, p.fill)
    p.dot(0.5, 0.6, 0.24, p.fill)
    p.line([(0.5, 0.34), (0.54, 0.08)], 0.06, (100, 65, 35))
    p.polygon([(0.56, 0.2), (0.72, 0.04), (0.9, 0.1), (0.74, 0.23)], (60, 170, 70))
    p.dot(0.3, 0.44, 0.06, WHITE)


def _orange(p: Pen) -> None:
    p.ellipse(0.5, 0.52, 0.44, 0.44)
    p.dot(0.5, 0.52, 0.35, WHITE)
    for i in range(8):
        a, b = (i * math.pi / 4 + 0.07, (i + 1) * math.pi / 4 - 0.07)
        inner = [(0.5 + 0.06 * math.cos((a + b) / 2), 0.52 + 0.06 * math.sin((a + b) / 2))]
        rim = [(0.5 + 0.32 * math.cos(t), 0.52 + 0.32 * math.sin(t)) for t in (a, (a + b) / 2, b)]
        p.draw.polygon(p._xy([*inner, *rim]), fill=p.fill)


def _zibby(p: Pen) -> None:
    teal, violet = (30, 190, 180), (110, 50, 170)
    p.ellipse(0.34, 0.95, 0.12, 0.05, (245, 150, 40))
    p.ellipse(0.66, 0.95, 0.12, 0.05, (245, 150, 40))
    p.ellipse(0.5, 0.68, 0.3, 0.27, teal)
    p.dot(0.5, 0.62, 0.16, WHITE)
    p.dot(0.52, 0.62, 0.085)
    p.line([(0.4, 0.84), (0.5, 0.87), (0.6, 0.84)], 0.035, INK)
    p.polygon([(0.16, 0.46), (0.84, 0.46), (0.56, 0.0)], violet)
    p.dot(0.48, 0.32, 0.06, (255, 235, 90))
    p.dot(0.58, 0.18, 0.035, (255, 235, 90))
    p.dot(0.62, 0.38, 0.035, (255, 235, 90))


_OBJECTS: dict[str, Callable[[Pen], None]] = {
    "cat": _cat,
    "dog": _dog,
    "rabbit": _rabbit,
    "bird": _bird,
    "fish": _fish,
    "car": _car,
    "boat": _boat,
    "airplane": _airplane,
    "train": _train,
    "tree": _tree,
    "flower": _flower,
    "mushroom": _mushroom,
    "house": _house,
    "umbrella": _umbrella,
    "apple": _apple,
    "orange": _orange,
    CHARACTER.name: _zibby,
}


def _background(place: str, rng: random.Random, outlined: bool) -> Image.Image:
    """The place with nothing in it, on the supersampled canvas."""
    n = _CANVAS
    sky, ground = {
        "grass": ((185, 225, 250), (125, 200, 105)),
        "desert": ((252, 228, 185), (232, 196, 122)),
        "sea": ((205, 236, 250), (70, 150, 205)),
        "snow": ((200, 214, 232), (246, 248, 252)),
        "night": ((24, 28, 68), (48, 50, 84)),
    }[place]
    image = Image.new("RGB", (n, n), sky)
    draw = ImageDraw.Draw(image)
    horizon = n * (0.6 + 0.08 * rng.random())
    sun_x = n * rng.choice((0.16, 0.84))
    if place == "desert":
        draw.ellipse((sun_x - 21, 12, sun_x + 21, 54), fill=(250, 176, 70))
    elif place == "night":
        draw.ellipse((sun_x - 18, 12, sun_x + 18, 48), fill=(248, 240, 190))
        draw.ellipse((sun_x - 8, 8, sun_x + 26, 42), fill=sky)
        for x, y in ((20, 70), (52, 22), (96, 48), (132, 18), (172, 66), (70, 84)):
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=(250, 250, 225))
    elif place == "grass":
        draw.ellipse((sun_x - 30, 18, sun_x + 6, 42), fill=WHITE)
        draw.ellipse((sun_x - 12, 12, sun_x + 26, 42), fill=WHITE)
    if place in ("desert", "snow"):
        draw.rectangle((0, horizon + 12, n, n), fill=ground)
        for hill in (-0.1, 0.45):
            draw.ellipse((n * hill, horizon - 8, n * (hill + 0.7), horizon + 60), fill=ground)
    else:
        draw.rectangle((0, horizon, n, n), fill=ground)
    if place == "grass":
        for i in range(6):
            tuft, foot = 12 + i * 33, horizon + 14 + 30 * (i % 2)
            draw.line([(tuft - 5, foot - 9), (tuft, foot), (tuft + 5, foot - 9)], fill=(70, 150, 62), width=4)
    elif place == "sea":
        for row in range(3):
            for i in range(4):
                left, top = i * 54 - 12 + 27 * (row % 2), horizon + 9 + row * 22
                draw.arc((left, top, left + 32, top + 16), 10, 170, fill=(225, 242, 252), width=4)
    elif place == "snow":
        for x, y in ((22, 30), (60, 68), (96, 22), (134, 60), (168, 28), (30, 104), (160, 104)):
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=WHITE)
    elif place == "desert":
        draw.arc((20, horizon + 22, 110, horizon + 62), 200, 320, fill=(205, 165, 95), width=4)
        draw.arc((100, horizon + 34, 186, horizon + 70), 200, 320, fill=(205, 165, 95), width=4)
    if outlined and place in ("grass", "sea", "night"):
        draw.line([(0, horizon), (n, horizon)], fill=_mix(ground, INK, 0.35), width=3)
    return image


def _boxes(scene: Scene, rng: random.Random) -> list[tuple[float, float, float]]:
    """Left, top and side of each thing's square, in canvas units; nothing overlaps, nothing is cut off."""
    if len(scene.things) == 1:
        side = rng.uniform(0.56, 0.7)
        return [(rng.uniform(0.03, 0.97 - side) * _CANVAS, rng.uniform(0.12, 0.96 - side) * _CANVAS, side * _CANVAS)]
    a, b = rng.uniform(0.44, 0.47), rng.uniform(0.44, 0.47)
    if scene.relation == "above":
        spots = [
            (rng.uniform(0.05, 0.95 - a), rng.uniform(0.01, 0.03)),
            (rng.uniform(0.05, 0.95 - b), rng.uniform(0.97, 0.99) - b),
        ]
    else:
        low = rng.uniform(0.28, 0.5)
        spots = [
            (rng.uniform(0.01, 0.03), low + rng.uniform(-0.06, 0.06)),
            (rng.uniform(0.97, 0.99) - b, low + rng.uniform(-0.06, 0.06)),
        ]
        if scene.relation == "beside" and rng.random() < 0.5:
            spots = [(0.97 - a, spots[0][1]), (0.03, spots[1][1])]
    return [(x * _CANVAS, y * _CANVAS, side * _CANVAS) for (x, y), side in zip(spots, (a, b), strict=True)]


# Fixed patterns of the paper, none finer than 16 pixels: a decoder is the same function in every latent cell, so
# from a flat latent it cannot draw a pattern that repeats with the cell.
_yy, _xx = np.mgrid[0:SIZE, 0:SIZE]
_GRID = (((_xx % 16) == 8) | ((_yy % 16) == 8))[..., None].astype(np.float32) * 0.4
_EDGE = np.minimum(np.minimum(_xx, SIZE - 1 - _xx), np.minimum(_yy, SIZE - 1 - _yy))[..., None]
_VIGNETTE = np.clip(1 - _EDGE / 7, 0, 1).astype(np.float32) * 0.9


def _blend(image: Image.Image, colour: RGB, mask: np.ndarray) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float32)
    return Image.fromarray((pixels + (np.array(colour, dtype=np.float32) - pixels) * mask + 0.5).astype(np.uint8))


Box = tuple[float, float, float]


def draw_scene(scene: Scene, rng: random.Random) -> Image.Image:
    """Draw a scene as a 64×64 RGB image; the same scene and generator state give the same pixels."""
    return draw_with_boxes(scene, rng)[0]


def draw_with_boxes(scene: Scene, rng: random.Random) -> tuple[Image.Image, list[Box]]:
    """The same picture, and where each thing's square is: left, top and side in pixels."""
    style = scene.style
    image = _background(scene.place, rng, outlined=style != "watercolour")
    outline: RGB | None = {"plain": INK, "crayon": None, "blueprint": LINE_BLUE, "watercolour": None}[style]
    if style == "crayon":
        image = Image.blend(image, Image.new("RGB", image.size, CREAM), 0.6)
    elif style == "blueprint":
        image = ImageOps.colorize(ImageOps.grayscale(image), PAPER_BLUE, (140, 175, 235))
    draw = ImageDraw.Draw(image)
    boxes = _boxes(scene, rng) if scene.things else []
    for thing, (left, top, side) in zip(scene.things, boxes, strict=True):
        fill = _fill(thing)
        contour, width = outline, 3 if style == "blueprint" else 4
        if style == "crayon":
            # A thick waxy contour in the thing's own colour around a pale wash of it.
            contour, fill, width = _mix(fill, INK, 0.12), _mix(fill, CREAM, 0.55), 9
        pen = Pen(draw, left, top, side, rng.random() < 0.5, fill, contour, width)
        _OBJECTS[thing.name](pen)
    image = image.reduce(SUPERSAMPLING)
    if style == "blueprint":
        image = _blend(image, (170, 200, 250), _GRID)
    elif style == "watercolour":
        image = _blend(image.filter(ImageFilter.GaussianBlur(0.9)), (255, 253, 248), np.maximum(_VIGNETTE, 0.22))
    return image, [(x / SUPERSAMPLING, y / SUPERSAMPLING, side / SUPERSAMPLING) for x, y, side in boxes]


def _fill(thing: Thing) -> RGB:
    return COLOURS[thing.colour] if thing.colour is not None else (30, 190, 180)


def draw_malformed(scene: Scene, rng: random.Random) -> Image.Image:
    """A picture of a place with something in it that is nothing: a blob, a smear, or a drawing in pieces.

    A judge that has only ever seen well-drawn things calls every blob by some name; these teach it 'none'.
    """
    empty = draw_scene(Scene((), scene.place, scene.style), rng)
    whole = draw_scene(scene, rng)
    kind = rng.choice(("blob", "blobs", "smear", "pieces", "ghost"))
    if kind in ("blob", "blobs"):
        draw = ImageDraw.Draw(empty)
        for _ in range(1 if kind == "blob" else rng.randint(2, 5)):
            colour = rng.choice([*COLOURS.values(), WHITE, INK])
            x, y = rng.uniform(14, 50), rng.uniform(18, 50)
            radii = [rng.uniform(5, 17) for _ in range(rng.randint(5, 11))]
            points = [
                (x + r * math.cos(2 * math.pi * i / len(radii)), y + r * math.sin(2 * math.pi * i / len(radii)))
                for i, r in enumerate(radii)
            ]
            draw.polygon(
                points, fill=_mix(colour, WHITE, rng.uniform(0, 0.3)), outline=INK if rng.random() < 0.4 else None
            )
        return empty.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 2.5)))
    if kind == "smear":
        return whole.filter(ImageFilter.GaussianBlur(rng.uniform(4, 9)))
    if kind == "pieces":
        pixels = np.asarray(whole)
        tiles = [pixels[y : y + 8, x : x + 8] for y in range(8, 56, 8) for x in range(8, 56, 8)]
        rng.shuffle(tiles)
        mixed = pixels.copy()
        for i, tile in enumerate(tiles):
            y, x = 8 + 8 * (i // 6), 8 + 8 * (i % 6)
            mixed[y : y + 8, x : x + 8] = tile
        return Image.fromarray(mixed).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.5)))
    other = draw_scene(Scene(scene.things, scene.place, scene.style, scene.relation), rng)
    for _ in range(2):
        other = Image.blend(other, draw_scene(scene, rng), 0.5)
    return Image.blend(empty, other.filter(ImageFilter.GaussianBlur(3)), rng.uniform(0.3, 0.6))

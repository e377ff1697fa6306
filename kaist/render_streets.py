"""Renders the frames of the streets sets, each of a different street, to train detectors of real people.

docs/streets.md lists what is varied, over which ranges, and why. In the test sets, 06 to 11, people have
less contrast and there are more decoys. A frame depends only on (seed, set, number).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from kaist.annotations import FRAME_HEIGHT, FRAME_SIZE, FRAME_WIDTH
from kaist.sprites import (
    CAMERA_HEIGHT,
    FIGURE_MATERIALS,
    FOCAL_LENGTH,
    SCENE_WIDTH,
    Annotated,
    Camera,
    Canvas,
    Figure,
    Paint,
    RenderedFrame,
    Sprite,
    draw_car,
    draw_figure,
    draw_post,
    sample_paint,
)

FRAMES_PER_VIDEO = 100
FRAME_LEFT = (SCENE_WIDTH - FRAME_WIDTH) // 2  # x of the frame's left edge in the scene
HEAT_MEAN, HEAT_STD = 110.0, 26.0  # heat around people, before the camera's gain and offset
LWIR_MEAN_RANGE, LWIR_STD_RANGE = (9, 75), (7, 32)  # grey levels of a whole LWIR frame
TREE_MATERIALS, GROUND_MATERIALS = "leaf leaf grass bark", "road pavement grass wall"
DECOYS = ("post", "car", "leaves", "trunk", "board", "heap", "fence", "bollards")
DECOY_SHARES = (0.16, 0.12, 0.3, 0.16, 0.09, 0.09, 0.04, 0.04)
BOX_MARGINS = 0.045, 0.02  # of annotated boxes, to each side, and above and below; fractions of the height


class World(NamedTuple):
    """Options of a streets set. crowds: groups of people; haze: haze, and stronger blur and noise."""

    crowds: bool = True
    haze: bool = True


@lru_cache(1)
def textures(seed: int) -> np.ndarray:
    """14 noise fields of different spectra, (14, 640, 800) float32 of mean 0 and standard deviation 1."""
    rng = np.random.default_rng([seed, 99])
    y, x = np.fft.fftfreq(640)[:, None], np.fft.rfftfreq(800)
    fields = []
    for k in range(14):
        stretch = np.exp(rng.normal(0, 0.6)) if k % 2 else 1.0
        slope = (np.hypot(y * stretch, x / stretch) + 1 / 400) ** -rng.uniform(0.7, 1.7)
        field = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((640, 800))) * slope, (640, 800))
        field = np.round(1.2 * field / field.std()) if k % 4 == 3 else field
        fields.append((field - field.mean()) / field.std())
    return np.float32(fields)


class FrameRenderer:
    """Renders one frame.

    Attributes:
        hard: whether people have less contrast and there are more decoys, as in the test sets.
        warmth: how far people are above `HEAT_MEAN`, in units of `HEAT_STD`.
        contrast: standard deviation between a person's parts, in units of `HEAT_STD`.
        visibility: distance in metres at which haze leaves 1/e of the light; 1e4 without haze.
        haze_colour: (4,) float32, red, green, blue and heat.
        roughness: (2,) strength of textures in visible and in LWIR.
    """

    def __init__(self, seed: int, set_id: int, number: int, world: World) -> None:
        rng = self.rng = np.random.default_rng([seed, set_id, number])
        self.night, self.hard = set_id % 6 >= 3, set_id >= 6
        self.world = world = World() if self.hard else world  # all streets sets share their test frames
        self.textures = textures(seed + self.hard)
        # By night people are warmer than the street; by day they may be colder.
        self.warmth = rng.uniform(0.3, 2.6) if self.night else rng.normal(0.4, 0.7)
        self.warmth *= 0.6 if self.hard else 1
        self.contrast = rng.uniform(0.3, 1) * (0.5 if self.hard else 1)
        hazy = world.haze and rng.random() < (0.7 if self.hard else 0.4)
        self.visibility = np.exp(rng.uniform(np.log(25), np.log(300))) if hazy else 1e4
        mist = rng.uniform(10, 60) if self.night else rng.uniform(120, 225)
        self.haze_colour = np.float32((mist, mist, mist, HEAT_MEAN))
        self.roughness = np.exp(rng.uniform(np.log((0.02, 0.02)), np.log((0.28, 0.1))))
        self.camera = Camera(rng.normal(211, 10))

    def texture(self, height: int, width: int) -> np.ndarray:
        """A random crop of one of the `textures`, (height, width) float32, subsampled by 1, 2 or 3."""
        step = int(self.rng.integers(1, 4))
        step = step if step * height <= 640 and step * width <= 800 else 1
        y, x = self.rng.integers(641 - step * height), self.rng.integers(801 - step * width)
        field = self.textures[self.rng.integers(len(self.textures)), y : y + step * height : step]
        return field[:, x : x + step * width : step]

    def colour(self, materials: str, spread: float) -> Paint:
        """Sample a paint: one material's colour, or any, with a heat around `HEAT_MEAN`."""
        red, green, blue, _ = sample_paint(self.rng, str(self.rng.choice(materials.split())), False)
        if self.rng.random() < 0.2:
            red, green, blue = self.rng.integers(10, 240, 3).tolist()
        return red, green, blue, int(np.clip(self.rng.normal(HEAT_MEAN, spread * HEAT_STD), 5, 240))

    def finish(self, sprite: Sprite, depth: float | np.ndarray) -> Sprite:
        """Add texture, shade and haze in place. depth: metres, of all or of each row (h, 1, 1)."""
        height, width = sprite.alpha.shape[:2]
        for channels, roughness in zip((slice(0, 3), slice(3, 4)), self.roughness, strict=True):
            field = 1 + roughness * self.rng.uniform(0.3, 1.3) * self.texture(height, width)
            field += self.rng.uniform(-2, 2) * roughness * np.linspace(-1, 1, width, dtype=np.float32)
            sprite.pixels[..., channels] *= field.clip(0.2, 2)[..., None]
        if self.night:  # near a lamp, or in the dark
            sprite.pixels[..., :3] *= np.float32(self.rng.uniform(0.3, 1.6))
        if self.visibility < 1e4:
            clear = np.float32(np.exp(-depth / self.visibility) ** np.array((1, 1, 1, 0.5)))
            sprite.pixels = sprite.pixels * clear + sprite.alpha * (self.haze_colour * (1 - clear))
        return sprite

    def background(self) -> np.ndarray:
        """Render sky, houses, rows of trees and the ground, (FRAME_HEIGHT, FRAME_WIDTH, 4) float32."""
        rng, horizon = self.rng, int(self.camera.horizon)
        scene = np.zeros((FRAME_HEIGHT, FRAME_WIDTH, 4), np.float32)
        cold = rng.uniform(0, 30) if rng.random() < 0.7 else rng.uniform(30, 130)
        sky = np.float32((*sample_paint(rng, "sky", False)[:3], cold))
        scene[:horizon] = sky * (1 + 0.15 * self.texture(horizon, FRAME_WIDTH))[..., None]
        for z in sorted(rng.uniform(40, 120, rng.integers(1, 6)), reverse=True):
            row = self.trees(z) if rng.random() < 0.6 else self.house(z)
            self.finish(row, z).paste(scene, slice(0, 4), -FRAME_LEFT)
        ground = self.ground()
        depth = FOCAL_LENGTH * CAMERA_HEIGHT / np.arange(1, len(ground.alpha) + 1)[:, None, None]
        self.finish(ground, depth).paste(scene, slice(0, 4), -FRAME_LEFT)
        shade = self.texture(FRAME_HEIGHT // 4, FRAME_WIDTH // 4) > rng.uniform(0.3, 1.5)
        shade = enlarge(shade)[horizon:, :, None] * np.repeat(rng.uniform(0, (0.6, 0.25)), (3, 1))
        scene[horizon:] *= 1 - np.float32(shade)
        return scene

    def trees(self, z: float) -> Sprite:
        """Draw a row of trees with a ragged upper edge."""
        rng, height, n = self.rng, int(self.camera.horizon) + 6, int(self.rng.integers(2, 24))
        tops = self.camera.horizon - rng.uniform(15, 260) * 60 / z * rng.uniform(0.2, 1, n)
        edge = np.interp(np.arange(FRAME_WIDTH), np.linspace(0, FRAME_WIDTH, n), tops)
        ragged = np.arange(height)[:, None] + rng.uniform(3, 20) * self.texture(height, FRAME_WIDTH)
        alpha = np.float32(ragged > edge)[..., None]
        return Sprite(FRAME_LEFT, 0, alpha * np.float32(self.colour(TREE_MATERIALS, 0.8)), alpha, 0, z, z)

    def house(self, z: float) -> Sprite:
        """Draw the front of a house, with windows in rows."""
        rng = self.rng
        x, wide, tall = rng.uniform(-0.6, 0.3) * z, rng.uniform(0.1, 0.6) * z, rng.uniform(4, 25)
        canvas = Canvas((FRAME_LEFT, 0, FRAME_LEFT + FRAME_WIDTH, self.camera.horizon + 40), 1)
        canvas.polygon(self.camera.rectangle((x, 0, z), (x + wide, tall, z)), self.colour("wall", 1))
        pane = self.colour("window glass", 1.5)
        (step_x, step_y), fill = rng.uniform((1.5, 2.5), (5, 4.5)), rng.uniform(0.3, 0.8)
        for left in np.arange(x + 0.5, x + wide - step_x, step_x)[:24]:
            for low in np.arange(0.9, tall - step_y, step_y)[:8]:
                colour = (250, 225, 160, pane[3]) if self.night and rng.random() < 0.25 else pane
                corner = left + fill * step_x, low + fill * step_y, z
                canvas.polygon(self.camera.rectangle((left, low, z), corner), colour)
        return canvas.sprite(x, z, z)

    def ground(self) -> Sprite:
        """Draw a road with its lines, a crossing, and patches of other ground."""
        rng, box = self.rng, (FRAME_LEFT, self.camera.horizon, FRAME_LEFT + FRAME_WIDTH, FRAME_HEIGHT)
        canvas = Canvas(box, 1)

        def fill(left: float, near: float, right: float, far: float, colour: Paint) -> None:
            canvas.polygon(self.camera.rectangle((left, 0, near), (right, 0, far)), colour)

        fill(-999, 2, 999, 999, self.colour(GROUND_MATERIALS, 0.5))
        middle, half, line = rng.normal(0, 2.5), rng.uniform(2.5, 7), self.colour("line", 0.7)
        verge, road = self.colour(GROUND_MATERIALS, 0.7), self.colour("road", 0.6)
        for reach, colour in ((1.3, verge), (1.03, line), (1, road)):
            fill(middle - reach * half, 2, middle + reach * half, 300, colour)
        for z in np.arange(3, 60, 5.0) if rng.random() < 0.6 else ():
            fill(middle - 0.08, z, middle + 0.08, z + 2.5, line)
        zebra = rng.uniform(4, 25)
        for x in np.arange(middle - half, middle + half, 0.9) if rng.random() < 0.4 else ():
            fill(x, zebra, x + 0.45, zebra + 3, line)
        for x, z, wide, long in rng.uniform((-9, 4, 0.1, 0.2), (9, 40, 5, 12), (rng.integers(0, 5), 4)):
            fill(x, z, x + wide, z + long, self.colour(GROUND_MATERIALS, 0.9))
        return canvas.sprite()

    def leaves(self, x: float, z: float) -> Sprite:
        """Draw a bush, or the crown of a tree, with a ragged edge and holes."""
        rng = self.rng
        (wide, tall), low = rng.uniform((0.4, 0.3), (3, 1.5)), 0.0
        if rng.random() < 0.4:
            (wide, tall), low = rng.uniform((1, 1), (4, 3)), rng.uniform(1.6, 4)
        metre, (foot_x, foot_y) = FOCAL_LENGTH / z, self.camera.project(x, low, z)
        left, top = max(0, int(foot_x - wide * metre)), max(0, int(foot_y - tall * metre))
        right, bottom = min(SCENE_WIDTH, int(foot_x + wide * metre)), min(FRAME_HEIGHT, int(foot_y))
        height, width = max(1, bottom - top), max(1, right - left)
        aside = np.linspace(left - foot_x, right - foot_x, width) / (wide * metre)
        up = np.linspace(foot_y - top, foot_y - bottom, height)[:, None] / (tall * metre)
        inside = 1 - aside**2 - (2 * up - 1 if low else up) ** 2
        alpha = np.float32(inside + 0.35 * self.texture(height, width) > 0.1)[..., None]
        speckle = (1 + rng.uniform(0.05, 0.4) * self.texture(height, width)).clip(0.3, 2)[..., None]
        pixels = alpha * np.float32(self.colour(TREE_MATERIALS, 0.8)) * speckle ** np.float32((1, 1, 1, 0.4))
        return Sprite(left, top, pixels, alpha, x, z, z)

    def decoy(self, x: float, z: float) -> Sprite:
        """Draw an object that is no person. Many are upright, and as warm and as tall as people."""
        rng, kind = self.rng, self.rng.choice(DECOYS, p=DECOY_SHARES)
        if kind == "leaves":
            return self.leaves(x, z)
        if kind in ("post", "car"):
            sprite = (draw_post if kind == "post" else draw_car)(rng, self.camera, False, x, z)
            sprite.pixels[..., 3] *= rng.uniform(0.5, 1.6)
            return sprite
        metre, (left, foot) = FOCAL_LENGTH / z, self.camera.project(x, 0, z)
        box = left - 3 * metre, 0, left + 3 * metre, foot + 0.4 * metre + 2
        canvas = Canvas(box, 2, (left, foot), (metre, -metre))
        colour = self.colour("bark metal sign wall cloth door", 1.3)
        wide, tall, lean = rng.uniform(0.1, 0.4), rng.uniform(0.7, 2.3), rng.normal(0, 0.25)
        if kind == "trunk":
            canvas.stroke([(0, 0), (lean, rng.uniform(2, 6))], wide, colour)
            canvas.stroke([(lean / 2, 1.5), (lean + rng.normal(0, 0.8), 4)], wide / 2, colour)
        elif kind == "board":
            low = rng.uniform(0, 2)
            canvas.stroke([(0, 0), (0, low)], 0.1, colour)
            corners = np.multiply([(-2, 0), (2, 0), (2, 1), (-2, 1)], (wide, tall)) + (0, low)
            canvas.polygon(corners, self.colour("sign wall", 2))
        elif kind == "heap":  # body-sized parts in random positions
            for _ in range(rng.integers(1, 6)):
                part = self.colour("cloth top bottom skin", 1)
                canvas.ellipse(rng.uniform((-0.2, 0.2), (0.2, tall)), *rng.uniform(0.05, (0.3, 0.6)), part)
        else:
            for step in np.arange(-2, 2, rng.uniform(0.2, 1.2)):
                canvas.stroke([(step, 0), (step, tall / 2)], 0.04 if kind == "fence" else wide / 2, colour)
            if kind == "fence":
                canvas.stroke([(-2, tall / 2), (2, tall / 2)], 0.06, colour)
        return canvas.sprite(x, z, z)

    def shadow(self, x: float, z: float) -> Sprite:
        """Draw the shadow of an object that stands at (x, z); it belongs in visible only."""
        foot, metre = np.array(self.camera.project(x, 0, z)), FOCAL_LENGTH / z
        canvas = Canvas((*(foot - 2 * metre), *(foot + 2 * metre)), 1, foot, (metre, metre))
        wide, flat = self.rng.uniform((0.3, 0.04), (1.2, 0.12))
        canvas.ellipse((self.rng.normal(0, 0.4), 0), wide, flat, (0, 0, 0, 0))
        sprite = canvas.sprite()
        sprite.alpha *= np.float32(self.rng.uniform(0.2, 0.6))
        return sprite

    def pedestrian(self, label: str, x: float, z: float) -> Sprite:
        """Draw a person or cyclist in a random pose, seen from a random side.

        Clothes have any colour, and a heat near the body's, which is near `HEAT_MEAN`; skin is mostly warmer.
        """
        rng, paints = self.rng, {}
        body = rng.normal(self.warmth, 0.3)
        for part in FIGURE_MATERIALS:
            offset = rng.uniform(*{"skin": (0, 1.6), "hair": (-1, 0.6)}.get(part, (0, 0)))
            heat = HEAT_MEAN + HEAT_STD * (body + self.contrast * (rng.normal(0, 0.8) + offset))
            colour = sample_paint(rng, part, False)[:3]
            if part in ("top", "bottom", "cloth", "shoe") and rng.random() < 0.5:
                colour = rng.integers(8, 240, 3) * rng.uniform(0.2, 1)
            paints[part] = (*map(int, colour), int(np.clip(heat, 5, 240)))
        turn, stride = rng.uniform(0, 2 * np.pi), rng.random() < 0.7
        move = np.cos(turn), np.sin(turn) + 1e-3, stride * rng.uniform(0, 2 * np.pi)
        body = rng.normal(1.68, 0.1), rng.uniform(1.05, 1.6)
        coat = rng.uniform(0.05, 0.3) * (rng.random() < 0.3)
        figure = Figure(label, x, z, *move, *body, *(rng.random(2) < 0.4), paints, coat)
        return draw_figure(figure, self.camera)

    def layout(self) -> list[tuple[float, str, float]]:
        """Sample (z, label, x) of each person and decoy, far to near, in metres; a decoy's label is ""."""
        rng, places = self.rng, []
        for _ in range(rng.choice(6, p=(0.05, 0.1, 0.2, 0.25, 0.2, 0.2))):
            z = FOCAL_LENGTH * 1.7 / np.clip(74 * np.exp(rng.normal(0, 0.5)), 30, 260)
            x, gap = rng.uniform(-330, 330) / FOCAL_LENGTH * z, rng.uniform((0.3, 0), (0.9, 1.5))
            for _ in range(rng.integers(2, 8) if self.world.crowds and rng.random() < 0.3 else 1):
                places.append((z, "cyclist" if rng.random() < 0.05 else "person", x))
                x, z = x + gap[0] * rng.uniform(0.6, 1.4), max(4.0, z + gap[1] * rng.normal())
        for _ in range(rng.integers(4, 24 if self.hard else 18)):
            z = np.exp(rng.uniform(np.log(7), np.log(45)))
            places.append((z, "", rng.uniform(-360, 360) / FOCAL_LENGTH * z))
        return sorted(places, reverse=True)

    def compose(self) -> tuple[np.ndarray, list[Annotated]]:
        """Render a street, (FRAME_HEIGHT, FRAME_WIDTH, 4) float32, and annotate its people in LWIR pixels.

        Persons of whom 65% or more are hidden are labelled "person?".
        """
        scene, parallax, people = self.background(), self.rng.uniform(-2, 2), []
        topmost = np.full(scene.shape[:2], -1, np.int16)  # index of the person seen in each pixel
        for z, label, x in self.layout():
            sprite = self.finish(self.pedestrian(label, x, z) if label else self.decoy(x, z), z)
            if not self.night and self.rng.random() < 0.6:
                self.shadow(x, z).paste(scene, slice(0, 3), -FRAME_LEFT)
            sprite.paste(scene, slice(0, 3), round(parallax * (0.5 + 8 / z)) - FRAME_LEFT)
            window, part = sprite.paste(scene, slice(3, 4), -FRAME_LEFT)
            solid = sprite.alpha[part][..., 0] > 0.4
            topmost[window][solid] = len(people) if label else -1
            people += [(label, window, solid)] if label else []
        objects = []
        for index, (label, (rows, columns), solid) in enumerate(people):
            seen = np.mean(topmost[rows, columns][solid] == index) if solid.any() else 0
            if seen > 0.05 and np.ptp(np.nonzero(solid)[1]) > 3:
                label = "person?" if label == "person" and seen < 0.35 else label
                box = box_with_margin(solid, columns.start, rows.start)
                objects.append((label, box, 0 if seen > 0.9 else 1 if seen > 0.5 else 2))
        return scene, objects

    def expose(self, scene: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Simulate what the cameras record of a scene: visible (h, w, 3) and LWIR (h, w), uint8."""
        rng, extra = self.rng, float(self.world.haze)  # extra scales blur and noise above the minimum
        y, x = np.mgrid[: FRAME_HEIGHT // 8, : FRAME_WIDTH // 8] * 8.0
        light, glow = np.full(y.shape, rng.uniform(0.6, 1.25)), np.zeros(y.shape)
        if self.night:
            light[:] = np.exp(rng.uniform(np.log(0.12), np.log(0.8)))
            light += rng.uniform(0, 0.6) / (1 + ((x - 320) / 260) ** 2 + ((y - 400) / 90) ** 2) ** 2
            for left, top, reach in rng.uniform((0, 60, 3), (FRAME_WIDTH, 300, 12), (rng.integers(12), 3)):
                distance = ((x - left) ** 2 + (y - top) ** 2) / reach**2
                glow += rng.uniform(80, 300) / (1 + distance) ** 1.5
                light += rng.uniform(0, 0.5) / (1 + distance / 80)
        tint = rng.uniform(0.8, 1.15, 3) * ((1.1, 1, 0.7) if self.night and rng.random() < 0.6 else 1)
        visible = (scene[..., :3] * enlarge(light)[..., None] + enlarge(glow)[..., None]) * np.float32(tint)
        visible = 255 * (visible.clip(0, 255) / 255) ** np.float32(rng.uniform(0.75, 1.3))
        visible = blur(visible, rng.uniform(0.5, 0.6 + extra))
        grain = rng.standard_normal((FRAME_HEIGHT + 32, FRAME_WIDTH + 32), np.float32)
        noise = rng.uniform(1, 2 + (9 if self.night else 4) * extra)
        for channel, (v, u) in enumerate(rng.integers(32, size=(3, 2))):
            visible[..., channel] += noise * grain[v : v + FRAME_HEIGHT, u : u + FRAME_WIDTH]
        heat = scene[..., 3] * (1 + 0.06 * rng.normal() * enlarge(x / FRAME_WIDTH + y / FRAME_HEIGHT - 1))
        grey = np.clip(rng.lognormal(np.log(36), 0.45), *LWIR_MEAN_RANGE)
        low, high = LWIR_STD_RANGE
        spread = np.clip(rng.lognormal(np.log(16.5), 0.35), low, min(high, 1.1 * grey))
        heat = blur(heat, rng.uniform(0.6, 0.7 + extra))
        heat = (heat - heat.mean()) * (spread / heat.std()) + grey
        for lines in (FRAME_WIDTH, (FRAME_HEIGHT, 1)):
            heat += rng.uniform(0, 0.5 * extra) * rng.standard_normal(lines, np.float32)
        heat += rng.uniform(0.1, 0.2 + 0.8 * extra) * grain[:FRAME_HEIGHT, :FRAME_WIDTH]
        return visible.clip(0, 255).astype(np.uint8), heat.clip(0, 255).astype(np.uint8)


def enlarge(field: np.ndarray) -> np.ndarray:
    """Resize a field (h, w) to the frame, (FRAME_HEIGHT, FRAME_WIDTH) float32."""
    image = Image.fromarray(np.float32(field))
    return np.array(image.resize(FRAME_SIZE, Image.Resampling.BILINEAR))


def blur(pixels: np.ndarray, radius: float) -> np.ndarray:
    """Blur grey levels (h, w) or colours (h, w, 3); the result is float32 of whole numbers."""
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return np.float32(image.filter(ImageFilter.GaussianBlur(radius)))


def box_with_margin(solid: np.ndarray, left: int, top: int) -> tuple[int, ...]:
    """The xywh box of a mask (h, w) at (left, top), with an annotator's margins, clipped to the frame."""
    y, x = np.nonzero(solid)
    dx, dy = (round(margin * int(np.ptp(y) + 1)) for margin in BOX_MARGINS)
    left, right = max(0, left + x.min() - dx), min(FRAME_WIDTH, left + x.max() + 1 + dx)
    top, bottom = max(0, top + y.min() - dy), min(FRAME_HEIGHT, top + y.max() + 1 + dy)
    return tuple(map(int, (left, top, right - left, bottom - top)))


def render_frame(world: World, seed: int, set_id: int, number: int) -> Iterator[RenderedFrame]:
    """Render one frame; an iterator of one item, as `render_demo.render_video` has several."""
    renderer = FrameRenderer(seed, set_id, number, world)
    scene, objects = renderer.compose()
    images = {}
    for modality, pixels in zip(("visible", "lwir"), renderer.expose(scene), strict=True):
        images[modality] = Image.fromarray(pixels), int(renderer.rng.integers(70, 96))
    yield frame_id(set_id, number), images, {"": objects}


def frame_id(set_id: int, number: int) -> str:
    """The id of a set's frame."""
    return f"set{set_id:02}/V{number // FRAMES_PER_VIDEO:03}/I{number % FRAMES_PER_VIDEO:05}"

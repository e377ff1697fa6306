"""Drawing primitives of the drawn sets: materials, a canvas, a pinhole camera, people, cars and posts.

Scenes are laid out in metres. Every shape is drawn once into four channels: red, green, blue and heat
(LWIR's grey level). So both images have the same outlines, and differ in contrast as the two cameras do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from kaist.annotations import FRAME_HEIGHT

SCENE_WIDTH = 800  # pixels; wider than the frame, so that the camera can pan within a video
FOCAL_LENGTH = 700.0  # pixels
CAMERA_HEIGHT, LAMP_HEIGHT = 1.9, 5.2  # metres above the ground

Points = Sequence[tuple[float, float]]
Paint = tuple[int, int, int, int]  # red, green, blue, heat; each 0..255
Annotated = tuple[str, Sequence[int], int]  # label; xywh box, pixels; occlusion 0, 1 or 2
# Frame id; modality -> image and JPEG quality; modality, or "" for both -> annotated objects.
RenderedFrame = tuple[str, Mapping[str, tuple[Image.Image, int]], Mapping[str, list[Annotated]]]

# material: visible colours, heat by day (low, high), heat by night (low, high)
MATERIALS = {
    "sky": ("#bcd0e8 #cdd4de #ded6e2", (10, 18), (5, 9)),
    "road": ("#545458 #605e5c #4a4c50", (80, 96), (38, 44)),
    "pavement": ("#8e8880 #7e7c7a #968476", (88, 106), (42, 48)),
    "grass": ("#52683a #5e6a42", (66, 78), (30, 36)),
    "line": ("#d8d6ce", (72, 80), (36, 40)),
    "wall": ("#b09c86 #98624e #beb9b2 #848890 #a68e68", (84, 104), (42, 52)),
    "window": ("#3e4c5c #303a46 #60707c", (58, 132), (48, 88)),
    "door": ("#463026 #363e4a #786e62", (104, 136), (46, 62)),
    "cloth": ("#b2302a #286096 #2c7a54 #d6a432", (92, 128), (42, 54)),
    "leaf": ("#3a542c #4a6230 #30482e", (62, 78), (40, 48)),
    "bark": ("#544436 #4a423c", (92, 122), (44, 54)),
    "metal": ("#808486 #626a62 #46504c", (94, 134), (38, 50)),
    "sign": ("#2452aa #be2828 #e2be3c #e8e8e8", (98, 136), (38, 48)),
    "car": ("#e2e2de #282a2e #969a9e #882422 #2c426e #ccc45a", (64, 128), (34, 46)),
    "glass": ("#2e3840", (44, 58), (24, 30)),
    "tyre": ("#1a1a1c", (100, 126), (60, 92)),
    "under": ("#141416", (84, 92), (46, 56)),
    "headlamp": ("#f0ecd6", (90, 120), (70, 90)),
    "taillamp": ("#c41818", (80, 100), (44, 56)),
    "skin": ("#e2b89c #cc9e7e #a07054 #704e3a", (118, 138), (150, 178)),
    "hair": ("#221c1a #463224 #786042 #96928e", (102, 122), (112, 138)),
    "top": ("#c4282c #264896 #e8e6e0 #222228 #3c784e #deac34 #783e78", (86, 120), (88, 126)),
    "bottom": ("#2a324e #1e1e22 #4e4a46 #948468 #56627a #c8c4ba", (80, 112), (78, 112)),
    "shoe": ("#1e1c1c #d2d0cc #563a2a", (82, 96), (56, 72)),
}

# A figure is painted with the first six, a cyclist's bicycle with the last two.
FIGURE_MATERIALS = ("skin", "hair", "top", "bottom", "shoe", "cloth", "metal", "tyre")
# A car seen from its side: metres from its near end and above the ground.
CAR_OUTLINE = (0, 0.3), (0, 0.9), (0.4, 1.0), (0.9, 1.42), (2.6, 1.45), (3.3, 1), (4.2, 0.85), (4.3, 0.3)


def sample_paint(rng: np.random.Generator, material: str, night: bool) -> Paint:
    """Sample a material's visible colour and heat."""
    colours, by_day, by_night = MATERIALS[material]
    heat = rng.uniform(*(by_night if night else by_day))
    colour = np.array(tuple(bytes.fromhex(rng.choice(colours.split())[1:]))) + rng.normal(0, 7)
    return shade((*colour, heat), 1.0)


def shade(colour: Paint, light: float, warmth: float = 1.0) -> Paint:
    """Scale a paint's visible channels by `light` and its heat by `warmth`; clipped to 0..240."""
    lit = np.multiply(colour, (light, light, light, warmth))
    return tuple(np.clip(lit, 0, 240).astype(int).tolist())


@dataclass
class Sprite:
    """An antialiased picture of an object, with its position in the scene."""

    left: int  # upper left corner, scene pixels
    top: int
    pixels: np.ndarray  # (h, w, 4) float32, 0..255, premultiplied by alpha
    alpha: np.ndarray  # (h, w, 1) float32, 0..1
    x: float  # metres to the right of the camera
    z: float  # metres to the object's near end
    z_far: float  # metres to its far end
    bulbs: Sequence[tuple[float, float, float]] = ()  # (x, y, radius) of its lit lamps, scene pixels

    def paste(
        self, scene: np.ndarray, channels: slice, shift: int, light: np.ndarray | None = None
    ) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Blend the sprite into some channels of a scene (h, w, 4) in place, `shift` pixels to the right.

        light: (h, w, 3) factors of its pixels. Returns the slices of the scene, and of the sprite.
        """
        corner = np.array((self.top, self.left + shift))
        start = np.maximum(corner, 0)
        stop = np.maximum(np.minimum(corner + self.alpha.shape[:2], scene.shape[:2]), start)
        in_scene = tuple(map(slice, start, stop))
        in_sprite = tuple(map(slice, start - corner, stop - corner))
        target, pixels = scene[in_scene][..., channels], self.pixels[in_sprite][..., channels]
        target *= 1 - self.alpha[in_sprite]
        target += pixels if light is None else pixels * light[in_scene]
        return in_scene, in_sprite


class Canvas:
    """A patch of the scene to draw shapes on, at `oversample` times the scene's resolution.

    box: the patch, xyxy scene pixels; what is outside of the scene is not drawn. Coordinates are offsets
    (x, y) from `origin` in units of `unit` scene pixels. Pillow's CMYK mode holds red, green, blue and heat,
    because Pillow would take the fourth channel of RGBA for transparency when it shrinks the patch.
    """

    def __init__(
        self,
        box: Sequence[float],
        oversample: int = 2,
        origin: Sequence[float] = (0, 0),
        unit: Sequence[float] = (1, 1),
    ) -> None:
        left, top, right, bottom = box
        self.left, self.top = max(0, int(left)), max(0, int(top))
        self.oversample = oversample
        self.origin = np.subtract(origin, (self.left, self.top)) * oversample
        self.unit = np.multiply(unit, oversample)
        size = min(int(right), SCENE_WIDTH) - self.left, min(int(bottom), FRAME_HEIGHT) - self.top
        size = [max(1, side) * oversample for side in size]
        self.image, self.mask = Image.new("CMYK", size), Image.new("L", size)
        self.pens = ImageDraw.Draw(self.image), ImageDraw.Draw(self.mask)

    def _draw(self, shape: str, corners: np.ndarray, colour: Paint, **kwargs) -> None:
        for pen, fill in zip(self.pens, (colour, 255), strict=True):
            getattr(pen, shape)(corners.ravel().tolist(), fill=fill, **kwargs)

    def polygon(self, points: Points, colour: Paint) -> None:
        """Draw a filled polygon."""
        self._draw("polygon", self.origin + np.array(points) * self.unit, colour)

    def ellipse(self, centre: tuple[float, float], rx: float, ry: float, colour: Paint) -> None:
        """Draw a filled ellipse with semi-axes rx and ry."""
        middle, radii = self.origin + np.multiply(centre, self.unit), np.abs(self.unit) * (rx, ry)
        self._draw("ellipse", np.stack([middle - radii, middle + radii]), colour)

    def stroke(self, points: Points, width: float, colour: Paint) -> None:
        """Draw a thick line through the points, with round joints and ends."""
        n_pixels = max(1, round(width * abs(self.unit[1])))
        self._draw("line", self.origin + np.array(points) * self.unit, colour, width=n_pixels)
        for point in points:
            self.ellipse(point, width / 2, width / 2, colour)

    def sprite(self, x: float = 0, z: float = 0, z_far: float = 0, bulbs: Sequence = ()) -> Sprite:
        """Shrink the patch to scene pixels and crop its empty borders."""
        mask = self.mask.reduce(self.oversample)
        left, top, *_ = box = mask.getbbox() or (0, 0, 1, 1)
        pixels = np.array(self.image.reduce(self.oversample).crop(box), np.float32)
        alpha = np.array(mask.crop(box), np.float32)[..., None] / 255
        return Sprite(self.left + left, self.top + top, pixels, alpha, x, z, z_far, bulbs)


@dataclass(frozen=True)
class Camera:
    """A pinhole camera at CAMERA_HEIGHT. World axes are x to the right, y up and z ahead, in metres."""

    horizon: float  # scene pixels from the top

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Project a point to scene pixels (x, y)."""
        return SCENE_WIDTH / 2 + FOCAL_LENGTH * x / z, self.horizon + FOCAL_LENGTH * (CAMERA_HEIGHT - y) / z

    def rectangle(self, a: Sequence[float], b: Sequence[float]) -> Points:
        """Project the corners of a rectangle with opposite corners a and b (x, y, z).

        It is a wall along the street if they share x; otherwise its lower and upper edges run across.
        """
        (x0, y0, z0), (x1, y1, z1) = a, b
        corners = (a, (x1, y0, z0 if x0 != x1 else z1), b, (x0, y1, z1 if x0 != x1 else z0))
        return [self.project(*corner) for corner in corners]


@dataclass
class Figure:
    """A pedestrian or cyclist. Between the frames of a video only x, z and phase change."""

    label: str  # annotated class; a "cyclist" is drawn on a bicycle
    x: float  # metres
    z: float
    vx: float  # metres per frame
    vz: float
    phase: float  # of the gait, radians
    size: float  # body height, metres
    breadth: float  # factor of the body's width; 1 is slim
    bare_arms: bool
    bag: bool
    paints: dict[str, Paint]  # of `FIGURE_MATERIALS`
    coat: float = 0.0  # length below the hips, body heights


def draw_figure(figure: Figure, camera: Camera) -> Sprite:
    """Draw a figure at its position, with its limbs at the phase of its gait."""
    x, y = camera.project(figure.x, 0, figure.z)
    height = FOCAL_LENGTH * figure.size / figure.z  # pixels
    box = x - 0.65 * height, y - 1.15 * height - 2, x + 0.65 * height, y + 3
    facing = 1.0 if figure.vx >= 0 else -1.0
    canvas = Canvas(box, 4 if height < 110 else 2, (x, y), (facing * height, -height))
    side = abs(figure.vx) / np.hypot(figure.vx, figure.vz)  # 0 seen from the front or behind, 1 from the side
    front, broad, phase, paints = 1 - side, figure.breadth, figure.phase, figure.paints
    ride = float(figure.label == "cyclist")
    (hip_x, hip_y) = hip = (-0.06 * ride * side, 0.5 + 0.08 * ride)
    (neck_x, neck_y) = neck = (0.14 * ride * side, 0.815 + 0.08 * ride)

    def chain(root: tuple[float, float], *bones: tuple[float, float]) -> Points:
        joints = [root]  # a bone is its length and its angle forward from straight down
        for length, angle in bones:
            bone = length * side * np.sin(angle), -length * np.cos(angle)
            joints.append((joints[-1][0] + bone[0], joints[-1][1] + bone[1]))
        return joints

    def leg(sign: int, light: float) -> None:
        thigh, bend = 0.5 * np.sin(phase) * sign, 0.12 + 0.55 * max(0.0, np.cos(phase) * sign)
        if ride:
            thigh, bend = 0.95 + 0.7 * thigh, 1.15 + 0.3 * np.cos(phase) * sign
        root = (hip[0] + sign * 0.05 * broad * front, hip[1])
        root, knee, foot = chain(root, (0.245, thigh), (0.23, thigh - bend))
        canvas.stroke([knee, foot], 0.062 * broad, shade(paints["bottom"], light))
        canvas.stroke([root, knee], 0.088 * broad, shade(paints["bottom"], light))
        canvas.stroke([foot, (foot[0] + 0.06 * side, foot[1])], 0.05, shade(paints["shoe"], light))

    def arm(sign: int, light: float) -> None:
        swing = 0.85 if ride else -0.55 * np.sin(phase) * sign
        root = (neck[0] + sign * (0.105 * broad * front + 0.012), neck[1] - 0.02)
        root, elbow, hand = np.array(chain(root, (0.16, swing), (0.15, swing + 0.45)))
        elbow, hand = elbow + (0.03 * front * sign, 0), hand + (0.04 * front * sign, 0)
        sleeve, skin = shade(paints["top"], light), shade(paints["skin"], light)
        canvas.stroke([elbow, hand], 0.046 * broad, skin if figure.bare_arms else sleeve)
        canvas.stroke([root, elbow], 0.06 * broad, sleeve)
        canvas.ellipse(hand, 0.026, 0.03, skin)

    if ride:
        turn = np.linspace(0, 2 * np.pi, 17)
        for hub in (-0.3 * side, 0.3 * side):
            rim = hub + max(0.19 * side, 0.02) * np.cos(turn), 0.2 + 0.18 * np.sin(turn)
            canvas.stroke(np.stack(rim, 1), 0.028, paints["tyre"])
        bars = (-0.3, 0.2), (-0.06, 0.5), (0.02, 0.14), (0.25, 0.52), (0.24, 0.6), (0.3, 0.2)
        canvas.stroke([(x * side, y) for x, y in bars], 0.024, paints["metal"])
    arm(-1, 0.72)
    leg(-1, 0.76)
    leg(1, 1.0)
    chest, waist = (0.075 + 0.045 * front) * broad, (0.066 + 0.02 * front) * broad
    low = (hip_x, hip_y - 0.03, waist)
    half = (neck_x, neck_y, 0.6 * chest), (neck_x, neck_y - 0.05, chest), low
    left, right = ([(x + sign * wide, y) for x, y, wide in half] for sign in (-1, 1))
    canvas.polygon(left + right[::-1], paints["top"])
    if figure.coat:
        hem = [(hip_x + sign * 1.3 * waist, hip_y - figure.coat) for sign in (1, -1)]
        canvas.polygon([left[-1], right[-1], *hem], paints["top"])
    if figure.bag:
        canvas.ellipse((neck_x - 0.1 * broad * side, neck_y - 0.13), 0.06, 0.1, paints["cloth"])
    arm(1, 1.0)
    head = (neck_x + 0.015 * side, neck_y + 0.105)
    canvas.stroke([(neck_x, neck_y - 0.01), head], 0.055, shade(paints["skin"], 0.85))
    canvas.ellipse(head, 0.058, 0.074, paints["skin"])
    crown = 0.074 if figure.vz > 0 else 0.045  # from behind, hair covers the whole head
    canvas.ellipse((head[0] - 0.012 * side, head[1] + 0.078 - crown), 0.06, crown, paints["hair"])
    return canvas.sprite(figure.x, figure.z, figure.z)


def draw_car(rng: np.random.Generator, camera: Camera, night: bool, x: float, z: float) -> Sprite:
    """Draw a car with its near end at (x, z): CAR_OUTLINE extended sideways to the car's width."""
    parts = ("car", "glass", "tyre", "under", "line")
    body, glass, tyre, under, plate = (sample_paint(rng, part, night) for part in parts)
    outline, oncoming = np.array(CAR_OUTLINE) * (1, rng.choice([1.0, 1.25])), rng.random() < 0.5
    length, inner = CAR_OUTLINE[-1][0], x - 0.88 * np.sign(x)  # the side that the camera sees is at x = inner
    if oncoming:
        outline = np.array((length, 0)) - outline[::-1] * (1, -1)
    corners = [camera.project(x + w, h, z + d) for w in (-1, 1) for h in (0, 2) for d in (0, length)]
    canvas = Canvas((*np.min(corners, 0), *np.max(corners, 0)))

    def strip(middle: float, half: float, low: Sequence, high: Sequence, colour: Paint) -> None:
        left, right = x + middle - half, x + middle + half  # low and high are points as in CAR_OUTLINE
        a, b = (left, low[1], z + low[0]), (right, high[1], z + high[0])
        canvas.polygon(camera.rectangle(a, b), colour)

    def flank(points: Points, colour: Paint) -> None:
        canvas.polygon([camera.project(inner, up, z + along) for along, up in points], colour)

    strip(0, 0.8, (0, 0), (length, 0), under)
    strip(0, 0.84, (0.1, 0.02), (0, 0.4), under)
    for middle in (-0.7, 0.7):
        strip(middle, 0.12, (0.1, 0), (0.1, 0.4), tyre)
    for low, high in reversed(list(zip(outline[:-1], outline[1:], strict=True))):
        strip(0, 0.88, low, high, shade(body, 1.12 if high[0] - low[0] > 0.3 else 0.86))
        if high[1] - low[1] > 0.3 and low[1] > 0.9:  # the windscreen
            strip(0, 0.7, low + 0.12 * (high - low), low + 0.88 * (high - low), glass)
    flank(outline, shade(body, 0.95))
    cabin = outline[outline[:, 1] > 0.95]
    flank(cabin.mean(0) + (cabin - cabin.mean(0)) * 0.78, glass)
    turn = np.linspace(0, 2 * np.pi, 16)
    rim = np.stack([np.cos(turn), np.sin(turn)], 1)
    for hub in (0.8, length - 0.85):
        flank((hub, 0.33) + 0.33 * rim, tyre)
        flank((hub, 0.33) + 0.18 * rim, shade(body, 0.7))
    strip(0, 0.4, (0, 0.5), (0, 0.68), plate)
    bulbs, burning = [], night and rng.random() < 0.5
    for middle in (-0.68, 0.68):
        lamp = sample_paint(rng, "headlamp" if oncoming else "taillamp", night)
        strip(middle, 0.14, (0, 0.66), (0, 0.8), lamp)
        bulb = *camera.project(x + middle, 0.73, z), (0.35 if oncoming else 0.12) * FOCAL_LENGTH / z
        bulbs += [bulb] * burning
    return canvas.sprite(x, z, z + length, bulbs)


def draw_post(rng: np.random.Generator, camera: Camera, night: bool, x: float, z: float) -> Sprite:
    """Draw a lamp post, tree, road sign or cabinet. It occludes people, and resembles them in LWIR."""
    metre, foot, bulbs = FOCAL_LENGTH / z, camera.project(x, 0, z), []
    reach = np.array((2.4, 6.5)) * metre
    canvas = Canvas((*(foot - reach), *(foot + reach * (1, 0) + 1)), 2, foot, (metre, -metre))
    metal, face = sample_paint(rng, "metal", night), sample_paint(rng, "sign", night)
    kind = rng.choice(["lamp", "tree", "sign", "cabinet"], p=[0.2, 0.35, 0.25, 0.2])
    if kind == "lamp":
        arm = -1.2 * np.sign(x)
        canvas.stroke([(0, 0), (0, LAMP_HEIGHT), (arm, LAMP_HEIGHT + 0.2)], 0.15, metal)
        bulbs = [(*camera.project(x + arm, LAMP_HEIGHT, z), 0.35 * metre)] * night
    elif kind == "tree":
        canvas.stroke([(0, 0), (0.1, 3.2)], rng.uniform(0.22, 0.42), sample_paint(rng, "bark", night))
        for _ in range(80):
            leaf = shade(sample_paint(rng, "leaf", night), rng.uniform(0.6, 1.25))
            canvas.ellipse(rng.normal((0, 4.3), (0.75, 0.6)), *rng.uniform(0.2, 0.42, 2), leaf)
    elif kind == "sign":
        canvas.stroke([(0, 0), (0, 2.2)], 0.09, metal)
        for radius, colour in ((0.32, (235, 235, 235, face[3])), (0.26, face)):
            canvas.ellipse((0, 2.1), radius, radius, colour)
    else:
        wide, tall = rng.uniform(0.25, 0.4), rng.uniform(1.1, 1.6)
        for top, colour in ((tall, shade(metal, 0.7)), (tall - 0.1, metal)):
            canvas.polygon([(-wide, 0), (wide, 0), (wide, top), (-wide, top)], colour)
    return canvas.sprite(x, z, z, bulbs)

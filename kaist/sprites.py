"""A street of the demo set: drawn in four channels, seen by a pinhole camera.

Each street is laid out in metres. Every shape is drawn once, in red, green, blue and heat (the grey
level LWIR shows), so the two pictures agree in outline and differ in contrast as the two cameras
do. By day people are crisp in visible, and LWIR is full of sun-warmed walls, posts and doors; by
night visible is dark away from lamps, and LWIR shows people warm over a cool street.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kaist.annotations import FRAME_HEIGHT

SCENE_WIDTH = 800  # pixels; wider than the frame, so that the camera can pan within a video
FOCAL, EYE = 700.0, 1.9  # pixels; metres, the camera's height
ROAD, LAMP_HEIGHT = 4.6, 5.2  # metres: half the road's width; lamps above the ground

Points = Sequence[tuple[float, float]]
Paint = tuple[int, int, int, int]  # red, green, blue, heat; each 0..255

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

PARTS = ("skin", "hair", "top", "bottom", "shoe", "cloth", "metal", "tyre")  # of a figure, bicycle
LIT = (255, 214, 140), (238, 240, 255), (255, 170, 80), (140, 255, 190)  # nothing else is above 240


def paint(rng: np.random.Generator, material: str, night: bool) -> Paint:
    """One piece of a material: a visible colour and a heat drawn from its ranges."""
    colours, by_day, by_night = MATERIALS[material]
    heat = rng.uniform(*(by_night if night else by_day))
    colour = np.array(tuple(bytes.fromhex(rng.choice(colours.split())[1:]))) + rng.normal(0, 7)
    return shade((*colour, heat), 1.0)


def shade(colour: Paint, light: float, warmth: float = 1.0) -> Paint:
    """The same paint under more or less light, and warmed or cooled."""
    lit = np.multiply(colour, (light, light, light, warmth))
    return tuple(np.clip(lit, 0, 240).astype(int).tolist())


@dataclass
class Sprite:
    """A drawn thing in its place in the scene, antialiased.

    pixels: (h, w, 4) float32, premultiplied by alpha (h, w, 1), 0..1. left, top: scene pixels of
    the upper left corner. x, z, end: metres to the right, to the near and to the far end.
    bulbs: (x, y, radius) of its burning lamps, scene pixels.
    """

    left: int
    top: int
    pixels: np.ndarray
    alpha: np.ndarray
    x: float
    z: float
    end: float
    bulbs: Sequence[tuple[float, float, float]] = ()

    def paste(
        self, scene: np.ndarray, channels: slice, shift: int, light: np.ndarray | None = None
    ) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Lays it over some channels of the scene in place; returns windows (scene, sprite)."""
        corner = np.array((self.top, self.left + shift))
        start = np.maximum(corner, 0)
        stop = np.maximum(np.minimum(corner + self.alpha.shape[:2], scene.shape[:2]), start)
        there = tuple(map(slice, start, stop))
        here = tuple(map(slice, start - corner, stop - corner))
        target, pixels = scene[there][..., channels], self.pixels[here][..., channels]
        target *= 1 - self.alpha[here]
        target += pixels if light is None else pixels * light[there]
        return there, here


class Canvas:
    """Draws shapes on a patch `oversample` times finer than the scene.

    Shapes are given in units of `unit` (x, y) scene pixels from `origin`: the scene's own pixels by
    default, body heights for a figure. CMYK stands for red, green, blue, heat: Pillow's plain four
    8-bit channels (in RGBA it would take heat for transparency when it shrinks the patch).
    """

    def __init__(
        self,
        box: Sequence[float],
        oversample: int = 2,
        origin: Sequence[float] = (0, 0),
        unit: Sequence[float] = (1, 1),
    ) -> None:
        from PIL import Image, ImageDraw

        left, top, right, bottom = box  # scene pixels; what lies outside the scene is not drawn
        self.left, self.top = max(0, int(left)), max(0, int(top))
        self.oversample = oversample
        self.origin = np.subtract(origin, (self.left, self.top)) * oversample
        self.unit = np.multiply(unit, oversample)
        size = min(int(right), SCENE_WIDTH) - self.left, min(int(bottom), FRAME_HEIGHT) - self.top
        size = [max(1, side) * oversample for side in size]
        self.image, self.mask = Image.new("CMYK", size), Image.new("L", size)
        self.pens = ImageDraw.Draw(self.image), ImageDraw.Draw(self.mask)

    def _draw(self, shape: str, corners: np.ndarray, colour: Paint, **how) -> None:
        for pen, fill in zip(self.pens, (colour, 255), strict=True):
            getattr(pen, shape)(corners.ravel().tolist(), fill=fill, **how)

    def polygon(self, points: Points, colour: Paint) -> None:
        """A filled polygon."""
        self._draw("polygon", self.origin + np.array(points) * self.unit, colour)

    def ellipse(self, centre: tuple[float, float], rx: float, ry: float, colour: Paint) -> None:
        """A filled ellipse with half axes rx, ry."""
        middle, reach = self.origin + np.multiply(centre, self.unit), np.abs(self.unit) * (rx, ry)
        self._draw("ellipse", np.stack([middle - reach, middle + reach]), colour)

    def limb(self, points: Points, width: float, colour: Paint) -> None:
        """A thick line through the points with round joints and ends."""
        thick = max(1, round(width * abs(self.unit[1])))
        self._draw("line", self.origin + np.array(points) * self.unit, colour, width=thick)
        for point in points:
            self.ellipse(point, width / 2, width / 2, colour)

    def sprite(self, x: float = 0, z: float = 0, end: float = 0, bulbs: Sequence = ()) -> Sprite:
        """The patch shrunk to scene pixels, without empty borders."""
        mask = self.mask.reduce(self.oversample)
        left, top, *_ = box = mask.getbbox() or (0, 0, 1, 1)
        pixels = np.array(self.image.reduce(self.oversample).crop(box), np.float32)
        alpha = np.array(mask.crop(box), np.float32)[..., None] / 255
        return Sprite(self.left + left, self.top + top, pixels, alpha, x, z, end, bulbs)


@dataclass(frozen=True)
class Camera:
    """A pinhole camera EYE metres above the ground: x to the right, y up, z ahead."""

    horizon: float  # scene pixels from the top

    def see(self, x: float, y: float, z: float) -> tuple[float, float]:
        """World metres to scene pixels."""
        return SCENE_WIDTH / 2 + FOCAL * x / z, self.horizon + FOCAL * (EYE - y) / z

    def rectangle(self, a: Sequence[float], b: Sequence[float]) -> Points:
        """Corners of the rectangle between opposite corners a and b (x, y, z): a wall along the street
        where they share x; else its lower and upper edges run across."""
        (x0, y0, z0), (x1, y1, z1) = a, b
        corners = (a, (x1, y0, z0 if x0 != x1 else z1), b, (x0, y1, z1 if x0 != x1 else z0))
        return [self.see(*corner) for corner in corners]


@dataclass
class Figure:
    """Someone in the street, the same in every frame of the video but for place and gait."""

    kind: str  # one of KINDS
    x: float  # metres
    z: float
    vx: float  # metres a frame
    vz: float
    phase: float  # of the gait, radians
    size: float  # metres
    broad: float  # 1 is slim
    bare: bool  # arms
    bag: bool
    paints: dict[str, Paint]
    coat: float = 0.0  # how far it hangs below the hips, body heights


def draw_figure(figure: Figure, camera: Camera) -> Sprite:
    """The figure in its place: limbs by gait phase, clothes in visible, warm skin in LWIR."""
    x, y = camera.see(figure.x, 0, figure.z)
    tall = FOCAL * figure.size / figure.z  # pixels
    box = x - 0.65 * tall, y - 1.15 * tall - 2, x + 0.65 * tall, y + 3
    facing = 1.0 if figure.vx >= 0 else -1.0
    canvas = Canvas(box, 4 if tall < 110 else 2, (x, y), (facing * tall, -tall))  # body heights
    side = abs(figure.vx) / np.hypot(figure.vx, figure.vz)  # 0 seen head on, 1 from the side
    front, broad, phase, paints = 1 - side, figure.broad, figure.phase, figure.paints
    ride = float(figure.kind == "cyclist")
    (hip_x, hip_y) = hip = (-0.06 * ride * side, 0.5 + 0.08 * ride)
    (neck_x, neck_y) = neck = (0.14 * ride * side, 0.815 + 0.08 * ride)

    def chain(root: tuple[float, float], *bones: tuple[float, float]) -> Points:
        joints = [root]  # each bone: length, angle forward from straight down
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
        canvas.limb([knee, foot], 0.062 * broad, shade(paints["bottom"], light))
        canvas.limb([root, knee], 0.088 * broad, shade(paints["bottom"], light))
        canvas.limb([foot, (foot[0] + 0.06 * side, foot[1])], 0.05, shade(paints["shoe"], light))

    def arm(sign: int, light: float) -> None:
        swing = 0.85 if ride else -0.55 * np.sin(phase) * sign
        root = (neck[0] + sign * (0.105 * broad * front + 0.012), neck[1] - 0.02)
        root, elbow, hand = np.array(chain(root, (0.16, swing), (0.15, swing + 0.45)))
        elbow, hand = elbow + (0.03 * front * sign, 0), hand + (0.04 * front * sign, 0)
        sleeve, skin = shade(paints["top"], light), shade(paints["skin"], light)
        canvas.limb([elbow, hand], 0.046 * broad, skin if figure.bare else sleeve)
        canvas.limb([root, elbow], 0.06 * broad, sleeve)
        canvas.ellipse(hand, 0.026, 0.03, skin)

    if ride:
        turn = np.linspace(0, 2 * np.pi, 17)
        for hub in (-0.3 * side, 0.3 * side):
            rim = hub + max(0.19 * side, 0.02) * np.cos(turn), 0.2 + 0.18 * np.sin(turn)
            canvas.limb(np.stack(rim, 1), 0.028, paints["tyre"])
        bars = (-0.3, 0.2), (-0.06, 0.5), (0.02, 0.14), (0.25, 0.52), (0.24, 0.6), (0.3, 0.2)
        canvas.limb([(x * side, y) for x, y in bars], 0.024, paints["metal"])
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
    canvas.limb([(neck_x, neck_y - 0.01), head], 0.055, shade(paints["skin"], 0.85))
    canvas.ellipse(head, 0.058, 0.074, paints["skin"])
    crown = 0.074 if figure.vz > 0 else 0.045  # seen from behind there is only hair
    canvas.ellipse((head[0] - 0.012 * side, head[1] + 0.078 - crown), 0.06, crown, paints["hair"])
    return canvas.sprite(figure.x, figure.z, figure.z)


CAR = ((0, 0.3), (0, 0.9), (0.4, 1.0), (0.9, 1.42), (2.6, 1.45), (3.3, 1), (4.2, 0.85), (4.3, 0.3))


def draw_car(rng: np.random.Generator, camera: Camera, night: bool, x: float, z: float) -> Sprite:
    """A car with its near end at (x, z): the outline CAR (metres along, up) pulled out sideways."""
    parts = ("car", "glass", "tyre", "under", "line")
    body, glass, tyre, under, plate = (paint(rng, part, night) for part in parts)
    outline, oncoming = np.array(CAR) * (1, rng.choice([1.0, 1.25])), rng.random() < 0.5
    length, inner = CAR[-1][0], x - 0.88 * np.sign(x)  # the flank the camera sees
    if oncoming:
        outline = np.array((length, 0)) - outline[::-1] * (1, -1)
    corners = [camera.see(x + w, h, z + d) for w in (-1, 1) for h in (0, 2) for d in (0, length)]
    canvas = Canvas((*np.min(corners, 0), *np.max(corners, 0)))

    def strip(middle: float, half: float, low: Sequence, high: Sequence, colour: Paint) -> None:
        left, right = x + middle - half, x + middle + half  # low and high: (along, up)
        a, b = (left, low[1], z + low[0]), (right, high[1], z + high[0])
        canvas.polygon(camera.rectangle(a, b), colour)

    def flank(points: Points, colour: Paint) -> None:
        canvas.polygon([camera.see(inner, up, z + along) for along, up in points], colour)

    strip(0, 0.8, (0, 0), (length, 0), under)
    strip(0, 0.84, (0.1, 0.02), (0, 0.4), under)
    for middle in (-0.7, 0.7):
        strip(middle, 0.12, (0.1, 0), (0.1, 0.4), tyre)
    for low, high in reversed(list(zip(outline[:-1], outline[1:], strict=True))):
        strip(0, 0.88, low, high, shade(body, 1.12 if high[0] - low[0] > 0.3 else 0.86))
        if high[1] - low[1] > 0.3 and low[1] > 0.9:  # a slope that rises is a window
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
        lamp = paint(rng, "headlamp" if oncoming else "taillamp", night)
        strip(middle, 0.14, (0, 0.66), (0, 0.8), lamp)
        bulb = *camera.see(x + middle, 0.73, z), (0.35 if oncoming else 0.12) * FOCAL / z
        bulbs += [bulb] * burning
    return canvas.sprite(x, z, z + length, bulbs)


def draw_post(rng: np.random.Generator, camera: Camera, night: bool, x: float, z: float) -> Sprite:
    """A lamp post, tree, road sign or cabinet at the kerb: it hides people; in LWIR, a decoy."""
    metre, foot, bulbs = FOCAL / z, camera.see(x, 0, z), []
    reach = np.array((2.4, 6.5)) * metre
    canvas = Canvas((*(foot - reach), *(foot + reach * (1, 0) + 1)), 2, foot, (metre, -metre))
    metal, face = paint(rng, "metal", night), paint(rng, "sign", night)
    kind = rng.choice(["lamp", "tree", "sign", "cabinet"], p=[0.2, 0.35, 0.25, 0.2])
    if kind == "lamp":
        arm = -1.2 * np.sign(x)
        canvas.limb([(0, 0), (0, LAMP_HEIGHT), (arm, LAMP_HEIGHT + 0.2)], 0.15, metal)
        bulbs = [(*camera.see(x + arm, LAMP_HEIGHT, z), 0.35 * metre)] * night
    elif kind == "tree":
        canvas.limb([(0, 0), (0.1, 3.2)], rng.uniform(0.22, 0.42), paint(rng, "bark", night))
        for _ in range(80):
            leaf = shade(paint(rng, "leaf", night), rng.uniform(0.6, 1.25))
            canvas.ellipse(rng.normal((0, 4.3), (0.75, 0.6)), *rng.uniform(0.2, 0.42, 2), leaf)
    elif kind == "sign":
        canvas.limb([(0, 0), (0, 2.2)], 0.09, metal)
        for radius, colour in ((0.32, (235, 235, 235, face[3])), (0.26, face)):
            canvas.ellipse((0, 2.1), radius, radius, colour)
    else:
        wide, tall = rng.uniform(0.25, 0.4), rng.uniform(1.1, 1.6)
        for top, colour in ((tall, shade(metal, 0.7)), (tall - 0.1, metal)):
            canvas.polygon([(-wide, 0), (wide, 0), (wide, top), (-wide, top)], colour)
    return canvas.sprite(x, z, z, bulbs)


def draw_houses(rng: np.random.Generator, camera: Camera, night: bool) -> tuple[np.ndarray, np.ndarray]:
    """Sky, ground and two rows of houses, (FRAME_HEIGHT, SCENE_WIDTH, 4) float32, and the light of
    their windows, (FRAME_HEIGHT, SCENE_WIDTH, 3) float32."""
    from PIL import Image

    canvas = Canvas((0, 0, SCENE_WIDTH, FRAME_HEIGHT))

    def fill(material: str | Paint, a: Sequence[float], b: Sequence[float]) -> None:
        colour = paint(rng, material, night) if isinstance(material, str) else material
        canvas.polygon(camera.rectangle(a, b), colour)

    far, near = 120.0, 3.2  # metres
    fill("sky", (-200, 0, far), (200, 99, far))
    for x in np.arange(-60.0, 60.0, 6.0):
        block = shade(paint(rng, rng.choice(["wall", "leaf"]), night), 0.9)
        fill(block, (x, 0, far), (x + rng.uniform(4, 9), rng.uniform(4, 22), far))
    fill(rng.choice(["grass", "pavement"]), (-90, 0, near), (90, 0, far))
    for half, material in ((9, "pavement"), (ROAD + 0.1, "line"), (ROAD - 0.1, "road")):
        fill(material, (-half, 0, near), (half, 0, far))
    for z in np.arange(near, 70.0, 5.0):
        fill("line", (-0.07, 0, z), (0.07, 0, z + 2.5))
    zebra = rng.uniform(8, 22)
    for x in np.arange(-ROAD + 0.4, ROAD - 0.4, 0.9):
        fill("line", (x, 0, zebra), (x + 0.45, 0, zebra + 3))
    sunny, lively = rng.choice([-1, 1]), night * rng.uniform(0, 0.3)
    for side in (-1, 1):
        sun = (1.15, 1.0 if night else rng.uniform(1.1, 1.4)) if side == sunny else (0.75, 0.9)
        x, ends = side * rng.uniform(8, 12), 4 + np.cumsum(rng.uniform(7, 16, 7))
        for z0, z1 in zip(ends[-2::-1], ends[:0:-1], strict=True):
            tall, z0 = 3.2 * rng.integers(2, 6) + 0.6, z0 + rng.uniform(0, 2.5)
            wall = shade(paint(rng, "wall", night), *sun)
            fill(shade(wall, 0.8, 0.9), (x, 0, z0), (x + side * 14, tall, z0))
            fill(wall, (x, 0, z0), (x, tall, z1))
            for floor in np.arange(0, tall - 3, 3.2):
                for z in np.arange(z0 + 0.8, z1 - 2, 2.6):
                    pane = paint(rng, "window", night)
                    if rng.random() < lively * (1 + (floor == 0)):
                        pane = (*LIT[rng.integers(len(LIT))], pane[3])
                    fill(pane, (x, floor + 0.9, z), (x, floor + 2.5, z + 1.6))
                    if floor == 0 and rng.random() < 0.35:
                        fill("door", (x, 0, z), (x, 2.1, z + 1))
            if rng.random() < 0.6:
                fill("cloth", (x, 2.7, z0), (x, 3.3, z1))
    scene, ground = canvas.sprite().pixels, int(camera.horizon)
    lit = scene[..., :3] * (scene[..., :3].max(-1, keepdims=True) > 241)
    for cell, strength in ((1, 0.02), (5, 0.015), (40, 0.025)):
        small = rng.normal(1, strength, (FRAME_HEIGHT // cell, SCENE_WIDTH // cell))
        size = (SCENE_WIDTH, FRAME_HEIGHT)
        grain = np.array(Image.fromarray(np.float32(small)).resize(size, Image.Resampling.BICUBIC))
        scene[ground:, :, :3] *= grain[ground:, :, None]
        scene[..., 3] *= grain
    return scene, lit


@dataclass
class Street:
    """What stays the same in a video.

    background: (FRAME_HEIGHT, SCENE_WIDTH, 4) float32, lit. light, glow: (…, 3) float32: what
    falls on things, what shines into the lens. parallax: scale of the pixels from LWIR to visible.
    """

    night: bool
    camera: Camera
    props: list[Sprite]
    background: np.ndarray
    light: np.ndarray
    glow: np.ndarray
    parallax: float


def build_street(rng: np.random.Generator, night: bool) -> Street:
    """A new street: its ground and houses, what stands at its kerbs, its light."""
    from PIL import Image, ImageFilter

    camera, props = Camera(rng.uniform(204, 216)), []
    background, lit = draw_houses(rng, camera, night)
    for side in (-1, 1):
        parking, z = rng.uniform(0, 0.7), rng.uniform(6, 12)
        while z < 45:
            if rng.random() < parking:
                props.append(draw_car(rng, camera, night, side * rng.uniform(3.2, 3.6), z))
            else:
                props.append(draw_post(rng, camera, night, side * rng.uniform(4.9, 5.4), z))
            z = props[-1].end + rng.uniform(1.5, 6)
    y, x = np.mgrid[:FRAME_HEIGHT:2, :SCENE_WIDTH:2].astype(np.float32)

    def spot(centre_x: float, centre_y: float, rx: float, ry: float) -> np.ndarray:
        return 1 / (1 + ((x - centre_x) / rx) ** 2 + ((y - centre_y) / ry) ** 2) ** 2

    light, glow = 0.9 + 0.2 * y / FRAME_HEIGHT, np.zeros_like(x)
    tint = rng.uniform(0.88, 1.08) * rng.uniform(0.95, 1.05, 3)
    if night:
        headlights = rng.uniform(0.15, 0.4) * spot(SCENE_WIDTH / 2, 400, 260, 70)
        light = rng.uniform(0.02, 0.07) + headlights
        tint = rng.uniform((0.9, 0.85, 0.6), (1, 1, 0.9))
        for prop in props:
            foot = camera.see(prop.x, 0, prop.z)[1]
            for bulb_x, bulb_y, reach in prop.bulbs:
                for scale, strength in ((1, 300), (5, 30)):
                    glow += strength * spot(bulb_x, bulb_y, scale * reach, scale * reach)
                if prop.end == prop.z:  # a street lamp lights the ground below
                    light += 0.45 * spot(bulb_x, foot, 8 * reach, 4 * reach)
    bloom = Image.fromarray(lit.astype(np.uint8)).filter(ImageFilter.GaussianBlur(9))
    fields = (np.repeat(np.repeat(field, 2, 0), 2, 1) for field in (light, glow))
    light, glow = (np.float32(field[..., None] * tint) for field in fields)
    background[..., :3] = np.maximum(background[..., :3] * light, lit)
    glow += 0.35 * np.array(bloom)
    return Street(night, camera, props, background, light, glow, rng.uniform(-2, 2))

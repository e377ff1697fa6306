"""Renders the demo set's videos: pedestrians who walk through a street, with their annotations.

Each video shows one street. Annotations are as on KAIST: persons, crowds ("people"), cyclists and unsure
objects ("person?"), each with its level of occlusion. By day people stand out in visible, and LWIR is full
of sun-warmed objects. By night visible is dark away from lamps, and people are warmest in LWIR.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from kaist.annotations import FRAME_HEIGHT, FRAME_WIDTH
from kaist.sprites import (
    FIGURE_MATERIALS,
    FOCAL_LENGTH,
    SCENE_WIDTH,
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
    shade,
)

FRAMES_PER_VIDEO = 8  # one second apart
MAX_VISIBLE_SHIFT = 10  # largest shift of the visible camera in a shifted set, pixels
ROAD_HALF_WIDTH = 4.6  # metres
WINDOW_LIGHTS = (255, 214, 140), (238, 240, 255), (255, 170, 80), (140, 255, 190)  # brighter than `shade`
GROUP_COUNTS = (1, 2, 3, 4, 5, 6, 8, 11)  # groups in a frame that is not empty
GROUP_COUNT_SHARES = (0.33, 0.27, 0.17, 0.09, 0.06, 0.04, 0.03, 0.01)
GROUP_LABELS, GROUP_LABEL_SHARES = ("person", "people", "cyclist", "person?"), (0.85, 0.05, 0.05, 0.05)
EMPTY_AND_HEIGHT = ((0.34, 55), (0.08, 62))  # test, train: share of empty frames, median height in pixels


def draw_background(rng: np.random.Generator, camera: Camera, night: bool) -> tuple[np.ndarray, np.ndarray]:
    """Draw the sky, the ground and two rows of houses, (h, w, 4) float32, and only the light of their
    windows, (h, w, 3) float32, both of FRAME_HEIGHT and SCENE_WIDTH."""
    canvas = Canvas((0, 0, SCENE_WIDTH, FRAME_HEIGHT))

    def fill(material: str | Paint, a: Sequence[float], b: Sequence[float]) -> None:
        colour = sample_paint(rng, material, night) if isinstance(material, str) else material
        canvas.polygon(camera.rectangle(a, b), colour)

    far, near = 120.0, 3.2  # metres
    fill("sky", (-200, 0, far), (200, 99, far))
    for x in np.arange(-60.0, 60.0, 6.0):
        block = shade(sample_paint(rng, rng.choice(["wall", "leaf"]), night), 0.9)
        fill(block, (x, 0, far), (x + rng.uniform(4, 9), rng.uniform(4, 22), far))
    fill(rng.choice(["grass", "pavement"]), (-90, 0, near), (90, 0, far))
    for half, material in ((9, "pavement"), (ROAD_HALF_WIDTH + 0.1, "line"), (ROAD_HALF_WIDTH - 0.1, "road")):
        fill(material, (-half, 0, near), (half, 0, far))
    for z in np.arange(near, 70.0, 5.0):
        fill("line", (-0.07, 0, z), (0.07, 0, z + 2.5))
    zebra = rng.uniform(8, 22)
    for x in np.arange(-ROAD_HALF_WIDTH + 0.4, ROAD_HALF_WIDTH - 0.4, 0.9):
        fill("line", (x, 0, zebra), (x + 0.45, 0, zebra + 3))
    sunny, lively = rng.choice([-1, 1]), night * rng.uniform(0, 0.3)
    for side in (-1, 1):
        sun = (1.15, 1.0 if night else rng.uniform(1.1, 1.4)) if side == sunny else (0.75, 0.9)
        x, ends = side * rng.uniform(8, 12), 4 + np.cumsum(rng.uniform(7, 16, 7))
        for z0, z1 in zip(ends[-2::-1], ends[:0:-1], strict=True):
            tall, z0 = 3.2 * rng.integers(2, 6) + 0.6, z0 + rng.uniform(0, 2.5)
            wall = shade(sample_paint(rng, "wall", night), *sun)
            fill(shade(wall, 0.8, 0.9), (x, 0, z0), (x + side * 14, tall, z0))
            fill(wall, (x, 0, z0), (x, tall, z1))
            for floor in np.arange(0, tall - 3, 3.2):
                for z in np.arange(z0 + 0.8, z1 - 2, 2.6):
                    pane = sample_paint(rng, "window", night)
                    if rng.random() < lively * (1 + (floor == 0)):
                        pane = (*WINDOW_LIGHTS[rng.integers(len(WINDOW_LIGHTS))], pane[3])
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
    """What is the same in all frames of a video. Arrays are float32 of FRAME_HEIGHT and SCENE_WIDTH."""

    night: bool
    camera: Camera
    props: list[Sprite]  # cars and posts
    background: np.ndarray  # (h, w, 4), with the light applied
    light: np.ndarray  # (h, w, 3), factors of the sprites' visible pixels
    glow: np.ndarray  # (h, w, 3), added to the visible image
    parallax: float  # scale of the offset of visible from LWIR, which grows with proximity


def build_street(rng: np.random.Generator, night: bool) -> Street:
    """Sample a street: background, cars and posts at its kerbs, and light."""
    camera, props = Camera(rng.uniform(204, 216)), []
    background, lit = draw_background(rng, camera, night)
    for side in (-1, 1):
        parking, z = rng.uniform(0, 0.7), rng.uniform(6, 12)
        while z < 45:
            if rng.random() < parking:
                props.append(draw_car(rng, camera, night, side * rng.uniform(3.2, 3.6), z))
            else:
                props.append(draw_post(rng, camera, night, side * rng.uniform(4.9, 5.4), z))
            z = props[-1].z_far + rng.uniform(1.5, 6)
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
            foot = camera.project(prop.x, 0, prop.z)[1]
            for bulb_x, bulb_y, reach in prop.bulbs:
                for scale, strength in ((1, 300), (5, 30)):
                    glow += strength * spot(bulb_x, bulb_y, scale * reach, scale * reach)
                if prop.z_far == prop.z:  # a street lamp lights the ground below
                    light += 0.45 * spot(bulb_x, foot, 8 * reach, 4 * reach)
    bloom = Image.fromarray(lit.astype(np.uint8)).filter(ImageFilter.GaussianBlur(9))
    fields = (np.repeat(np.repeat(field, 2, 0), 2, 1) for field in (light, glow))
    light, glow = (np.float32(field[..., None] * tint) for field in fields)
    background[..., :3] = np.maximum(background[..., :3] * light, lit)
    glow += 0.35 * np.array(bloom)
    return Street(night, camera, props, background, light, glow, rng.uniform(-2, 2))


def sample_group(rng: np.random.Generator, street: Street, pan: float, median: float) -> list[Figure]:
    """Sample a group of figures in view, which share one label and box: a crowd, or one figure otherwise.

    pan: pixels that the camera looks to the right; median: median body height, pixels.
    """
    label, hides = str(rng.choice(GROUP_LABELS, p=GROUP_LABEL_SHARES)), rng.random() < 0.2
    low, high = {"people": (32, 70), "person?": (22, 34)}.get(label, (27, 235))  # heights in pixels
    x = z = 0.0
    while not in_view(street, x, z, pan, hides):
        z = FOCAL_LENGTH * 1.7 / np.clip(median * np.exp(rng.normal(0, 0.5)), low, high)
        x = (rng.uniform(-310, 310) + pan) / FOCAL_LENGTH * z
        if hides:  # half behind a car or post, as seen from the camera
            prop, outer = street.props[rng.integers(len(street.props))], rng.choice([-1, 1])
            edge = (0.9 if prop.z_far > prop.z else 0.2) + rng.uniform(-0.1, 0.3)
            z = prop.z_far + rng.uniform(0.4, 3.0)
            x = (prop.x + outer * np.sign(prop.x) * edge) * z / (prop.z if outer > 0 else prop.z_far)
    pace = rng.uniform(0.7, 1.5) * (2.5 if label == "cyclist" else 0.1 if hides else 1)
    ahead, aside = rng.choice([-1, 1]) * pace, 0.1 * pace * rng.normal()
    across = rng.random() < (0.8 if abs(x) < ROAD_HALF_WIDTH else 0.6)
    group = []
    for _ in range(rng.integers(4, 8) if label == "people" else 1):
        move = (ahead, aside) if across else (aside, ahead)
        body = rng.uniform(0, 2 * np.pi), rng.normal(1.7, 0.07), rng.uniform(1, 1.35)
        paints = {part: sample_paint(rng, part, street.night) for part in FIGURE_MATERIALS}
        group.append(Figure(label, x, z, *move, *body, *(rng.random(2) < (0.3, 0.3)), paints))
        x, z = x + rng.uniform(0.3, 0.6), z + rng.uniform(-0.6, 0.8)
    return group


def in_view(street: Street, x: float, z: float, pan: float, hides: bool = True) -> bool:
    """Whether the place (x, z) is near, in the frame, in no car and, unless `hides`, behind none."""
    if not 4.9 < z < 55 or abs(x) > 7.6 or abs(FOCAL_LENGTH * x / z - pan) > 325:
        return False
    cars = [car for car in street.props if car.z < car.z_far and car.z - 0.4 < z]
    if any(z < car.z_far + 0.4 and abs(x - car.x) < 1.4 for car in cars):
        return False
    edges = ((x / z * along - car.x) for car in cars for along in (car.z, car.z_far))
    return hides or all(abs(edge) > 1.2 for edge in edges)


def simulate_groups(
    rng: np.random.Generator, street: Street, pans: np.ndarray, empty: float, median: float
) -> Iterator[list[list[Figure]]]:
    """Yield each frame's groups of figures; a fraction `empty` of the video, in one stretch, has none.

    pans: pixels that the camera looks to the right in each frame; median: median body height, pixels.
    """
    quiet = min(int(empty * len(pans) + rng.random()), len(pans) - 1)
    start, groups = rng.integers(1, len(pans) - quiet + 1), []
    for frame, pan in enumerate(pans):
        for figure in sum(groups, []):
            figure.x, figure.z = figure.x + figure.vx, figure.z + figure.vz
            figure.phase += 2
        groups = [g for g in groups if all(in_view(street, f.x, f.z, pan) for f in g)]
        wanted = 0 if start <= frame < start + quiet else rng.choice(GROUP_COUNTS, p=GROUP_COUNT_SHARES)
        wanted = wanted if frame else max(wanted, 3)  # so that the first frame shows people
        groups = groups[:wanted]
        while len(groups) < wanted:
            group = sample_group(rng, street, pan, median)
            gaps = [abs(f.x / f.z - group[0].x / group[0].z) for f in sum(groups, [])]
            if FOCAL_LENGTH * min(gaps, default=1) > 30 or rng.random() < 0.1:  # few occlude each other
                groups.append(group)
        yield groups


def compose(
    street: Street, groups: list[list[Figure]], pan: int, visible_shift: int = 0
) -> tuple[np.ndarray, list[tuple], list[tuple | None]]:
    """Render one frame without noise. The camera looks `pan` pixels to the right, and the visible camera
    `visible_shift` more.

    Returns:
        The frame, (FRAME_HEIGHT, FRAME_WIDTH, 4) float32; each visible group's label, xywh box in LWIR
        pixels and occlusion (0, 1 or 2); and its xywh box in visible pixels, None outside of the frame.
    """
    scene, left = street.background.copy(), (SCENE_WIDTH - FRAME_WIDTH) // 2 + pan
    topmost = np.full(scene.shape[:2], -1, np.int16)  # index of the group seen in each pixel
    view = slice(left, left + FRAME_WIDTH)
    masks, in_visible = np.zeros((2, len(groups), *scene.shape[:2]), bool)
    sprites = [(prop.z, -1, prop) for prop in street.props]  # depth, index of the group, sprite
    for index, figure in ((i, figure) for i, group in enumerate(groups) for figure in group):
        beside = [c.z for c in street.props if c.z < figure.z < c.z_far and abs(figure.x) < abs(c.x)]
        sprite = draw_figure(figure, street.camera)
        sprites.append((min([figure.z, *beside]), index, sprite))
        if figure.label == "person?":  # too faint to be recognised for certain
            sprite.pixels *= 0.6
            sprite.alpha *= 0.6
    for depth, index, sprite in sorted(sprites, key=lambda entry: (-entry[0], -entry[1])):
        shift = round(street.parallax * (0.5 + 8 / depth))
        if index >= 0 and not street.night:
            x, y = street.camera.project(sprite.x + 0.2, 0, sprite.z)
            metre = FOCAL_LENGTH / sprite.z
            shadow = Canvas((x - metre, y - 0.1 * metre, x + metre, y + 0.1 * metre + 2))
            shadow.ellipse((x, y), 0.55 * metre, 0.07 * metre, (0, 0, 0, 0))
            shadow = shadow.sprite()
            shadow.alpha *= 0.5
            shadow.paste(scene, slice(0, 3), shift)
        visible_window, visible_part = sprite.paste(scene, slice(0, 3), shift, street.light)
        window, part = sprite.paste(scene, slice(3, 4), 0)
        solid = sprite.alpha[part][..., 0] > 0.4
        topmost[window][solid] = index
        if index >= 0:
            masks[index][window] |= solid
            in_visible[index][visible_window] |= sprite.alpha[visible_part][..., 0] > 0.4
    objects, boxes, visible = [], [], slice(view.start + visible_shift, view.stop + visible_shift)
    for index, (group, mask) in enumerate(zip(groups, masks[:, :, view], strict=True)):
        box = mask_box(mask)
        seen = np.mean(topmost[:, view][mask] == index) if box else 0
        if seen > 0.04:
            occlusion = 0 if seen > 0.9 else 1 if seen > 0.5 else 2
            objects.append((group[0].label, box, occlusion))
            boxes.append(mask_box(in_visible[index, :, visible]))
    scene[..., :3] += street.glow
    frame = np.concatenate([scene[:, visible, :3], scene[:, view, 3:]], axis=2)
    return frame, objects, boxes


def mask_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """The xywh box of a mask (h, w), or None if it is narrower than four columns."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if len(columns) <= 3:
        return None
    return tuple(map(int, (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)))


def render_video(seed: int, paired: bool, set_id: int, video: int, n_frames: int) -> Iterator[RenderedFrame]:
    """Render the frames of one video.

    paired: shift the visible camera, and annotate each modality instead of LWIR only.
    """
    rng = np.random.default_rng([seed, set_id, video])
    night = set_id % 6 >= 3
    empty, median = EMPTY_AND_HEIGHT[set_id < 6]
    street = build_street(rng, night)
    pans = np.round(60 * np.sin(rng.uniform(0, 6.3) + 0.25 * np.arange(n_frames))).astype(int)
    gain, noise_std = rng.uniform(0.9, 1.12), rng.uniform(5, 9) if night else 2.5
    noise = rng.standard_normal((FRAME_HEIGHT + 64, FRAME_WIDTH + 64, 4), np.float32)
    noise *= np.float32([noise_std, noise_std, noise_std, 1.8])
    # A second generator, so that the shift changes no other random value.
    shift_rng = np.random.default_rng([seed, set_id, video, 1])
    shift = int(shift_rng.integers(-MAX_VISIBLE_SHIFT, MAX_VISIBLE_SHIFT + 1)) if paired else 0
    for frame, groups in enumerate(simulate_groups(rng, street, pans, empty, median)):
        scene, objects, visible_boxes = compose(street, groups, int(pans[frame]), shift)
        y, x = rng.integers(64, size=2)
        scene += noise[y : y + FRAME_HEIGHT, x : x + FRAME_WIDTH]
        scene[..., 3] *= gain
        pixels = np.clip(scene, 0, 255).astype(np.uint8)
        lwir = Image.fromarray(pixels[..., 3]).filter(ImageFilter.GaussianBlur(0.8)).convert("RGB")
        images = {"visible": (Image.fromarray(pixels[..., :3]), 90), "lwir": (lwir, 90)}
        annotations = {"": objects}
        if paired:
            pairs = zip(objects, visible_boxes, strict=True)
            in_visible = [(label, box, occlusion) for (label, _, occlusion), box in pairs if box]
            annotations = {"visible": in_visible, "lwir": objects}
        yield frame_id(set_id, video, frame), images, annotations


def frame_id(set_id: int, video: int, frame: int) -> str:
    """The id of a video's frame: its frames are I00000, I00019, I00039, …"""
    return f"set{set_id:02}/V{video:03}/I{max(0, 20 * frame - 1):05}"

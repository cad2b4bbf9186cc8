"""The generated data set: drawn images that pose the problem of weak supervision.

Four kinds of body carry two kinds of head each, which makes eight classes. The body, about four fifths of an object,
looks the same in both classes of its kind; only the small head tells them apart. A classifier can therefore be right
while it looks at heads alone, whereas a segmentation must cover the body too. One to three objects lie on a textured
background, overlap, leave the picture, and share it with clutter that belongs to no class.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from PIL import Image

from ..models.label_colors import mask_image
from ..models.maps import IGNORE_INDEX
from .tagged import DataError, encode_png, tagged_features

TOY_CLASSES = ("vixel", "bramby", "finnet", "gillow", "scarab", "dorbug", "wagget", "trolly")

_SUPERSAMPLING = 2  # pictures are drawn at twice their size and averaged
_PLACEMENT_TRIES = 20
_MIN_VISIBLE_OBJECT, _MIN_VISIBLE_HEAD = 0.35, 0.6  # fractions of the whole area; less, and the object is placed anew
_SPLIT_STREAMS = {"train": 0, "val": 1}

# An object lives in its own frame: u in [-1, 1] from tail to head, v across. A shape maps (u, v) to "inside",
# a texture or pattern to "second colour". Heads have a frame of their own, about [-1, 1] wide.
Plane = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class _Body:
    shape: Plane
    texture: Plane
    hues: tuple[float, float]


@dataclass(frozen=True)
class _Head:
    shape: Plane
    pattern: Plane
    colors: tuple[tuple[float, float, float], tuple[float, float, float]]


def _ellipse(u, v, center, radii):
    return ((u - center[0]) / radii[0]) ** 2 + ((v - center[1]) / radii[1]) ** 2 < 1


def _box(u, v, left, right, top, bottom):
    return (u > left) & (u < right) & (v > top) & (v < bottom)


def _beast(u, v):
    legs = _box(np.abs(u + 0.22), v, 0.32, 0.50, 0, 0.62)
    return _ellipse(u, v, (-0.22, 0), (0.74, 0.40)) | legs


def _fish(u, v):
    trunk = np.abs(v) < 0.46 * (1 - ((u + 0.1) / 0.75) ** 2)
    return trunk | (_box(u, v, -1, -0.6, -1, 1) & (np.abs(v) < -0.5 - u))


def _beetle(u, v):
    return _ellipse(u, v, (-0.25, 0), (0.72, 0.52))


def _cart(u, v):
    wheels = _ellipse(np.abs(u + 0.22), v, (0.38, 0.34), (0.2, 0.2))
    return _box(u, v, -0.95, 0.52, -0.38, 0.32) | wheels


_BODIES = (
    _Body(_beast, lambda u, v: np.sin(13 * u) * np.sin(13 * v + 4 * u) > 0.3, hues=(0.02, 0.13)),
    _Body(_fish, lambda u, v: np.sin(16 * (u + v * v)) > 0.2, hues=(0.50, 0.64)),
    _Body(_beetle, lambda u, v: (np.sin(20 * v) > 0.4) | (np.abs(v) < 0.04), hues=(0.23, 0.42)),
    _Body(_cart, lambda u, v: (np.sin(12 * u) > 0) ^ (np.sin(12 * v) > 0), hues=(0.74, 0.92)),
)


def _disc(a, b):
    return a * a + b * b < 1.1


def _block(a, b):
    return np.maximum(np.abs(a), np.abs(b)) < 0.95


def _wedge(a, b):
    return (np.abs(a) < 1.1) & (np.abs(b) < 0.75 * (1.1 - a))


def _bow(a, b):
    return (np.abs(a) < 1) & (np.abs(b) < 0.5 + 0.7 * np.abs(a))


def _halves(a, b):
    return b > 0


def _dot(a, b):
    return a * a + b * b < 0.36


def _bands(a, b):
    return np.abs(a) < 0.35


def _quarters(a, b):
    return a * b > 0


_RED, _YELLOW, _CYAN, _PINK = (0.92, 0.10, 0.10), (0.98, 0.86, 0.08), (0.05, 0.85, 0.92), (0.95, 0.15, 0.72)
_ORANGE, _BLUE, _BLACK, _WHITE = (0.98, 0.50, 0.05), (0.10, 0.18, 0.90), (0.06, 0.06, 0.06), (0.97, 0.97, 0.97)
_LIME = (0.45, 0.95, 0.08)

_HEADS = (  # two of a kind follow one another, as in TOY_CLASSES
    _Head(_wedge, _halves, (_CYAN, _WHITE)),
    _Head(_disc, _dot, (_PINK, _BLACK)),
    _Head(_disc, _dot, (_YELLOW, _RED)),
    _Head(_wedge, _bands, (_BLACK, _WHITE)),
    _Head(_bow, _quarters, (_RED, _WHITE)),
    _Head(_block, _dot, (_BLUE, _YELLOW)),
    _Head(_block, _bands, (_LIME, _BLACK)),
    _Head(_bow, _halves, (_ORANGE, _BLUE)),
)
_HEAD_CENTER, _HEAD_SIZE = 0.66, 0.255


def _hsv(hue: float, saturation: float, value: float) -> np.ndarray:
    """One colour → RGB (3,) float32 in [0, 1]."""
    distance = np.abs((hue * 6 + np.array([0, 4, 2])) % 6 - 3) - 1
    return (value * (1 + saturation * (np.clip(distance, 0, 1) - 1))).astype(np.float32)


def _smooth_noise(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Random waves about size/cells pixels long → (size, size) float32, most of it in [0, 1]."""
    coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def _background(rng: np.random.Generator, size: int) -> np.ndarray:
    """(size, size, 3) float32: two muted colours mixed by a gradient, noise, stripes or blobs."""
    first, second = (_hsv(rng.random(), rng.uniform(0.05, 0.5), rng.uniform(0.25, 0.9)) for _ in range(2))
    x, y = np.meshgrid(*2 * [np.linspace(-1, 1, size, dtype=np.float32)])
    angle = rng.uniform(0, 2 * np.pi)
    along = math.cos(angle) * x + math.sin(angle) * y
    kind = rng.integers(4)
    if kind == 0:
        mix = along / 2.8 + 0.5
    elif kind == 1:
        mix = _smooth_noise(rng, size, int(rng.integers(5, 24)))
    elif kind == 2:
        mix = 0.5 + 0.5 * np.sin(rng.uniform(8, 30) * along)
    else:
        mix = (_smooth_noise(rng, size, int(rng.integers(5, 14))) > 0.55).astype(np.float32)
    return first + mix[..., None] * (second - first)


def _local_frame(rng: np.random.Generator, length: float) -> tuple[np.ndarray, np.ndarray]:
    """A square patch that holds an object of this length (pixels) at a random angle → u and v, each (p, p) float32."""
    radius = math.ceil(0.6 * length)
    line = np.arange(-radius, radius + 1, dtype=np.float32) * (2 / length)
    x, y = line[None, :], line[:, None]
    angle = rng.uniform(0, 2 * np.pi)
    side = 1 if rng.random() < 0.5 else -1  # mirrored or not
    cosine, sine = math.cos(angle), math.sin(angle)
    return cosine * x + sine * y, side * (cosine * y - sine * x)


def _windows(center: np.ndarray, patch: int, size: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Where a patch around a centre (row, column) meets the canvas → slices of the canvas, slices of the patch."""
    start = np.round(center).astype(int) - patch // 2
    low, high = np.maximum(start, 0), np.minimum(start + patch, size)
    return (
        (slice(low[0], high[0]), slice(low[1], high[1])),
        (slice(low[0] - start[0], high[0] - start[0]), slice(low[1] - start[1], high[1] - start[1])),
    )


def _paint_clutter(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Paint one plain shape of any colour that means nothing, a rod, disc, ring or block → the pixels it covers."""
    size = len(canvas)
    u, v = _local_frame(rng, rng.uniform(0.08, 0.3) * size)
    kind = rng.integers(4)
    if kind == 0:
        shape = _box(u, v, -1, 1, -0.2, 0.2)
    elif kind == 1:
        shape = _ellipse(u, v, (0, 0), (0.8, rng.uniform(0.4, 0.8)))
    elif kind == 2:
        shape = _ellipse(u, v, (0, 0), (0.9, 0.9)) & ~_ellipse(u, v, (0, 0), (0.55, 0.55))
    else:
        shape = _box(u, v, -0.7, 0.7, -0.6, 0.6)
    on_canvas, in_patch = _windows(rng.uniform(0, size, 2), len(u), size)
    covered = np.zeros((size, size), dtype=bool)
    covered[on_canvas] = shape[in_patch]
    canvas[covered] = _hsv(rng.random(), rng.uniform(0.2, 1), rng.uniform(0.2, 1))
    return covered


@dataclass
class _Drawing:
    """An object in its own patch: where it is, where its head is, and its colours (p, p, 3)."""

    inside: np.ndarray
    head: np.ndarray
    colors: np.ndarray


def _draw_object(rng: np.random.Generator, label: int, size: int) -> _Drawing:
    body, head = _BODIES[label // 2], _HEADS[label]
    u, v = _local_frame(rng, rng.uniform(0.4, 0.62) * size)
    a, b = (u - _HEAD_CENTER) / _HEAD_SIZE, v / _HEAD_SIZE
    in_head = head.shape(a, b)

    hue, saturation, value = rng.uniform(*body.hues), rng.uniform(0.3, 0.65), rng.uniform(0.45, 0.85)
    light, dark = _hsv(hue, saturation, value), _hsv(hue + rng.uniform(-0.04, 0.04), saturation, value * 0.62)
    shift = rng.uniform(0, 0.3)
    tone = np.where(in_head, 2 + head.pattern(a, b), body.texture(u + shift, v))
    shade = np.where(in_head, np.float32(1), 1 - 0.22 * v)  # bodies are lit from one side
    palette = np.stack([light, dark, *head.colors + rng.normal(0, 0.05, (2, 3))]).astype(np.float32)
    return _Drawing(inside=body.shape(u, v) | in_head, head=in_head, colors=palette[tone] * shade[..., None])


def _render(rng: np.random.Generator, image_size: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """One picture → RGB uint8 (S, S, 3), mask uint8 (S, S), sorted tags (class indices)."""
    size = image_size * _SUPERSAMPLING
    canvas = _background(rng, size)
    for _ in range(rng.integers(1, 5)):
        _paint_clutter(rng, canvas)

    owner = np.zeros((size, size), dtype=np.int16)  # 0 = background, else the number of the object on top
    heads = np.zeros((size, size), dtype=bool)
    labels: list[int] = []
    areas: list[tuple[int, int]] = []  # whole object, whole head
    for label in rng.integers(len(TOY_CLASSES), size=rng.choice((1, 2, 3), p=(0.45, 0.35, 0.2))):
        for _ in range(_PLACEMENT_TRIES):
            drawing = _draw_object(rng, label, size)
            on_canvas, in_patch = _windows(rng.uniform(0.12, 0.88, 2) * size, len(drawing.inside), size)
            inside = drawing.inside[in_patch]
            new_owner, new_heads = owner.copy(), heads.copy()
            new_owner[on_canvas][inside] = len(labels) + 1
            new_heads[on_canvas][inside] = drawing.head[in_patch][inside]
            new_areas = [*areas, (drawing.inside.sum(), drawing.head.sum())]
            if _all_visible(new_owner, new_heads, new_areas):
                canvas[on_canvas][inside] = drawing.colors[in_patch][inside]
                owner, heads, areas = new_owner, new_heads, new_areas
                labels.append(int(label))
                break

    if rng.random() < 0.3:  # clutter may stand before an object too
        before = canvas.copy()
        covered = _paint_clutter(rng, canvas)
        if _all_visible(np.where(covered, 0, owner), heads & ~covered, areas):
            owner[covered] = 0
        else:
            canvas = before

    parts = [canvas[i::_SUPERSAMPLING, j::_SUPERSAMPLING] for i, j in np.ndindex(_SUPERSAMPLING, _SUPERSAMPLING)]
    picture = np.sum(parts, axis=0)
    picture *= rng.uniform(0.8, 1.15) / _SUPERSAMPLING**2  # contrast, tint and noise of the camera
    picture += rng.uniform(-0.08, 0.12, 3).astype(np.float32)
    picture += rng.uniform(0.01, 0.04) * rng.standard_normal(picture.shape, dtype=np.float32)
    picture = (np.clip(picture, 0, 1) * 255).astype(np.uint8)
    mask = _mask(owner[::_SUPERSAMPLING, ::_SUPERSAMPLING], labels)
    tags = [
        int(value) - 1 for value in np.unique(mask) if value not in (0, IGNORE_INDEX)
    ]  # a tiny object may have none
    return picture, mask, tags


def _all_visible(owner: np.ndarray, heads: np.ndarray, areas: list[tuple[int, int]]) -> bool:
    visible = np.bincount(owner.ravel(), minlength=len(areas) + 1)[1:]
    visible_heads = np.bincount(owner[heads], minlength=len(areas) + 1)[1:]
    return all(
        seen >= _MIN_VISIBLE_OBJECT * area and head_seen >= _MIN_VISIBLE_HEAD * head_area
        for seen, head_seen, (area, head_area) in zip(visible, visible_heads, areas, strict=True)
    )


def _mask(owner: np.ndarray, labels: list[int]) -> np.ndarray:
    """Object numbers (S, S) → label map uint8, 255 (ignore) in one pixel on either side of object borders."""
    mask = np.array([0, *(label + 1 for label in labels)], dtype=np.uint8)[owner]
    across, down = owner[:, 1:] != owner[:, :-1], owner[1:] != owner[:-1]
    for border, sides in ((across, (mask[:, 1:], mask[:, :-1])), (down, (mask[1:], mask[:-1]))):
        for side in sides:
            side[border] = IGNORE_INDEX
    return mask


def _make_split(split: str, num_images: int, image_size: int, seed: int) -> Dataset:
    columns: dict[str, list[Any]] = {"image_id": [], "image": [], "tags": [], "mask": []}
    for index in range(num_images):
        picture, mask, tags = _render(np.random.default_rng((seed, _SPLIT_STREAMS[split], index)), image_size)
        columns["image_id"].append(f"{split}_{index:05d}")
        columns["image"].append(encode_png(Image.fromarray(picture), compress_level=1))
        columns["tags"].append(tags)
        columns["mask"].append(encode_png(mask_image(mask), compress_level=1))
    return Dataset.from_dict(columns, features=tagged_features(TOY_CLASSES, "mask"))


def make_toy(num_train: int = 600, num_val: int = 120, image_size: int = 96, seed: int = 0) -> DatasetDict:
    """Draw the data set: splits "train" and "val" with the columns image_id, image, tags and mask (none missing).

    Image i of a split depends on (seed, split, i, image_size) alone: the first n images are the same for any number.
    """
    if min(num_train, num_val) < 1 or image_size < 32:
        raise DataError(
            f"toy: expected at least one image per split and image_size >= 32, "
            f"got num_train={num_train}, num_val={num_val}, image_size={image_size}"
        )
    sizes = {"train": num_train, "val": num_val}
    return DatasetDict({split: _make_split(split, number, image_size, seed) for split, number in sizes.items()})

"""Augmentation per image, operation by operation, against Pillow on one core.

    python -m benchmarks.views

Ours is compiled for a batch and run on as many cores as XLA takes; Pillow works image by image in one thread. The
outputs agree (tests/data holds every operation against Pillow), so this is about time alone. On an accelerator the
share of the whole recipe in a step is the figure that counts: `benchmarks.step`, row 'views alone'.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from benchmarks import common
from protojax.data import views
from protojax.data.views import CARP_VIEWS, ViewSpec, apply_parameters, sample_parameters

PLAIN = {
    "flip": 0.0, "jitter_probability": 0.0, "grey_probability": 0.0, "blur_probability": 0.0,
    "solarise_probability": 0.0,
}  # fmt: skip


def crop(image: Image.Image, size: int, scale: tuple[float, float]) -> Image.Image:
    area, aspect = random.uniform(*scale) * image.width * image.height, random.uniform(3 / 4, 4 / 3)
    wide, tall = min(image.width, int((area * aspect) ** 0.5)), min(image.height, int((area / aspect) ** 0.5))
    left, top = random.randint(0, image.width - wide), random.randint(0, image.height - tall)
    return image.crop((left, top, left + wide, top + tall)).resize((size, size), Image.Resampling.BICUBIC)


def jitter(image: Image.Image) -> Image.Image:
    changes = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    for change in random.sample(changes, 3):
        image = change(image).enhance(random.uniform(0.6, 1.4))
    hue, saturation, value = image.convert("HSV").split()
    turned = (np.asarray(hue).astype(np.int32) + random.randint(-25, 25)).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def operations(size: int) -> dict[str, tuple[ViewSpec, Callable[[Image.Image], Image.Image]]]:
    """name -> (our view with that operation after the crop, the same in Pillow)."""
    scale = (0.2, 1.0)
    spec = functools.partial(ViewSpec, size, 1, scale)
    cut = functools.partial(crop, size=size, scale=scale)
    blurred = lambda image: cut(image).filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))  # noqa: E731
    return {
        "crop + resize": (spec(**PLAIN), cut),
        "+ flip": (spec(**{**PLAIN, "flip": 0.5}), lambda image: ImageOps.mirror(cut(image))),
        "+ jitter": (spec(**{**PLAIN, "jitter_probability": 1.0}), lambda image: jitter(cut(image))),
        "+ grey": (spec(**{**PLAIN, "grey_probability": 1.0}), lambda image: cut(image).convert("L").convert("RGB")),
        "+ blur": (spec(**{**PLAIN, "blur_probability": 1.0}), blurred),
        "+ solarise": (spec(**{**PLAIN, "solarise_probability": 1.0}), lambda image: ImageOps.solarize(cut(image))),
    }


def recipe(image: Image.Image, size: int) -> list[np.ndarray]:
    """CARP's two global views in Pillow."""
    out = []
    for blur, solarise in ((1.0, 0.0), (0.1, 0.2)):
        view = crop(image, size, (0.2, 1.0))
        view = ImageOps.mirror(view) if random.random() < 0.5 else view
        view = jitter(view) if random.random() < 0.8 else view
        view = view.convert("L").convert("RGB") if random.random() < 0.2 else view
        view = view.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))) if random.random() < blur else view
        view = ImageOps.solarize(view) if random.random() < solarise else view
        out.append(np.asarray(view, np.float32) / 255.0)
    return out


def main() -> None:
    options = common.parser(__doc__).parse_args()
    report = common.Report("views", options)
    count, side, size = (256, 256, 224) if options.full else (8, 32, 16) if options.tiny else (32, 256, 224)
    rng = np.random.default_rng(0)
    stacks = [rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8) for _ in range(2)]
    pictures = [[Image.fromarray(image) for image in stack] for stack in stacks]
    key = jax.random.key(0)
    moments = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

    def row(name: str, ours: Any, theirs: Any) -> None:
        pillow = common.Contender("Pillow, one core", lambda images: [theirs(i) for i in images],
                                  [(p,) for p in pictures], wait=lambda _: None)  # fmt: skip
        mine = common.contender("protojax", ours, [(key, jnp.asarray(s)) for s in stacks])
        report.compare(name, [mine, pillow], images=count, side=side, size=size)

    for name, (spec, theirs) in operations(size).items():

        def one(key: Any, images: Any, spec: ViewSpec = spec) -> Any:
            (parameters,) = sample_parameters(key, spec, count, side, side)
            return apply_parameters(parameters, images, spec, **moments, matmul_dtype=common.policy() or jnp.float32)

        row(name, one, theirs)
    large, _ = CARP_VIEWS(size, local_count=0)
    made = views.make_views(large, None, **moments, matmul_dtype=common.policy() or jnp.float32)
    row("CARP, two global views", lambda key, images: made(key, {"image": images}), lambda i: recipe(i, size))
    report.table()


if __name__ == "__main__":
    main()

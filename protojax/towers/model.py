"""Towers ready to use: images and texts in, unit vectors of the common space out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from protojax import parallel
from protojax.api import Array
from protojax.models.functional import functional
from protojax.models.layers import compute_dtype
from protojax.models.pretrained.networks import TextTower, VisionTower, logits
from protojax.models.text import check_token_ids
from protojax.towers.pictures import Preprocessing, open_preprocessing
from protojax.towers.texts import Tokeniser, open_tokeniser
from protojax.towers.weights import check_folder, open_weights


class ImageText:
    """The two towers of a folder of weights. `load` makes one.

    config: what config.json says; image, text: the towers as `init` and `apply`; variables: {'image', 'text',
    'logit_scale', 'logit_bias'}; preprocessing, tokeniser: read when first used. Batches of `batch_size` are spread
    over all devices of this process; a last, smaller one is filled up, so that one program is compiled.
    """

    def __init__(self, folder: str | Path, *, dtype: DTypeLike = "float32", batch_size: int = 64):
        if batch_size < 1:
            raise ValueError(f"batch_size must be positive, got {batch_size}")
        self.folder = check_folder(folder)
        self.config, self.variables, self._digest = open_weights(self.folder)
        self.dtype = compute_dtype(dtype)
        self._mesh = parallel.make_mesh(devices=jax.local_devices())
        self.batch_size = -(-batch_size // self._mesh.size) * self._mesh.size
        self.image = functional(VisionTower, self.config, dtype=dtype)
        self.text = functional(TextTower, self.config, dtype=dtype)
        self._placed: dict[str, Any] = {}
        self._compiled: dict[tuple[str, str], Callable[..., Any]] = {}

    @property
    def fingerprint(self) -> str:
        """'clip-WEIGHTS-DTYPE/image-PREPROCESSING': equal exactly when image features are comparable."""
        return f"{self.config.kind}-{self._digest}-{self.dtype.name}/image-{self.preprocessing.digest}"

    @cached_property
    def preprocessing(self) -> Preprocessing:
        return open_preprocessing(self.folder, self.config.kind, self.config.vision.image_size)

    @cached_property
    def tokeniser(self) -> Tokeniser:
        return open_tokeniser(self.folder, self.config)

    def encode_images(self, pixels: np.ndarray, output: str = "embedding") -> np.ndarray:
        """uint8 [N,S,S,3] as `preprocessing.fit` makes them -> unit float32 [N,D]; output 'pooled' [N,W] or 'tokens'
        [N,T,W]: states of the tower, as they are. Raises TypeError or ValueError for other images."""
        pixels, size = np.asarray(pixels), self.config.vision.image_size
        if pixels.dtype != np.uint8 or pixels.shape[1:] != (size, size, 3):
            raise TypeError(
                f"images: expected uint8 [N,{size},{size},3], got {pixels.dtype} {list(pixels.shape)}; "
                "`preprocessing.fit(image)` makes one of a Pillow image"
            )
        return self._run("image", output, {"pixels": pixels})

    def encode_texts(self, texts: Sequence[str], output: str = "embedding") -> np.ndarray:
        """Texts -> unit float32 [T,D]; output 'pooled' or 'tokens' [T,S,W]. Raises ValueError for blank texts."""
        tokens = self.tokeniser(texts)
        check_token_ids(tokens.ids, np.ones_like(tokens.ids, bool), self.config.text.vocabulary)
        given = {"ids": tokens.ids} | ({"mask": tokens.mask} if self.tokeniser.masked else {})
        return self._run("text", output, given)

    def logits(self, image: np.ndarray, text: np.ndarray) -> np.ndarray:
        """exp(logit_scale) cos + logit_bias [N,T] of features [N,D] and [T,D]."""
        found = logits(
            jnp.asarray(image), jnp.asarray(text), self.variables["logit_scale"], self.variables["logit_bias"]
        )
        return np.asarray(found)

    def features(self, tower: str, variables: Any, batch: dict[str, Any], output: str = "embedding") -> Array:
        """What `encode_images` ('image': 'pixels') and `encode_texts` ('text': 'ids', 'mask') compute, as a pure
        function of arrays on the device, for programs that are compiled as a whole. Pixels may be real numbers."""
        if tower == "image":
            outputs, _ = self.image.apply(variables, self.preprocessing.normalise(batch["pixels"]))
        else:
            outputs, _ = self.text.apply(variables, batch["ids"], batch.get("mask"))
        found = outputs[output]
        return found / jnp.linalg.norm(found, axis=-1, keepdims=True) if output == "embedding" else found

    def release(self) -> None:
        """Drop the weights from the devices; the next call puts them there again."""
        self._placed.clear()

    def _run(self, tower: str, output: str, given: dict[str, np.ndarray]) -> np.ndarray:
        forward, variables = self._forward(tower, output), self._variables(tower)
        count, parts = len(next(iter(given.values()))), []
        for first in range(0, count, self.batch_size):
            part = {k: v[first : first + self.batch_size] for k, v in given.items()}
            size = len(next(iter(part.values())))
            filled = {k: np.concatenate([v, np.repeat(v[:1], self.batch_size - size, axis=0)]) for k, v in part.items()}
            parts.append(np.asarray(forward(variables, parallel.to_device(self._mesh, filled)))[:size])
        return np.concatenate(parts)

    def _variables(self, tower: str) -> Any:
        if tower not in self._placed:
            self._placed[tower] = jax.device_put(self.variables[tower], parallel.replicated(self._mesh))
        return self._placed[tower]

    def _forward(self, tower: str, output: str) -> Callable[..., Any]:
        if output not in ("embedding", "pooled", "tokens"):
            raise ValueError(f"output: expected 'embedding', 'pooled' or 'tokens', got {output!r}")
        if (tower, output) not in self._compiled:
            self._compiled[tower, output] = jax.jit(lambda v, batch: self.features(tower, v, batch, output))
        return self._compiled[tower, output]


def load(folder: str | Path, *, dtype: DTypeLike = "float32", batch_size: int = 64) -> ImageText:
    """The towers of a local folder with CLIP's or SigLIP's config.json, safetensors, preprocessor_config.json and
    tokenizer. dtype: of activations ('float32' in full precision, 'bfloat16').

    Raises ValueError for a missing folder or file, another architecture, files that are cut off or do not belong
    together. Nothing is downloaded."""
    return ImageText(folder, dtype=dtype, batch_size=batch_size)

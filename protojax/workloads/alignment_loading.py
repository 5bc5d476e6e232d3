"""A trained aligner for other code: both towers as functions, at any prefix, without the training data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from protojax import parallel, probing
from protojax.api import Recipe, Source, SourceSpec, TrainState
from protojax.config import Config
from protojax.data.pairs import Pairs, Texts, text_tables
from protojax.data.pairs_text import hashed_texts, longest_of
from protojax.evals.retrieval_pairs import prefix_units
from protojax.models.text import TEXT_POOLS
from protojax.step import observer
from protojax.workloads.alignment_parts import TEXT_ENTRIES, check_same_tower, text_pool
from protojax.workloads.alignment_recipe import make_recipe, pairs_of, settings_of


class AlignedEncode:
    """encode(images) and encode_text(captions) -> unit float32 [N,D] of one space; `width` cuts to a trained prefix and
    renormalises. `widths`: the trained prefixes, descending. Images are uint8 [N,H,W,3]; image tokens float
    [N,T,D_image] where the run was trained on tokens. Raises TypeError or ValueError for other inputs and untrained
    widths."""

    def __init__(self, recipe: Recipe, state: TrainState, config: Config, workdir: Path, batch_size: int = 64):
        self.config, self.step, self.batch_size = config, int(state.step), batch_size
        settings = settings_of(config)
        self.widths: tuple[int, ...] = tuple(settings["prefix_dims"])
        self.text_pool = text_pool(settings)
        self.fingerprint = str(read_shapes(workdir)["fingerprint"])
        self._example = recipe.sources["train"].batch(0)
        _, self._variables, _ = observer(recipe, state)
        self._forward = probing.make_forward(recipe, parallel.make_mesh(1, 1, devices=jax.devices()[:1]))
        tokenizer = Path(workdir) / "tokenizer.json"
        self._tokenizer = tokenizer if tokenizer.exists() else None

    def encode(self, images: np.ndarray, width: int | None = None, output: str = "image") -> np.ndarray:
        images = np.asarray(images)
        name = "image_tokens" if "image_tokens" in self._example else "image"
        if name == "image" and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3):
            raise TypeError(f"images: expected uint8 [N,H,W,3], got {images.dtype} {list(images.shape)}.")
        if name == "image_tokens" and (images.ndim != 3 or images.shape[-1] != self._example[name].shape[-1]):
            raise ValueError(f"image tokens: expected [N,T,{self._example[name].shape[-1]}], got {list(images.shape)}.")
        return self._cut(self._run({name: images}, len(images), output), width)

    __call__ = encode

    def encode_text(self, captions: Sequence[str], width: int | None = None) -> np.ndarray:
        return self._cut(self._run(self._text(tuple(captions)), len(captions), "text"), width)

    def _text(self, captions: tuple[str, ...]) -> dict[str, np.ndarray]:
        if not captions or any(not c.strip() for c in captions):
            raise ValueError("captions: expected at least one, none of them empty.")
        if "text_ids" in self._example:
            from protojax.data.tokenizer import load_tokenizer, tokenise

            if self._tokenizer is None:
                raise ValueError("this run's tokenizer.json is missing: captions cannot be read")
            ids, mask, _ = tokenise(load_tokenizer(self._tokenizer), captions, self._example["text_ids"].shape[-1])
            return {"text_ids": ids, "text_mask": mask}
        texts = hashed_texts(captions, longest=longest_of(self.fingerprint))
        return {k: v.read(np.arange(len(captions))) for k, v in text_tables(texts, self.text_pool).items()}

    def encode_texts(self, texts: Texts, width: int | None = None) -> np.ndarray:
        """All captions of a split. Raises ValueError for texts of another tower than the run's."""
        check_same_tower(self.fingerprint, texts.fingerprint, "this run's texts and those of the data")
        rows = np.arange(len(texts.captions))
        given = {k: v.read(rows) for k, v in text_tables(texts, self.text_pool).items()}
        return self._cut(self._run(given, len(rows), "text"), width)

    def encode_states(self, states: np.ndarray, width: int | None = None) -> np.ndarray:
        """Pooled states [N,D_text] of the run's frozen text tower. Raises ValueError where the run reads all positions
        of a caption (shared_resampler), or token ids."""
        if "text" not in self._example:
            raise ValueError("this run reads every position of a caption, not pooled states: give captions")
        return self._cut(self._run({"text": np.asarray(states, np.float32)}, len(states), "text"), width)

    def _run(self, given: dict[str, np.ndarray], count: int, output: str) -> np.ndarray:
        out = []
        for first in range(0, count, self.batch_size):
            part = {k: v[first : first + self.batch_size] for k, v in given.items()}
            size = len(next(iter(part.values())))
            batch = {k: np.zeros((self.batch_size, *v.shape[1:]), v.dtype) for k, v in self._plain().items()}
            for name, values in part.items():
                pad = np.zeros((self.batch_size - size, *values.shape[1:]), values.dtype)
                batch[name] = np.concatenate([values, pad])
            found = self._forward(self._variables, jax.tree.map(jnp.asarray, batch))
            if output not in found:
                raise ValueError(f"output: expected one of {sorted(found)}, got {output!r}.")
            out.append(np.asarray(found[output])[:size])
        return np.concatenate(out)

    def _plain(self) -> dict[str, np.ndarray]:
        """An example batch with one caption an image."""
        several = self._example["caption_id"].ndim > 1
        return {k: v[:, 0] if several and k in TEXT_ENTRIES else v for k, v in self._example.items()}

    def _cut(self, rows: np.ndarray, width: int | None) -> np.ndarray:
        if width is None:
            return rows
        if width not in self.widths:
            raise ValueError(f"width: this run trained the prefixes {list(self.widths)}, got {width}.")
        return prefix_units(rows, width)


def write_shapes(config: Config, recipe: Recipe, workdir: Path) -> None:
    """`alignment.npz`, shapes and dtypes of a batch and the fingerprint of the texts: what loading needs instead of the
    data; and `tokenizer.json` where captions are token ids."""
    texts = pairs_of(config, config.data.train_split).texts
    arrays = {k: np.zeros_like(v[:1]) for k, v in recipe.sources["train"].batch(0).items()}
    arrays["fingerprint"] = np.asarray(texts.fingerprint)
    if "text_ids" in arrays:
        (workdir / "tokenizer.json").write_text(str(texts.tokenizer))
    np.savez_compressed(workdir / "alignment.npz", **arrays)  # type: ignore[arg-type]


def read_shapes(workdir: Path) -> dict[str, np.ndarray]:
    """What `write_shapes` wrote. Raises FileNotFoundError where it did not."""
    path = Path(workdir) / "alignment.npz"
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: it is written when an alignment run begins.")
    with np.load(path) as archive:
        return {k: archive[k] for k in archive.files}


def hollow_recipe(config: Config, workdir: Path) -> Recipe:
    """The run's recipe on blank pairs of the same shapes."""
    one = read_shapes(workdir)
    size = config.data.batch_size
    rows = {k: np.zeros((size, *v.shape[1:]), v.dtype) for k, v in one.items() if k != "fingerprint"}
    rows["mask"] = np.ones((size,), bool)
    shapes = {k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for k, v in rows.items()}
    spec = SourceSpec("blank", size, size, 1, shapes, {}, {})
    source = Source(spec, lambda step: dict(rows))
    return make_recipe(config, settings_of(config), blank_pairs(one), {"train": source, "test": source}, {})


def blank_pairs(one: dict[str, Any]) -> Pairs:
    """Pairs with the shapes of a batch and nothing in them."""
    image = {k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for k, v in one.items() if k.startswith("image")}
    image.pop("image_id", None)
    made = str(one["fingerprint"])
    if "text_ids" in one:
        ids = np.zeros((1, one["text_ids"].shape[-1]), np.int32)
        texts = Texts(("",), {}, True, made, ids=ids, mask=ids.astype(bool))
    else:
        width = one["text" if "text" in one else "text_states"].shape[-1]
        pools = {pool: np.zeros((1, width), np.float32) for pool in TEXT_POOLS}
        texts = Texts(("",), pools, False, made, empty={pool: rows[0] for pool, rows in pools.items()})

    def read(rows: np.ndarray) -> Any:
        return {k: np.zeros((len(rows), *v.shape), v.dtype) for k, v in image.items()}, np.ones(len(rows), bool)

    return Pairs("blank", 1, image, read, (np.zeros(1, np.int32),), texts)


def embed(
    workdir: Path, out: Path, *, data: str | None = None, split: str | None = None, width: int | None = None
) -> str:
    """Unit embeddings of a split of the run's pairs (`image` [M,D], `text` [T,D], `captions` [T]), or of a folder of
    pictures (`image`), at a trained prefix, as .npz; returns a line that says so.

    Raises ValueError for another file type, a split that is not there, texts of another tower than the run's, and a
    width that was not trained."""
    from protojax.data.folder import open_image_folder
    from protojax.loading import load, read_config

    if out.suffix != ".npz":
        raise ValueError(f"--out: embeddings of an alignment run are written as .npz, got {out.name!r}")
    config, model = read_config(workdir), load(workdir)
    if data is not None:
        side = model._example["image"].shape[1] if "image" in model._example else 0
        if not side:
            raise ValueError("this run was trained on image tokens: pictures cannot be embedded; leave --data out")
        records = open_image_folder(data, split or "all", canvas=side, labels="none")
        arrays = {"image": model.encode(records.read(np.arange(records.size))[0]["image"], width)}
    else:
        pairs = pairs_of(config, split or config.data.test_split)
        content = pairs.read(np.arange(pairs.size))[0]
        arrays = {"image": model.encode(content["image" if "image" in content else "image_tokens"], width)}
        arrays["text"] = model.encode_texts(pairs.texts, width)
        arrays["captions"] = np.asarray(pairs.texts.captions)
    np.savez_compressed(out, **arrays)  # type: ignore[arg-type]
    return f"{out}: " + ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())

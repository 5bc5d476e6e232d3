"""Theorems of the mixture of prompts: what the E-step, the loss and its terms promise."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from protojax.api import Codebook
from protojax.estimators.usage import usage_start, usage_statistics, usage_update
from protojax.objectives import prompts_terms as terms
from protojax.objectives.prompts import (
    PromptData,
    PromptOptions,
    check_count,
    class_weight,
    e_step,
    prompt_loss,
    prompt_terms,
    prompts,
)
from protojax.ops import prompts as ops
from protojax.ops.unit import unit

B, C, K, D = 12, 4, 3, 16
CURED = PromptOptions()
SOFT = PromptOptions(hard_assignment=False)
ORIGINAL = dataclasses.replace(SOFT, e_step_centre="none", balance="none", cls_temperature=0.07)
TAU = 0.5


def example(seed: int = 0, rows: int = B) -> tuple[jax.Array, PromptData]:
    """(offsets, data): images of C classes in a cone, labels that cover every class, usage of uneven shares."""
    keys = jax.random.split(jax.random.key(seed), 5)
    images = unit(1.0 + 0.5 * jax.random.normal(keys[0], (rows, D)))
    labels = jnp.arange(rows, dtype=jnp.int32) % C
    base = unit(jax.random.normal(keys[1], (C, D)))
    mean = jnp.zeros((C, D)).at[labels].add(images) / (rows // C)
    usage = jax.nn.softmax(jax.random.normal(keys[2], (C, K)), axis=1)
    offsets = 0.3 * jax.random.normal(keys[3], (C, K, D))
    return offsets, PromptData(images, labels, jnp.ones(rows, bool), base, mean, usage)


def logits_of(offsets: jax.Array, data: PromptData, **options: float) -> jax.Array:
    own = ops.prompts_of(data.base, offsets)[data.labels]
    return ops.e_step_logits(data.images, data.centre[data.labels], own, data.usage[data.labels], sharpness=100.0,
                             **options)  # fmt: skip


def test_centring_makes_the_class_mean_of_every_logit_zero():
    offsets, data = example()
    logits = logits_of(offsets, data, price=0.0)
    means = jnp.zeros((C, K)).at[data.labels].add(logits) / (B // C)
    # Sums of B / C products of magnitude 100 in float32.
    np.testing.assert_allclose(means, 0.0, atol=100 * (B // C) * 16 * np.finfo(np.float32).eps)


def test_the_price_is_minus_price_times_the_log_of_usage_over_its_share():
    offsets, data = example()
    free, priced = logits_of(offsets, data, price=0.0), logits_of(offsets, data, price=5.0)
    expected = -5.0 * np.log(K * np.asarray(data.usage)[np.asarray(data.labels)])
    np.testing.assert_allclose(priced - free, expected, rtol=1e-3, atol=1e-3)
    even = data._replace(usage=usage_start(C, K))
    np.testing.assert_allclose(logits_of(offsets, even, price=5.0), free, atol=1e-5)


def test_without_centre_and_price_it_is_the_published_loss():
    """lambda * -mean_b sum_k sg(softmax(s / tau)) s + (1 - lambda) * CE(max_k s / T) + w mean offsets^2, in NumPy."""
    offsets, data = example()
    data = data._replace(centre=jnp.zeros_like(data.centre))
    found, _ = prompt_loss(offsets, data, ORIGINAL, TAU)
    x, y, o = (np.asarray(v, np.float64) for v in (data.images, data.labels, offsets))
    y = y.astype(int)
    prompts = np.asarray(data.base, np.float64)[:, None] + o
    prompts /= np.linalg.norm(prompts, axis=2, keepdims=True)
    every = 50.0 * np.einsum("bd,ckd->bck", x, prompts)
    own = every[np.arange(B), y]
    r = np.exp(own / TAU - (own / TAU).max(1, keepdims=True))
    r /= r.sum(1, keepdims=True)
    best = every.max(axis=2) / 0.07
    ce = np.log(np.exp(best - best.max(1, keepdims=True)).sum(1)) + best.max(1) - best[np.arange(B), y]
    expected = -0.5 * (r * own).sum(1).mean() + 0.5 * ce.mean() + 1e-3 * (o**2).mean()
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_permuting_sub_prompts_permutes_everything():
    offsets, data = example()
    order = jnp.asarray([2, 0, 1])
    moved = data._replace(usage=data.usage[:, order])
    options = dataclasses.replace(CURED, diversity_weight=1.0, entropy_weight=0.5, min_usage_weight=1.0)
    loss, grad = jax.value_and_grad(lambda o: prompt_loss(o, data, options, TAU)[0])(offsets)
    same, turned = jax.value_and_grad(lambda o: prompt_loss(o, moved, options, TAU)[0])(offsets[:, order])
    assert float(loss) == pytest.approx(float(same), rel=1e-5)
    np.testing.assert_allclose(turned, grad[:, order], rtol=1e-3, atol=1e-5)


def test_a_constant_added_to_all_similarities_of_an_image_changes_no_responsibility():
    offsets, data = example()
    r = e_step(ops.prompts_of(data.base, offsets)[data.labels], data, ORIGINAL, TAU).responsibilities
    logits = 50.0 / TAU * jnp.einsum("bd,bkd->bk", data.images - data.centre[data.labels],
                                     ops.prompts_of(data.base, offsets)[data.labels])  # fmt: skip
    np.testing.assert_allclose(jax.nn.softmax(logits + 7.0, axis=1), r, atol=1e-5)


def test_a_masked_row_changes_nothing_whatever_it_holds():
    offsets, data = example()
    options = dataclasses.replace(CURED, diversity_weight=1.0, entropy_weight=0.5, min_usage_weight=1.0)
    worse = PromptData(
        jnp.concatenate([data.images, jnp.full((2, D), jnp.nan)]),
        jnp.concatenate([data.labels, jnp.asarray([-1, 0], jnp.int32)]),
        jnp.concatenate([data.mask, jnp.zeros(2, bool)]), data.base, data.centre, data.usage,
    )  # fmt: skip
    function = lambda o, d: prompt_loss(o, d, options, TAU)[0]  # noqa: E731
    loss, grad = jax.value_and_grad(function)(offsets, data)
    masked, masked_grad = jax.value_and_grad(function)(offsets, worse)
    assert float(masked) == pytest.approx(float(loss), rel=1e-6)
    np.testing.assert_allclose(masked_grad, grad, rtol=1e-4, atol=1e-6)
    g = jnp.concatenate([jnp.ones((B, K)) / K, jnp.full((2, K), jnp.nan)])
    full, clean = (usage_statistics(a, w.labels, w.mask, C) for a, w in ((g, worse), (g[:B], data)))
    for name in full:
        np.testing.assert_array_equal(full[name], clean[name])


@pytest.mark.parametrize("pool", ops.POOLS)
def test_chunked_scores_equal_unchunked_ones_and_so_do_their_gradients(pool: str):
    offsets, data = example()
    weight = jax.random.normal(jax.random.key(9), (B, C))

    def total(o: jax.Array, chunk: int) -> jax.Array:
        return jnp.sum(weight * ops.class_scores(data.images, data.base, o, scale=3.0, pool=pool, chunk=chunk))

    whole, grad = jax.value_and_grad(total)(offsets, C)
    part, part_grad = jax.value_and_grad(total)(offsets, 3)  # 4 classes in chunks of 3: the last one overlaps
    assert float(part) == pytest.approx(float(whole), rel=1e-5)
    np.testing.assert_allclose(part_grad, grad, rtol=1e-4, atol=1e-5)
    scores = ops.class_scores(data.images, data.base, offsets, scale=3.0, pool=pool)
    every = 3.0 * np.einsum("bd,ckd->bck", data.images, ops.prompts_of(data.base, offsets))
    reference = every.max(2) if pool == "max" else np.log(np.exp(every).mean(2))
    np.testing.assert_allclose(scores, reference, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_own_rows_is_added_where_the_array_stands():
    offsets, _ = example()
    labels = jnp.asarray([1, 1, 3])

    def total(o: jax.Array) -> jax.Array:
        whole, rows = ops.own_rows(o, labels)
        return jnp.sum(whole**3) + jnp.sum(rows**2)

    expected = 3 * offsets**2 + jnp.zeros_like(offsets).at[labels].add(2 * offsets[labels])
    np.testing.assert_allclose(jax.grad(total)(offsets), expected, rtol=1e-5)


def test_with_one_prompt_the_mixture_term_is_linear_in_the_images():
    offsets, data = example()
    offsets, data = offsets[:, :1], data._replace(usage=usage_start(C, 1))
    options = PromptOptions(mixture_weight=1.0, offset_penalty=0.0)

    def value(images: jax.Array) -> float:
        return float(prompt_loss(offsets, data._replace(images=images), options, TAU)[0])

    other = example(1)[1].images
    assert value(2.0 * data.images + 3.0 * other) == pytest.approx(2 * value(data.images) + 3 * value(other), rel=1e-4)


# ------------------------------------------------------------------------------------------------- liveness
EVERY = dataclasses.replace(CURED, diversity_weight=1.0, entropy_weight=1.0, min_usage_weight=1.0,
                            min_usage_threshold=0.9, offset_penalty=1e-3)  # fmt: skip


def gradient_norms(options: PromptOptions) -> dict[str, float]:
    offsets, data = example()

    def norm(name: str) -> float:
        return float(jnp.linalg.norm(jax.grad(lambda o: prompt_terms(o, data, options, TAU)[0][name])(offsets)))

    return {name: norm(name) for name in options.weights}


def test_every_term_has_a_gradient_and_stopped_ones_have_exactly_none():
    live = gradient_norms(EVERY)
    assert set(live) == {"mixture", "classification", "offset_penalty", "diversity", "entropy", "min_usage"}
    assert min(live.values()) > 1e-6
    stopped = gradient_norms(dataclasses.replace(EVERY, regulariser_gradient="stopped", allow_dead_terms=True))
    assert stopped["entropy"] == 0.0
    assert stopped["min_usage"] == 0.0
    assert stopped["diversity"] == live["diversity"] > 0.0


def seen(offsets: jax.Array, data: PromptData, options: PromptOptions) -> tuple[float, float]:
    """(weight, gradient norm) of the classification term as the gradient probe sees them."""
    book = Codebook(offsets, data.usage)
    constants = {"base": data.base, "centre": data.centre}
    inputs = {
        "student": {"image": data.images[None]}, "mask": data.mask, "step": jnp.int32(0), "prediction": book,
        "batch": {"label": data.labels, "constants": constants}, "estimator": {"shared": {}},
    }  # fmt: skip
    named = prompts(options=options, total_steps=10).terms
    weight, _ = named({}, inputs)["classification"]
    value = lambda o: named({}, {**inputs, "prediction": Codebook(o, data.usage)})["classification"][1]  # noqa: E731
    return float(weight), float(jnp.linalg.norm(jax.grad(value)(offsets)))


def test_a_cross_entropy_that_is_met_to_rounding_is_not_taken_for_a_dead_term():
    """50 / 0.07 = 714: with prompts on their images float32 leaves a gradient of exactly 0, and the probe then gives
    the term no weight. A class that is missed keeps its weight."""
    offsets, data = example()
    apart = data._replace(images=jnp.eye(C, D)[data.labels], base=jnp.eye(C, D))
    zero = jnp.zeros_like(offsets)
    assert seen(zero, apart, ORIGINAL) == (0.0, 0.0)
    weight, norm = seen(zero, apart._replace(labels=(apart.labels + 1) % C), ORIGINAL)
    assert weight == 0.5
    assert norm > 1.0


def test_the_assignment_of_the_mixture_term_carries_no_gradient():
    """With g live the gradient of a winner's term would have a second part; the EM surrogate has not."""
    offsets, data = example()
    own = lambda o: ops.prompts_of(data.base, o)[data.labels]  # noqa: E731
    g = e_step(own(offsets), data, CURED, TAU).assignment

    def fixed(o: jax.Array) -> jax.Array:
        return terms.mixture(50.0 * jnp.einsum("bd,bkd->bk", data.images, own(o)), g, jnp.ones(B))

    def surrogate(o: jax.Array) -> jax.Array:
        return prompt_terms(o, data, CURED, TAU)[0]["mixture"]

    np.testing.assert_allclose(jax.grad(surrogate)(offsets), jax.grad(fixed)(offsets), rtol=1e-4, atol=1e-5)


def test_hard_and_uniform_assignments():
    offsets, data = example()
    own = ops.prompts_of(data.base, offsets)[data.labels]
    soft = e_step(own, data, SOFT, TAU)
    hard = e_step(own, data, CURED, TAU).assignment
    np.testing.assert_array_equal(hard.argmax(1), soft.responsibilities.argmax(1))
    np.testing.assert_array_equal(hard.sum(1), 1.0)
    uniform = e_step(own, data, dataclasses.replace(SOFT, uniform_plan=True), TAU)
    np.testing.assert_allclose(uniform.assignment, 1.0 / K)
    np.testing.assert_array_equal(uniform.responsibilities, soft.responsibilities)


def test_diversity_is_the_mean_over_pairs_and_each_class_present_counts_once():
    offsets, data = example()
    prompts = np.asarray(ops.prompts_of(data.base, offsets))
    labels = jnp.asarray([0, 0, 0, 2], jnp.int32)
    weight = class_weight(labels, jnp.ones(4), C)
    pairs = [(k, l) for k in range(K) for l in range(k + 1, K)]
    cosine = {c: np.asarray([prompts[c, k] @ prompts[c, l] for k, l in pairs]) for c in (0, 2)}
    own = jnp.asarray(prompts)[labels]
    square = float(terms.diversity(own, weight))
    assert square == pytest.approx(np.mean([(v**2).mean() for v in cosine.values()]), rel=1e-5)
    hinge = float(terms.diversity(own, weight, form="hinge", margin=0.1))
    assert hinge == pytest.approx(np.mean([(np.maximum(v - 0.1, 0) ** 2).mean() for v in cosine.values()]), rel=1e-4)


# --------------------------------------------------------------------------------------------------- usage
def test_usage_is_additive_over_parts_of_a_batch_and_keeps_classes_that_are_absent():
    _, data = example()
    g = jax.nn.softmax(jax.random.normal(jax.random.key(3), (B, K)), axis=1)
    whole = usage_statistics(g, data.labels, data.mask, C + 1)
    parts = [usage_statistics(g[s], data.labels[s], data.mask[s], C + 1) for s in (slice(0, 5), slice(5, B))]
    for name in whole:
        np.testing.assert_allclose(whole[name], parts[0][name] + parts[1][name], rtol=1e-6)
    usage = jnp.concatenate([data.usage, jnp.asarray([[0.5, 0.25, 0.25]])])
    moved = usage_update(usage, whole, jnp.full((C + 1,), 8), 1.0)
    np.testing.assert_array_equal(moved[C], usage[C])
    np.testing.assert_allclose(moved.sum(1), 1.0, rtol=1e-6)


def test_half_of_the_past_is_forgotten_in_one_epoch_of_the_class():
    """N_c images, one a step, all of the first sub-prompt: the others keep exactly half of their share."""
    size, usage = 10, usage_start(1, 2)
    one = {"count": jnp.ones((1,)), "mass": jnp.asarray([[1.0, 0.0]])}
    for _ in range(size):
        usage = usage_update(usage, one, jnp.asarray([size]), 1.0)
    np.testing.assert_allclose(usage, [[0.75, 0.25]], rtol=1e-5)


# -------------------------------------------------------------------------------------------- initialisation
def test_normal_offsets_have_the_cosine_that_arithmetic_says():
    base = unit(jax.random.normal(jax.random.key(1), (8, 512)))
    prompts = ops.prompts_of(base, ops.normal_offsets(jax.random.key(2), (8, 8, 512), 0.01))
    cosine = np.einsum("ckd,cld->ckl", prompts, prompts)[:, *np.triu_indices(8, 1)]
    assert cosine.mean() == pytest.approx(1 / (1 + 512 * 0.01**2), abs=0.002)  # 0.951, at initialisation


def test_orthogonal_offsets_are_orthogonal_within_a_class():
    offsets = np.asarray(ops.orthogonal_offsets(jax.random.key(0), (2, K, D), 0.5))
    np.testing.assert_allclose(np.einsum("ckd,cld->ckl", offsets, offsets), 0.25 * D * np.eye(K)[None].repeat(2, 0),
                               atol=1e-5)  # fmt: skip
    with pytest.raises(ValueError, match="at most D = 2 rows of a class are orthogonal, got K = 3"):
        ops.orthogonal_offsets(jax.random.key(0), (2, 3, 2), 0.5)


def test_plus_plus_takes_one_image_of_each_tight_mode_and_noise_where_images_run_out():
    """Class 0: three far modes of four copies each; K = 3 picks one of each. Class 1: one image; the rest is noise."""
    modes = np.eye(D, dtype=np.float32)[:3]
    images = jnp.asarray(np.concatenate([np.repeat(modes, 4, axis=0), np.eye(D, dtype=np.float32)[5:6]]))
    labels = jnp.asarray([0] * 12 + [1], jnp.int32)
    mean = jnp.stack([images[:12].mean(0), jnp.zeros(D)])
    offsets = np.asarray(ops.plus_plus_offsets(jax.random.key(0), images, labels, mean, 3, 0.1))
    np.testing.assert_allclose(np.linalg.norm(offsets, axis=2), 0.1 * D**0.5, rtol=1e-5)
    nearest = (offsets[0] @ np.asarray(unit(images[:12] - mean[:1])).T).argmax(1) // 4
    assert sorted(nearest.tolist()) == [0, 1, 2]
    owned = offsets[1] @ np.asarray(images[12]) / (0.1 * D**0.5)
    assert (owned > 0.99).sum() == 1


# --------------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau_end": 0.0}, "tau_end: expected a positive number, got 0.0"),
        ({"price": -1.0}, "price: expected a number >= 0, got -1.0"),
        ({"mixture_weight": 1.5}, r"mixture_weight: expected a number in \[0, 1\], got 1.5"),
        ({"e_step_centre": "clas"}, "did you mean 'class'"),
        ({"diversity_form": "hinge"}, "needs diversity_margin"),
        ({"min_usage_weight": 1.0, "regulariser_gradient": "stopped"}, "min_usage.*'stopped' cuts"),
        ({"hard_assignment": True, "uniform_plan": True}, "uniform_plan"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        PromptOptions(**options)


def test_counts_out_of_range_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        check_count(PromptOptions(), 0)
    with pytest.raises(ValueError, match=r"num_prompts = 1: .'entropy'. have nothing to act on"):
        check_count(PromptOptions(entropy_weight=1.0), 1)
    check_count(PromptOptions(), 1)


# --------------------------------------------------------------------------------------------------- memory
def test_ten_thousand_classes_of_32_prompts_fit_with_temporaries_far_below_the_offsets():
    """C = 10,000, K = 32, D = 512, B = 96: temporaries of the compiled gradient, minus the gradient itself, stay below
    0.15 GiB. Read from the compiled program; nothing is allocated."""
    classes, count, width, batch = 10_000, 32, 512, 96
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    labels, mask = (jax.ShapeDtypeStruct((batch,), d) for d in (jnp.int32, bool))
    data = PromptData(f32(batch, width), labels, mask, f32(classes, width), f32(classes, width), f32(classes, count))
    gradient = jax.jit(jax.grad(lambda o, d: prompt_loss(o, d, CURED, TAU)[0]))
    analysis = gradient.lower(f32(classes, count, width), data).compile().memory_analysis()
    extra = analysis.temp_size_in_bytes  # the gradient is the program's result, counted apart
    assert analysis.output_size_in_bytes == 4 * classes * count * width
    assert extra < 0.15 * 2**30, f"{extra / 2**30:.3f} GiB"

"""Tables: preparation from the training split alone, splits without a shared group, and what is refused."""

from __future__ import annotations

import csv
import json
import logging

import numpy as np
import pytest

from protojax.data import soft_labels as lib
from protojax.data import tables
from protojax.data.city import synthetic_city
from protojax.data.tables import apply_preparation, check_targets, fit_preparation, from_distances, read_preparation
from protojax.evals.soft_labels import entropy, kl


def columns(seed: int = 0, rows: int = 200) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "a": rng.standard_normal(rows),
        "b": 1e4 * rng.uniform(size=rows),
        "c": np.exp(4 * rng.standard_normal(rows)),
        "kind": np.asarray(["x", "y", "z"])[rng.integers(0, 3, rows)],
    }


# -------------------------------------------------------------------------------------------------- preparation
@pytest.mark.parametrize("method", ["standard", "robust", "rank"])
def test_scaling_and_shifting_a_column_changes_nothing(method):
    """Up to float32's last place, even at a shift of 10^8: everything until then is float64."""
    raw = columns()
    moved = {**raw, "a": 1e3 * raw["a"] + 1e8, "b": raw["b"] / 7.0 - 5.0}
    one = apply_preparation(fit_preparation(raw, standardise=method), raw)
    two = apply_preparation(fit_preparation(moved, standardise=method), moved)
    np.testing.assert_allclose(one, two, atol=2e-6)
    assert one.dtype == np.float32
    assert np.abs(one).max() <= 8.0
    if method != "robust":
        numbers = one[:, :2].astype(np.float64)
        np.testing.assert_allclose(numbers.mean(0), 0.0, atol=0.02)
        np.testing.assert_allclose(numbers.std(0), 1.0, atol=0.02)


def test_raw_columns_stay_raw_and_statistics_survive_json():
    raw = columns()
    prepared = apply_preparation(fit_preparation(raw, standardise="none"), raw)
    np.testing.assert_array_equal(prepared[:, 1], raw["b"].astype(np.float32))
    for method in tables.STANDARDISE:
        fitted = fit_preparation(raw, standardise=method, heavy_tails="log", impute="median")
        again = read_preparation(json.loads(json.dumps(fitted.plain())))
        np.testing.assert_array_equal(apply_preparation(fitted, raw), apply_preparation(again, raw))
        assert again.names == ("a", "b", "c", "kind=x", "kind=y", "kind=z")


def test_heavy_tails_pass_a_logarithm_and_constant_columns_are_listed(caplog):
    raw = {**columns(), "flat": np.full(200, 3.0)}
    with caplog.at_level(logging.WARNING):
        fitted = fit_preparation(raw, heavy_tails="log")
    assert "flat" in caplog.text
    assert fitted.dropped == {"flat": "constant, 3"}
    logs = {c.name: c.log for c in fitted.columns}
    assert (logs["a"], logs["b"], logs["c"]) == (None, None, "log1p")
    assert np.abs(apply_preparation(fitted, raw)[:, 2]).max() < 5
    signed = {"c": raw["c"] * np.where(np.arange(200) % 2, 1, -1) * (1 + 9.0 * (np.arange(200) % 2))}
    assert fit_preparation(signed, heavy_tails="log").columns[0].log == "signed"
    with pytest.raises(ValueError, match=r"no feature column varies .*\['flat'\]"):
        fit_preparation({"flat": raw["flat"]})


def test_holes_are_named_or_filled_with_the_training_median():
    raw = columns()
    raw["a"] = np.where(np.arange(200) < 3, np.nan, raw["a"])
    with pytest.raises(ValueError, match=r"features hold NaN: a \(3\).*data.impute='median'"):
        fit_preparation(raw)
    fitted = fit_preparation(raw, impute="median")
    filled = {**raw, "a": np.where(np.isnan(raw["a"]), np.nanmedian(raw["a"]), raw["a"])}
    np.testing.assert_array_equal(apply_preparation(fitted, raw), apply_preparation(fitted, filled))
    plain = fit_preparation(columns())
    with pytest.raises(ValueError, match=r"new.csv: features hold NaN: a \(3\)"):
        apply_preparation(plain, raw, "new.csv")


def test_other_columns_and_unseen_levels_are_refused():
    fitted = fit_preparation(columns())
    short = {k: v for k, v in columns().items() if k != "b"}
    with pytest.raises(
        ValueError, match=r"lacks the columns \['b'\].*The model has \['a', 'b', 'c', 'kind'\].*has \['a'"
    ):
        apply_preparation(fitted, short)
    odd = {**columns(), "kind": np.asarray(["w"] * 200)}
    with pytest.raises(ValueError, match=r"column 'kind' holds \['w'\], which training did not have; it had \['x'"):
        apply_preparation(fitted, odd)
    with pytest.raises(ValueError, match="numbers in training and is text here"):
        apply_preparation(fitted, {**columns(), "a": columns()["kind"]})


def test_the_test_split_never_touches_the_statistics():
    splits = synthetic_city(train_size=100)
    spoiled = dict(splits)
    spoiled["test"] = splits["test"]._replace(columns={k: 1e6 * v for k, v in splits["test"].columns.items()})
    fits = [fit_preparation(s["train"].columns) for s in (splits, spoiled)]
    assert fits[0] == fits[1]
    a, b = (lib.sources(s, fits[0], batch_size=8, eval_batch_size=64, seed=0) for s in (splits, spoiled))
    np.testing.assert_array_equal(a["train"].batch(3)["features"], b["train"].batch(3)["features"])


# ------------------------------------------------------------------------------------------------------ targets
def test_targets_are_renormalised_or_refused():
    rows = np.random.default_rng(0).dirichlet(np.ones(3), 10)
    np.testing.assert_allclose(check_targets(1.0005 * rows, "t"), rows)
    for change, words in ((1.01, "sum to 1"), (0.0, "sums"), (np.nan, "rows")):
        bad = rows.copy()
        bad[4] *= change
        with pytest.raises(
            ValueError, match=rf"{words}.*" if words != "sums" else r"sums \[0.0\].*data.distance_scale"
        ):
            check_targets(bad, "t")
    negative = rows.copy()
    negative[2, 0] -= 1.0
    negative[2, 1] += 1.0
    with pytest.raises(ValueError, match=r"1 of 10 rows do not, for example rows \[2\]"):
        check_targets(negative, "t")
    with pytest.raises(TypeError, match=r"got int labels \[4\].*one_hot"):
        check_targets(np.arange(4), "t")
    with pytest.raises(ValueError, match="fewer than 2 categories"):
        check_targets(np.tile([[1.0, 0.0, 0.0]], (5, 1)), "t")


def test_distances_become_distributions_by_the_rule():
    d = np.asarray([[100.0, 300.0, np.nan]])
    expected = np.exp(-np.asarray([100.0, 300.0, 2400.0]) / 200.0)
    np.testing.assert_allclose(from_distances(d, 200.0, 2400.0)[0], expected / expected.sum())
    with pytest.raises(ValueError, match="distance_scale: expected a positive number"):
        from_distances(d, 0.0, 2400.0)
    with pytest.raises(ValueError, match="distances must be >= 0, got -1"):
        from_distances(-np.ones((1, 2)), 1.0, 1.0)


# --------------------------------------------------------------------------------------------------------- city
def test_the_city_is_what_the_page_says():
    """Facts of the generator, over its test split: entropies, largest probability, and the KL of known predictors."""
    splits = synthetic_city(seed=1)
    assert [splits[s].size for s in lib.SPLIT_NAMES] == [1844, 308, 1484]
    assert len(splits["train"].columns) == 33
    t = splits["test"].targets
    assert entropy(t).mean() == pytest.approx(1.78, abs=0.08)
    assert t.max(axis=1).mean() == pytest.approx(0.28, abs=0.03)
    uniform, constant = kl(t, np.full(8, 1 / 8)).mean(), kl(t, splits["train"].targets.mean(0)).mean()
    assert uniform == pytest.approx(0.300, abs=0.06)
    assert constant == pytest.approx(0.240, abs=0.06)
    assert kl(t, splits["test"].bayes).mean() == pytest.approx(0.041, abs=0.006)
    again = synthetic_city(seed=1)
    np.testing.assert_array_equal(again["test"].targets, t)
    assert not np.array_equal(synthetic_city(seed=2)["test"].targets, t)


def test_presets_keep_districts_apart_and_scalings_differ_in_two_columns():
    for preset, counts in (("district", (36, 6, 18)), ("seven", (4, 1, 2))):
        splits = synthetic_city(preset=preset, train_size=100)
        tables.check_groups(splits)
        assert tuple(len(np.unique(splits[s].group)) for s in lib.SPLIT_NAMES) == counts
    bad, well = (synthetic_city(scaling=s, train_size=60)["train"] for s in ("badly", "well"))
    differ = [k for k in bad.columns if not np.array_equal(bad.columns[k], well.columns[k])]
    assert differ == ["population_density", "income"]
    np.testing.assert_array_equal(bad.targets, well.targets)
    one, two = (apply_preparation(fit_preparation(t.columns), t.columns) for t in (bad, well))
    np.testing.assert_allclose(one, two, atol=1e-5)
    nasty = synthetic_city(nasty=True, train_size=200)["train"]
    assert "constant" in fit_preparation(nasty.columns, impute="median").dropped
    with pytest.raises(ValueError, match=r"preset: expected one of .* got 'sevn' \(did you mean 'seven'\?\)"):
        synthetic_city(preset="sevn")
    with pytest.raises(ValueError, match="is in the splits 'train' and 'val'"):
        tables.check_groups(synthetic_city(train_size=100))


def test_stars_have_neighbours_of_their_own_district_and_signed_offsets():
    train = synthetic_city(neighbours=5, train_size=50)["train"]
    assert train.graph["neighbours"].shape == (50, 5, 33)
    income = list(train.columns).index("income")
    np.testing.assert_allclose(
        train.graph["neighbours"][:, :, income], np.tile(train.columns["income"][:, None], (1, 5))
    )
    edges = train.graph["edges"]
    np.testing.assert_allclose(np.linalg.norm(edges[..., :2], axis=2), edges[..., 2])
    assert edges[..., :2].min() < 0
    assert not train.graph["neighbour_mask"].all()


# ---------------------------------------------------------------------------------------------------- a user's file
def write_csv(path, rows=60, seed=0, extra=None):
    rng = np.random.default_rng(seed)
    x, targets = rng.standard_normal((rows, 2)), rng.dirichlet(np.ones(3), rows)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "north", "wealth", "target_a", "target_b", "target_c", *(extra or {})])
        for i in range(rows):
            more = [values[i] for values in (extra or {}).values()]
            writer.writerow([f"d{i % 10}", x[i, 0], 1e4 * x[i, 1], *targets[i].round(9), *more])
    return path


def test_a_csv_becomes_splits_without_a_shared_group(tmp_path):
    splits = lib.table(root=write_csv(tmp_path / "places.csv"))
    tables.check_groups(splits)
    assert sum(t.size for t in splits.values()) == 60
    assert [len(np.unique(splits[s].group)) for s in lib.SPLIT_NAMES] == [6, 1, 3]
    train = splits["train"]
    assert (train.categories, tuple(train.columns)) == (("a", "b", "c"), ("north", "wealth"))
    given = {"split": ["train"] * 40 + ["val"] * 10 + ["test"] * 10}
    own = lib.table(root=write_csv(tmp_path / "own.csv", extra=given), split="random")
    assert [own[s].size for s in lib.SPLIT_NAMES] == [40, 10, 10]
    with pytest.raises(ValueError, match=r"group 'd\d' is in the splits"):
        lib.table(root=tmp_path / "own.csv")


def test_parquet_and_npz_read_the_same(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = write_csv(tmp_path / "places.csv")
    read = lib.read_columns(path)
    pq.write_table(pa.table({k: v.tolist() for k, v in read.items()}), tmp_path / "places.parquet")
    one, two = (lib.table(root=p)["train"] for p in (path, tmp_path / "places.parquet"))
    np.testing.assert_array_equal(one.targets, two.targets)
    np.savez(
        tmp_path / "p.npz",
        features=np.stack([read["north"], read["wealth"]], 1),
        columns=["north", "wealth"],
        targets=np.stack([read[f"target_{c}"] for c in "abc"], 1),
        categories=list("abc"),
        group=read["group"],
    )
    three = lib.table(root=tmp_path / "p.npz")["train"]
    np.testing.assert_allclose(one.columns["wealth"], three.columns["wealth"])
    assert one.categories == three.categories


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("a,target_x,target_y\n1,0.5,0.6\n", {}, r"targets must be >= 0 and sum to 1.*rows \[0\] with sums \[1.1\]"),
        (
            "a,distance_x,distance_y\n1,100,200\n",
            {},
            r"begin with 'target_', got \[\]. Distances need data.distance_scale",
        ),
        ("a,target_x,target_y\n1,0.5\n", {}, "line 2 does not have 3 cells"),
        ("a,a,target_y\n1,1,1\n", {}, r"names \['a'\] more than once"),
        ("a,target_x,target_y\n", {}, "expected a header and at least one row"),
        ("a,target_x,target_y\n1,high,low\n", {}, r"the columns \['target_x', 'target_y'\] hold text"),
        ("a,target_x,target_y\n1,0.5,0.5\n", {"features": ("b",)}, r"no columns \['b'\]"),
        ("a,target_x,target_y,split\n1,0.5,0.5,train\n2,0.5,0.5,test\n", {}, "the split 'val' is empty"),
        ("target_x,target_y\n0.5,0.5\n0.4,0.6\n", {}, "no feature column is left"),
        ("a,target_x,target_y\n1,0.5,0.5\n", {}, "1 samples cannot be split"),
    ],
)
def test_mistakes_in_a_users_file(tmp_path, text, options, message):
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        lib.table(root=path, **options)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no such file: .*gone.csv"):
        lib.table(root=tmp_path / "gone.csv")


def test_images_with_a_hierarchy_share_half_with_their_siblings(monkeypatch):
    from protojax.data import registry
    from protojax.data.synthetic import open_synthetic

    monkeypatch.setattr(
        lib, "open_records", lambda name, split, root=None: open_synthetic(split, size=40, classes=4, side=4)
    )
    assert registry.SPLITS["embedded"] == ("train", "test")
    splits = lib.sibling_images()
    assert splits["train"].size + splits["val"].size == 40
    np.testing.assert_allclose(np.sort(splits["test"].targets[0])[::-1], [0.5, 0.5, 0.0, 0.0])
    assert splits["test"].images.shape == (40, 4, 4, 3)


def test_columns_that_only_tell_groups_apart_go_where_groups_are_new_and_few(caplog):
    groups = np.repeat([4, 7, 9], 20)
    raw = {"own": np.arange(60.0), "a": (groups * 2.0), "b": (groups == 7) * 1.0, "c": np.sqrt(groups)}
    assert fit_preparation(raw).names == ("own", "a", "b", "c")
    assert fit_preparation({k: raw[k] for k in ("own", "a", "b")}, groups=groups).names == ("own", "a", "b")
    found = fit_preparation(raw, groups=groups)
    assert found.names == ("own",)
    assert set(found.dropped.values()) == {"one of 3 constant within each of 3 training groups"}
    assert "a, b, c (one of 3 constant within each of 3 training groups)" in caplog.text
    assert fit_preparation(raw, groups=np.zeros(60)).names == ("own", "a", "b", "c")
    assert fit_preparation({k: raw[k] for k in "abc"}, groups=groups).names == ("a", "b", "c")
    assert "on a new group predictions are a guess" in caplog.text

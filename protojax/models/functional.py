"""A Flax NNX module as two pure functions over plain nested dicts.

NNX defines layers and nothing else here: no NNX object, state type or transform is seen by the training step, the
optimiser or a checkpoint. `apply` rebuilds the module from its (static, cached) graph definition while JAX traces;
a compiled step holds no trace of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from protojax.api import Key, PyTree


class Functional(NamedTuple):
    """A network as pure functions.

    init(key) -> {'params': tree, 'stats': tree}: nested dicts of arrays with string keys; `params` holds the
        module's `nnx.Param`s, `stats` its `nnx.BatchStat`s ({} when it has none).
    apply(variables, *inputs, train=False, key=None) -> (outputs, stats): the module's outputs, and the statistics
        after the call (train=False: the very tree that was given).
    """

    init: Callable[[Key], PyTree]
    apply: Callable[..., tuple[Any, PyTree]]


def functional(factory: Callable[..., nnx.Module], *arguments: Any, **options: Any) -> Functional:
    """Turns `factory(*arguments, rngs=nnx.Rngs, **options) -> module` into `init` and `apply`.

    The module is called as `module(*inputs, train=bool, key=key)`. `key` is None or the key of everything random in
    the forward pass (dropout, drop path); modules must keep no random state of their own and store every array as
    `nnx.Param` or `nnx.BatchStat`.

    Raises (from `apply`): ValueError when `variables` lacks 'params' or 'stats', or its names or shapes are not
    those of this network.
    """

    def build(key: Key) -> Any:
        return nnx.split(factory(*arguments, rngs=nnx.Rngs(key), **options), nnx.Param, nnx.BatchStat)

    @functools.cache
    def structure() -> tuple[Any, dict[str, Any]]:
        graph, params, stats = jax.eval_shape(build, jax.eval_shape(lambda: jax.random.key(0)))
        return graph, {"params": nnx.to_pure_dict(params), "stats": nnx.to_pure_dict(stats)}

    def init(key: Key) -> PyTree:
        _, params, stats = build(key)
        return {"params": nnx.to_pure_dict(params), "stats": nnx.to_pure_dict(stats)}

    def apply(variables: PyTree, *inputs: Any, train: bool = False, key: Key | None = None) -> tuple[Any, PyTree]:
        graph, shapes = structure()
        _check_variables(variables, shapes)
        module = nnx.merge(graph, variables["params"], variables["stats"])
        outputs = module(*inputs, train=train, key=key)
        if not train:
            return outputs, variables["stats"]
        return outputs, nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))

    return Functional(init, apply)


def _check_variables(variables: PyTree, shapes: dict[str, Any]) -> None:
    """Raises ValueError where `variables` is not a tree of this network (names, then shapes)."""
    if not (isinstance(variables, dict) and {"params", "stats"} <= set(variables)):
        what = sorted(variables) if isinstance(variables, dict) else type(variables).__name__
        raise ValueError(f"variables must be a dict with 'params' and 'stats', as `init` returns it; given: {what}")
    expected, given = _named_shapes(shapes), _named_shapes({name: variables[name] for name in ("params", "stats")})
    if expected == given:
        return
    missing = sorted(set(expected) - set(given))
    unknown = sorted(set(given) - set(expected))
    wrong = [name for name in expected if name in given and expected[name] != given[name]]
    problems = []
    if missing:
        problems.append(f"missing {len(missing)}: {', '.join(missing[:4])}")
    if unknown:
        problems.append(f"unknown {len(unknown)}: {', '.join(unknown[:4])}")
    problems += [f"{name} has shape {given[name]}, expected {expected[name]}" for name in wrong[:4]]
    raise ValueError(
        "variables do not fit this network (another backbone, head, width or image size?): " + "; ".join(problems)
    )


def _named_shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape) for path, leaf in leaves}

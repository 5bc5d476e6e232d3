"""Materialised twins: every N x K array spelled out, the definitions that the streamed operations must equal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def logits(queries, prototypes, bias):
    return queries @ prototypes.T + bias[None, :]


def lse(queries, prototypes, bias):
    return jax.nn.logsumexp(logits(queries, prototypes, bias), axis=1)


def attend(queries, prototypes, bias):
    table = logits(queries, prototypes, bias)
    return jax.nn.logsumexp(table, axis=1), jax.nn.softmax(table, axis=1) @ prototypes


def soft_cross_entropy(*sides):
    target = jax.lax.stop_gradient(jax.nn.softmax(logits(*sides[3:]), axis=1))
    return -jnp.sum(target * jax.nn.log_softmax(logits(*sides[:3]), axis=1), axis=1)


def moments(queries, prototypes, bias, features, weight):
    """(n, m1, m2 [K,D]) by definition."""
    share = jax.nn.softmax(logits(queries, prototypes, bias), axis=1) * weight[:, None]
    return share.sum(axis=0), share.T @ features, share.T @ features**2


def _softmax(table):
    table = np.exp(table - table.max(axis=-1, keepdims=True))
    return table / table.sum(axis=-1, keepdims=True)


def carp(student, teacher, prediction, target, rows, permutation, block, temperatures, eps):
    """Section 5 of the specification with loops, in NumPy float64; `rows` are the indices that count."""
    terms, regularisers = [], []
    for start in range(0, len(permutation), block):
        columns = permutation[start : start + block]
        p = [_softmax((v @ prediction[0][columns].T + prediction[1][columns]) / temperatures[0]) for v in student]
        q = [_softmax((v @ target[0][columns].T + target[1][columns]) / temperatures[1]) for v in teacher]
        for i in range(len(p)):
            for j in range(len(q)):
                if i != j:
                    terms += [-np.log(np.clip(p[i][b] @ q[j][b], eps, 1 - eps)) for b in rows]
        usage = np.mean([view[b] for view in p + q for b in rows], axis=0)
        regularisers.append(np.log(block) + np.sum(usage * np.log(np.clip(usage, eps, 1 - eps))))
    return np.mean(terms), np.mean(regularisers)

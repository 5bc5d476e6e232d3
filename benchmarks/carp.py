"""CARP's block losses with regulariser and gradient, 2 + 6 views, against straight ports of the formula.

python benchmarks/carp.py [--full]
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from benchmarks import common
from protojax.ops.block import block_consistency

EPS = 1.1920929e-07


def streamed(block):
    def losses(student, teacher, prototypes, order):
        book = (prototypes, jnp.zeros(prototypes.shape[:1], jnp.float32))
        mask = jnp.ones(student.shape[1:2], bool)

        def loss(student):
            options = {"block": block, "matmul_dtype": common.policy()}
            return sum(block_consistency(student, teacher, book, book, mask, order, **options))

        return jax.value_and_grad(loss)(student)

    return losses


def port(block):
    """All probabilities of all views kept, as the formula reads."""

    def losses(student, teacher, prototypes, order):
        def chances(views):
            logits = jnp.einsum("vbd,kd->vbk", views, prototypes[order])
            return jax.nn.softmax(logits.reshape(*logits.shape[:2], -1, block), axis=-1)

        def loss(student):
            p, q = chances(student), jax.lax.stop_gradient(chances(teacher))
            pairs = [(i, j) for i in range(p.shape[0]) for j in range(q.shape[0]) if i != j]
            terms = [-jnp.mean(jnp.log(jnp.clip(jnp.sum(p[i] * q[j], -1), EPS, 1 - EPS))) for i, j in pairs]
            usage = jnp.mean(jnp.concatenate([p, q]), axis=(0, 1))
            spread = math.log(block) + jnp.mean(jnp.sum(usage * jnp.log(jnp.clip(usage, EPS, 1 - EPS)), axis=-1))
            return sum(terms) / len(pairs) + spread

        return jax.value_and_grad(loss)(student)

    return losses


def torch_port(torch, block):
    def losses(student, teacher, prototypes, order):
        student = student.detach().requires_grad_(True)

        def chances(views):
            logits = views @ prototypes[order.long()].T
            return torch.softmax(logits.reshape(*logits.shape[:2], -1, block), dim=-1)

        p, q = chances(student), chances(teacher).detach()
        pairs = [(i, j) for i in range(p.shape[0]) for j in range(q.shape[0]) if i != j]
        terms = [-(p[i] * q[j]).sum(-1).clamp(EPS, 1 - EPS).log().mean() for i, j in pairs]
        usage = torch.cat([p, q]).mean((0, 1))
        loss = sum(terms) / len(pairs) + math.log(block) + (usage * usage.clamp(EPS, 1 - EPS).log()).sum(-1).mean()
        loss.backward()
        return loss.detach(), student.grad

    return losses


def main() -> None:
    options = common.parser(__doc__).parse_args()
    report = common.Report("carp", options)
    sizes = [(64, 8192, 128, 512)]
    if options.full:
        sizes = [(512, 65_536, 256, 512), (512, 262_144, 256, 512)]
    if options.tiny:
        sizes = [(16, 512, 16, 128)]
    torch = common.torch_or_none(options)
    for images, count, width, block in sizes:
        for kind, scale in {"random": 1.0, "peaked": 30.0}.items():
            buffers = []
            for i in range(2):
                student = scale * common.unit_rows(i, 8 * images, width).reshape(8, images, width)
                teacher = scale * common.unit_rows(10 + i, 2 * images, width).reshape(2, images, width)
                order = jax.random.permutation(jax.random.key(i), count)
                buffers.append((student, teacher, common.unit_rows(20 + i, count, width), order))
            tolerance = 1e-4 if common.policy() is None else 5e-2
            small = (buffers[0][0][:, :16], buffers[0][1][:, :16], buffers[0][2], buffers[0][3])
            error = common.check("block losses", jax.jit(streamed(block))(*small), port(block), small, tolerance)
            contenders = [
                common.contender("streamed", streamed(block), buffers),
                common.contender("XLA materialised", port(block), buffers),
            ]
            if torch is not None:
                contenders.append(common.torch_contender(torch, "PyTorch compiled", torch_port(torch, block), buffers))
            columns = {"B": images, "views": "8+2", "K": count, "D": width, "block": block, "inputs": kind}
            work = 2.0 * images * count * width * (10 + 10 + 8)
            report.compare("loss + gradient", contenders, flops=work, error=error, **columns)
    report.table()


if __name__ == "__main__":
    main()

"""Streamed log-sum-exp, and soft cross-entropy in attention form with its gradient, against materialised logits.

python benchmarks/lse.py            # a minute on a CPU
python benchmarks/lse.py --full     # the sizes of docs/results, on an accelerator
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks import common
from protojax.ops.lse import attend, lse, soft_cross_entropy


def table(queries, prototypes):
    return queries @ prototypes.T


def materialised_lse(queries, prototypes):
    return jax.nn.logsumexp(table(queries, prototypes), axis=1)


def materialised_loss(student, teacher, prototypes):
    def loss(rows):
        target = jax.lax.stop_gradient(jax.nn.softmax(table(teacher, prototypes), axis=1))
        return -jnp.mean(jnp.sum(target * jax.nn.log_softmax(table(rows, prototypes), axis=1), axis=1))

    return jax.value_and_grad(loss)(student)


def streamed_lse(queries, prototypes):
    return lse(queries, prototypes, jnp.zeros(prototypes.shape[:1], jnp.float32), matmul_dtype=common.policy())


def streamed_loss(student, teacher, prototypes):
    bias = jnp.zeros(prototypes.shape[:1], jnp.float32)

    def loss(rows):
        options = {"matmul_dtype": common.policy()}
        return jnp.mean(soft_cross_entropy(rows, prototypes, bias, teacher, prototypes, bias, **options))

    return jax.value_and_grad(loss)(student)


def streamed_attention(queries, prototypes):
    return attend(queries, prototypes, jnp.zeros(prototypes.shape[:1], jnp.float32), matmul_dtype=common.policy())[1]


def materialised_attention(queries, prototypes):
    return jax.nn.softmax(table(queries, prototypes), axis=1) @ prototypes


def cudnn_attention(queries, prototypes):
    """Only the output: cuDNN's log-sum-exp comes back in bfloat16 and its cotangent is dropped."""
    q, m = (a.astype(jnp.bfloat16)[None, :, None, :] for a in (queries, prototypes))
    return jax.nn.dot_product_attention(q, m, m, scale=1.0, implementation="cudnn")


def torch_loss(torch):
    def run(student, teacher, prototypes):
        student = student.detach().requires_grad_(True)
        target = torch.softmax(teacher @ prototypes.T, dim=1)
        loss = -(target * torch.log_softmax(student @ prototypes.T, dim=1)).sum(1).mean()
        loss.backward()
        return loss.detach(), student.grad

    return run


def main() -> None:
    options = common.parser(__doc__).parse_args()
    report = common.Report("lse", options)
    sizes = [(1024, 16_384, 128)]
    if options.full:
        sizes = [(4096, 65_536, 256), (4096, 262_144, 256), (16_384, 262_144, 256)]
    if options.tiny:
        sizes = [(128, 1024, 16)]
    torch = common.torch_or_none(options)
    tolerance = 2e-5 if common.policy() is None else 2e-2
    for rows, count, width in sizes:
        path = common.require_kernel(report, rows, count, width)
        for kind, temperature in common.temperatures().items():
            buffers = [
                (
                    common.unit_rows(i, rows, width) / temperature,
                    common.unit_rows(10 + i, rows, width) / temperature,
                    common.unit_rows(20 + i, count, width),
                )
                for i in range(2)
            ]
            small = (buffers[0][0][:256], buffers[0][1][:256], buffers[0][2][:8192])
            error = common.check("lse", streamed_lse(*small[::2]), materialised_lse, small[::2], tolerance)
            wrong = common.check("loss", streamed_loss(*small), materialised_loss, small, tolerance)
            columns = {"N": rows, "K": count, "D": width, "inputs": kind, "path": path}
            work = 2.0 * rows * count * width
            contenders = [
                common.contender("streamed", streamed_lse, [b[::2] for b in buffers]),
                common.contender("XLA materialised", materialised_lse, [b[::2] for b in buffers]),
            ]
            report.compare("lse", contenders, flops=work, error=error, **columns)
            contenders = [
                common.contender("streamed", streamed_attention, [b[::2] for b in buffers]),
                common.contender("XLA materialised", materialised_attention, [b[::2] for b in buffers]),
            ]
            if jax.default_backend() == "gpu":
                try:
                    contenders.append(common.contender("cuDNN attention", cudnn_attention, [b[::2] for b in buffers]))
                except Exception as error_of_cudnn:  # a head width that the installed cuDNN does not take
                    report.add(case="attention output", what="cuDNN attention", note=str(error_of_cudnn)[:200])
            found = streamed_attention(*small[::2])
            off = common.check("attention", found, materialised_attention, small[::2], tolerance)
            report.compare("attention output", contenders, flops=2 * work, error=off, **columns)
            contenders = [
                common.contender("streamed", streamed_loss, buffers),
                common.contender("XLA materialised", materialised_loss, buffers),
            ]
            if torch is not None:
                contenders.append(common.torch_contender(torch, "PyTorch compiled", torch_loss(torch), buffers))
            report.compare("loss + gradient", contenders, flops=4 * work, error=wrong, **columns)
    report.table()


if __name__ == "__main__":
    main()

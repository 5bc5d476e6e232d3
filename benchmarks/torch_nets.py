"""The networks, loss and step of `benchmarks.step` in PyTorch, for the comparison in the same run."""

from __future__ import annotations

import copy
from typing import Any

import jax

from benchmarks import common

VITS = {"vit_ti": (192, 12, 3), "vit_s": (384, 12, 6), "vit_b": (768, 12, 12)}
RESNETS = {"resnet18": ("basic", (2, 2, 2, 2)), "resnet50": ("bottleneck", (3, 4, 6, 3))}


def make_network(torch: Any, name: str, image: int, patch: int | None) -> Any:
    """Backbone and CARP head: [N,3,H,W] -> [N,256]."""
    nn = torch.nn
    body, width = _vit(torch, *VITS[name], image, patch or 16) if name in VITS else _resnet(torch, *RESNETS[name])
    layers = [nn.Linear(width, 2048, bias=False), nn.BatchNorm1d(2048), nn.GELU()]
    layers += [nn.Linear(2048, 2048, bias=False), nn.BatchNorm1d(2048), nn.GELU(), nn.Linear(2048, 256)]
    return nn.Sequential(body, *layers)


def _vit(torch: Any, width: int, depth: int, heads: int, image: int, patch: int) -> tuple[Any, int]:
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
            self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

        def forward(self, x: Any) -> Any:
            count, tokens, _ = x.shape
            q, k, v = self.qkv(self.norm1(x)).reshape(count, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
            seen = nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + self.project(seen.transpose(1, 2).reshape(count, tokens, width))
            return x + self.mlp(self.norm2(x))

    class ViT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, width, patch, patch)
            self.token = nn.Parameter(torch.zeros(1, 1, width))
            self.position = nn.Parameter(0.02 * torch.randn(1, (image // patch) ** 2 + 1, width))
            self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(depth))), nn.LayerNorm(width, eps=1e-6)

        def forward(self, images: Any) -> Any:
            x = self.patch(images).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
            position = self.position
            if x.shape[1] != position.shape[1]:  # local views
                side, want = int((position.shape[1] - 1) ** 0.5), int((x.shape[1] - 1) ** 0.5)
                grid = position[:, 1:].reshape(1, side, side, width).permute(0, 3, 1, 2)
                grid = nn.functional.interpolate(grid, (want, want), mode="bicubic").flatten(2).transpose(1, 2)
                position = torch.cat([position[:, :1], grid], 1)
            return self.norm(self.blocks(x + position))[:, 0]

    return ViT(), width


def _resnet(torch: Any, kind: str, depths: tuple[int, ...]) -> tuple[Any, int]:
    nn = torch.nn
    expansion = 1 if kind == "basic" else 4

    def conv(inputs: int, outputs: int, size: int, stride: int = 1) -> list[Any]:
        return [nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)]

    class Block(nn.Module):
        def __init__(self, inputs: int, width: int, stride: int) -> None:
            super().__init__()
            outputs = width * expansion
            if kind == "basic":
                parts = [*conv(inputs, width, 3, stride), nn.ReLU(), *conv(width, outputs, 3)]
            else:
                parts = [*conv(inputs, width, 1), nn.ReLU(), *conv(width, width, 3, stride), nn.ReLU()]
                parts += conv(width, outputs, 1)
            self.body = nn.Sequential(*parts)
            same = stride == 1 and inputs == outputs
            self.short = nn.Identity() if same else nn.Sequential(*conv(inputs, outputs, 1, stride))

        def forward(self, x: Any) -> Any:
            return torch.relu(self.body(x) + self.short(x))

    layers, inputs = [*conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)], 64
    for stage, depth in enumerate(depths):
        for i in range(depth):
            layers.append(Block(inputs, 64 * 2**stage, 2 if stage and i == 0 else 1))
            inputs = 64 * 2**stage * expansion
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), inputs


def torch_step(torch: Any, network: Any, size: dict[str, Any], block: int = 512) -> common.Contender:
    """Joint CARP in PyTorch: EMA teacher on two views, student on all, AdamW; forward passes and loss compiled."""
    gpu = torch.cuda.is_available() and jax.default_backend() != "cpu"
    device, block = "cuda" if gpu else "cpu", min(block, size["K"])
    layout = torch.channels_last
    student = network.to(device, memory_format=layout).train()
    teacher = copy.deepcopy(student).requires_grad_(False)
    prototypes = torch.nn.Parameter(torch.nn.functional.normalize(torch.randn(size["K"], 256, device=device)))
    optimiser = torch.optim.AdamW([*student.parameters(), prototypes], lr=1e-4, weight_decay=0.05, fused=gpu)
    count = 2 + size["local"]
    views = [
        torch.randn(size["batch"] * (2 if side == size["image"] else size["local"]), 3, side, side, device=device)
        .contiguous(memory_format=layout)
        for side in ((size["image"], 96) if size["local"] else (size["image"],))
    ]  # fmt: skip
    eps = 1.1920929e-07

    def chances(x: Any, order: Any) -> Any:
        logits = x.float() @ torch.nn.functional.normalize(prototypes)[order].T / 0.1
        return torch.softmax(logits.reshape(*logits.shape[:-1], -1, block), -1)

    def loss_of(s: Any, t: Any, order: Any) -> Any:
        p, q = chances(s, order), chances(t, order).detach()
        pairs = [(i, j) for i in range(count) for j in range(2) if i != j]
        terms = [-(p[i] * q[j]).sum(-1).clamp(eps, 1 - eps).log().mean() for i, j in pairs]
        usage = torch.cat([p, q]).mean((0, 1))
        return sum(terms) / len(pairs) + (usage * usage.clamp(eps, 1 - eps).log()).sum(-1).mean()

    run, look, score = (torch.compile(f) for f in (student, teacher, loss_of))

    def step() -> Any:
        order = torch.randperm(size["K"], device=device)
        with torch.autocast(device, torch.bfloat16, enabled=gpu):
            with torch.no_grad():
                target = look(views[0]).reshape(2, size["batch"], -1)
            made = torch.cat([run(v).reshape(-1, size["batch"], 256) for v in views])
            loss = score(made, target, order)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 0.01)
        return loss.detach()

    wait = (lambda _: torch.cuda.synchronize()) if gpu else (lambda _: None)
    return common.Contender("PyTorch compiled, joint, views given", step, [()], wait)

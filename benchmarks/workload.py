"""The networks and batches that the step's benchmarks and cost tests run on."""

from dataclasses import dataclass, replace

import torch

from alphaflow_cli.nn.blocks import PUBLISHED, Design
from alphaflow_cli.nn.dit import DiT
from alphaflow_cli.recipe.schema import Guidance, Loss
from alphaflow_cli.train.questions import ask
from alphaflow_cli.train.step import Objective, Rows


@dataclass(frozen=True)
class Size:
    """A DiT and the latents it sees."""

    dim: int
    depth: int
    heads: int
    patch: int = 2
    latent: int = 32
    qk_norm: bool = False
    gradient_checkpointing: bool = False
    mlp_ratio: float = 4.0
    design: Design = PUBLISHED

    @property
    def tokens(self) -> int:
        """The number of tokens of one row."""
        return (self.latent // self.patch) ** 2


SIZES = {
    "tiny": Size(64, 2, 4, latent=8),  # 16 tokens
    "small": Size(384, 6, 6, latent=16),  # 64 tokens: the one the gates run on
    "S/2@64": Size(384, 12, 6, latent=16),
    "long": Size(256, 8, 4, latent=32),  # 256 tokens
    "B/2": Size(768, 12, 12),
    "L/2": Size(1024, 24, 16),
    "XL/2": Size(1152, 28, 16),
}
CLASSES = 10
GUIDED = Guidance(omega=1.0, kappa=0.5, label_dropout=0.1)


def build(size: Size, *, seed: int, device: str, dtype: torch.dtype) -> DiT:
    """A network with every weight random, those that start at zero too: zeros would hide work and mistakes."""
    torch.manual_seed(seed)
    net = DiT(
        latent_size=size.latent,
        channels=4,
        patch=size.patch,
        dim=size.dim,
        depth=size.depth,
        heads=size.heads,
        mlp_ratio=size.mlp_ratio,
        label_rows=CLASSES + 1,
        qk_norm=size.qk_norm,
        second_time="t-r",
        gradient_checkpointing=size.gradient_checkpointing,
        design=size.design,
    )
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    return net.to(device, dtype)


def draw(size: Size, batch: int, share: float, *, seed: int, device: str, dtype: torch.dtype) -> Rows:
    """A batch: r = t on the first int(batch · share) rows."""
    generator = torch.Generator().manual_seed(seed)
    n_equal = int(batch * share)
    shape = (batch, 4, size.latent, size.latent)
    x, noise = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    both = torch.sigmoid(torch.randn(2, batch, generator=generator, dtype=torch.float64) - 0.4)
    t, r = both.amax(0), both.amin(0)
    r[:n_equal] = t[:n_equal]
    y = torch.randint(CLASSES, (batch,), generator=generator)
    uniforms = torch.rand(batch, generator=generator, dtype=torch.float64)
    x, noise, t, r, uniforms = (value.to(device, dtype) for value in (x, noise, t, r, uniforms))
    return Rows(x=x, noise=noise, t=t, r=r, y=y.to(device), uniforms=uniforms, n_equal=n_equal)


def asking(rows: Rows, settings: Objective) -> Rows:
    """The same rows, with guidance asking only about those that need it, as the trainer does."""
    if not settings.is_guided:
        return rows
    return replace(
        rows, question=ask(rows.t.cpu(), rows.uniforms.cpu(), rows.n_equal, settings.guidance, rows.t.device)
    )


def objective(*, guided: bool, bf16: bool) -> Objective:
    """As published, with or without guidance."""
    return Objective(loss=Loss(), guidance=GUIDED if guided else Guidance(), y_null=CLASSES, has_labels=True, bf16=bf16)


def flow_matching(rows: Rows) -> Rows:
    """Give the same rows, all with r = t: the unit in which costs are given."""
    return replace(rows, r=rows.t, n_equal=len(rows.t))

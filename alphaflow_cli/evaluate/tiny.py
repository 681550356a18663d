"""The features of FD-tiny: 192 numbers of a picture from fixed arithmetic, no weights, no randomness, no download.

A picture of 32 px in [−1, 1] is turned into luma and two chroma channels and split four times by the orthonormal
Haar transform. Of every level, band and colour: ½·log(mean e² + floor²), e the coefficients; 4·3·3 = 36 over the whole
picture, and 3·3·3·4 = 108 over its quarters for levels 1–3. With a 4×4 colour thumbnail (48) that is 192. The noise
floor of 8/255 keeps invisible noise from dominating. Degraded pictures are ordered as people would; the collapse of
classes is seen only weakly. It is never called FID.
"""

import torch
from torch import Tensor, nn

from alphaflow_cli.errors import AlphaflowError
from alphaflow_cli.evaluate.features import Extractor

SIDE = 32  # larger pictures are reduced to it
SMALLEST = 16  # four halvings leave one coefficient
LEVELS = 4
QUARTERED = 3  # levels whose energies are also taken over the four quarters
THUMBNAIL = 4
FLOOR = 8 / 127.5  # eight grey levels of 255, in units of [−1, 1]
LUMA_CHROMA = (  # ITU-R BT.601, as in JPEG
    (0.299, 0.587, 0.114),
    (-0.168736, -0.331264, 0.5),
    (0.5, -0.418688, -0.081312),
)


class Tiny(Extractor):
    """The features of FD-tiny, `fd_haar192` in a protocol."""

    id = "fd_haar192"
    dim = 192
    weights_sha256 = ""
    preprocessing = "larger than 32 px: antialiased bilinear to 32 px; (x/127.5 − 1); BT.601 luma and chroma"
    known = True
    matrix: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.tensor(LUMA_CHROMA))

    def features(self, images: Tensor) -> Tensor:
        """The log energies of all bands, then the thumbnail: (N, 192)."""
        colours = _mix(_resize(images) / 127.5 - 1, self.matrix)
        parts, low = [], colours
        for level in range(LEVELS):
            low, bands = _haar(low)
            energy = bands.square()  # (N, 9, h, h)
            parts.append(_log_mean(energy, 1))
            if level < QUARTERED:
                parts.append(_log_mean(energy, 2))
        parts.append(_block_means(colours, THUMBNAIL).flatten(1))
        return torch.cat(parts, dim=1)


def _resize(images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    if min(height, width) < SMALLEST:
        raise AlphaflowError(f"pictures of {height}×{width} px: FD-tiny looks at four octaves and needs {SMALLEST} px")
    if (height, width) in ((SIDE, SIDE), (SMALLEST, SMALLEST)):
        return images.float()
    return nn.functional.interpolate(images.float(), (SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False)


def _mix(pixels: Tensor, matrix: Tensor) -> Tensor:
    """Three weighted sums, written out: a matrix product may change its rounding with the batch."""
    red, green, blue = pixels.unbind(1)
    return torch.stack([row[0] * red + row[1] * green + row[2] * blue for row in matrix], dim=1)


def _haar(low: Tensor) -> tuple[Tensor, Tensor]:
    """One level: the halved picture (N, 3, h, h) and its three bands (N, 9, h, h)."""
    a, b = low[..., ::2, ::2], low[..., ::2, 1::2]
    c, d = low[..., 1::2, ::2], low[..., 1::2, 1::2]
    bands = torch.cat([a - b + c - d, a + b - c - d, a - b - c + d], dim=1)
    return (a + b + c + d) / 2, bands / 2


def _log_mean(energy: Tensor, cells: int) -> Tensor:
    return (_block_means(energy, cells) + FLOOR**2).log().flatten(1) / 2


def _block_means(values: Tensor, cells: int) -> Tensor:
    side = values.shape[-1] // cells
    return values.reshape(*values.shape[:2], cells, side, cells, side).mean(dim=(3, 5))

"""A fully connected CRF that asks a grid of pixels instead of all: torch alone, in time linear in the pixels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_SMALLEST = 1e-4  # probability of a score that is not 0
_CHUNK = 1 << 16  # pixels whose kernels are in memory together


@torch.no_grad()
def grid_crf(
    scores: Tensor,
    image: Tensor,
    iterations: int = 5,
    sxy: float = 80.0,
    srgb: float = 8.0,
    compat: float = 4.0,
    grid: int = 16,
) -> Tensor:
    """Mean field of a fully connected CRF (Krähenbühl & Koltun, NeurIPS 2011) with its appearance kernel alone.

    The message to a pixel is the kernel-weighted mean of the probabilities at the pixels of a regular grid, so that a
    pixel hears of all places of the image that look like it, however far. Differences to the published model: the grid
    stands for all pixels, the weights are divided by their sum, colours are means over 3x3 pixels (against noise), and
    there is no smoothness kernel.

    Args:
        scores: (K, H, W), not negative; their shares at a pixel are the unary probabilities.
        image: (3, H, W) colours of 0..255.
        iterations: number of times the probabilities of the grid change.
        sxy: width of the kernel in pixels.
        srgb: width of the kernel in colours of 0..255.
        compat: weight of the message.
        grid: pixels of the grid along the longer side.

    Returns:
        (K, H, W) float32, summing to 1 over K; 0 for channels that are 0 everywhere, and equal where all are.
    """
    height, width = scores.shape[-2:]
    present = scores.flatten(1).amax(dim=1) > 0
    if not present.any():
        return torch.full_like(scores, 1 / len(scores), dtype=torch.float32)
    shares = scores[present].float().clamp(min=_SMALLEST)
    unary = (shares / shares.sum(dim=0)).log().flatten(1).T  # (H * W, K)

    colours = F.avg_pool2d(image[None].float(), 3, stride=1, padding=1, count_include_pad=False)[0]
    rows, columns = (torch.arange(side, device=image.device, dtype=torch.float32) for side in (height, width))
    place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))
    pixels = torch.cat([place / sxy, colours / srgb]).flatten(1).T  # (H * W, 5)

    spacing = max(height, width) / grid
    down, right = (((torch.arange(max(1, round(side / spacing))) + 0.5) * spacing).long() for side in (height, width))
    chosen = (down.clamp(max=height - 1)[:, None] * width + right.clamp(max=width - 1)).flatten().to(image.device)
    keys = pixels[chosen]

    between = _kernel(keys, keys)
    beliefs = unary[chosen].softmax(dim=1)
    for _ in range(iterations):
        beliefs = (unary[chosen] + compat * between @ beliefs).softmax(dim=1)
    refined = torch.cat(
        [
            (own + compat * _kernel(some, keys) @ beliefs).softmax(dim=1)
            for some, own in zip(pixels.split(_CHUNK), unary.split(_CHUNK), strict=True)
        ]
    )
    result = torch.zeros(scores.shape, device=scores.device)
    result[present] = refined.T.reshape(-1, height, width)
    return result


def _kernel(pixels: Tensor, keys: Tensor) -> Tensor:
    """(N, 5) and (M, 5) → (N, M) Gaussian weights of the keys, summing to 1 over M."""
    return torch.cdist(pixels, keys).square().mul(-0.5).softmax(dim=1)

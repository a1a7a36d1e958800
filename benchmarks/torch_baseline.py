"""The training step of CRA-CNN in PyTorch, for comparison.

It implements the equations as `cra_jax` does, with the guard and the normalization of
the head, so that both sides do the same work. It uses `channels_last`, and bfloat16
autocast on a GPU.
"""

import math

import torch
from torch import nn
from torch.nn import functional

from tests.oracles.torch_resnet import TorchResNet

_EXPECTATION = (0.0, 0.0, 0.5, 0.0)
_THRESHOLD = (0.4, 0.4, 0.4, math.pi)
_MARGIN = 0.7


class CRACNN(nn.Module):
    """Both streams and the ART module, or only the first stream for the baseline."""

    def __init__(self, arch: str, num_classes: int, *, art_px: int, baseline: bool):
        super().__init__()
        self.classification = TorchResNet(arch, num_classes)
        self.baseline, self.art_px = baseline, art_px
        if not baseline:
            self.regularization = TorchResNet(arch, num_classes)
            self.head = nn.Linear(self.classification.fc.in_features, 4)
            nn.init.normal_(self.head.weight, std=1e-3)
            with torch.no_grad():
                self.head.bias.copy_(torch.tensor([0, 0, math.atanh(0.9), 0]))

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Loss of Eq. 9 for ``[b, 3, h, w]`` normalized images."""
        stages = self.classification.stages(images)
        loss = functional.cross_entropy(stages["logits"], labels)
        if self.baseline:
            return loss
        pooled = functional.normalize(stages["pooled"].float(), dim=1)
        # In bfloat16, coordinates at 448 px have errors of a pixel.
        with torch.autocast(images.device.type, enabled=False):
            gamma = self.head(pooled)
            angle_rad, scale = gamma[:, 3:], 0.5 * torch.tanh(gamma[:, 2:3])
            reach = scale.abs() * (angle_rad.cos().abs() + angle_rad.sin().abs())
            place = (1 - reach) * torch.tanh(gamma[:, :2])  # inside the image
            gamma_res = torch.cat([place, scale, angle_rad], 1)
            attention, redundancy = self._sample(images.float(), gamma_res)
        inputs = torch.cat([attention, redundancy])
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        scores = self.regularization(inputs).float()
        attended, redundant = scores.chunk(2)
        loss = loss + functional.cross_entropy(attended, labels)
        distance = gamma_res - gamma_res.new_tensor(_EXPECTATION)
        outside = distance.abs() > distance.new_tensor(_THRESHOLD)
        loss = loss + _norm(distance * outside).mean()
        attended = functional.normalize(attended)
        redundant = functional.normalize(redundant)
        between = _norm(redundant[::2] - redundant[1::2])
        hinges = (
            between - _norm(redundant[i::2] - attended[i::2]) + _MARGIN
            for i in range(2)
        )
        return loss + sum(torch.relu(hinge).mean() for hinge in hinges)

    def _sample(self, images: torch.Tensor, gamma_res: torch.Tensor):
        """Samples attention (Eq. 4) and redundancy (Eq. 5)."""
        x, y, scale, angle = gamma_res.unbind(1)
        cos, sin = scale * angle.cos(), scale * angle.sin()
        rows = [torch.stack([cos, -sin, x], 1), torch.stack([sin, cos, y], 1)]
        size = [len(images), 3, self.art_px, self.art_px]
        grid = functional.affine_grid(torch.stack(rows, 1), size, align_corners=True)
        attention = functional.grid_sample(images, grid, align_corners=True)
        with torch.no_grad():
            same = torch.eye(2, 3, device=images.device).expand(len(images), 2, 3)
            whole = functional.affine_grid(same, size, align_corners=True)
            right = whole[..., 0] - x[:, None, None]
            down = whole[..., 1] - y[:, None, None]
            turn = angle[:, None, None]
            u = turn.cos() * right + turn.sin() * down
            v = turn.cos() * down - turn.sin() * right
            reach = scale.abs()[:, None, None]
            covered = (u.abs() <= reach) & (v.abs() <= reach)
            grid = torch.where(covered[..., None], whole.new_tensor(-5.0), whole)
            redundancy = functional.grid_sample(images, grid, align_corners=True)
        return attention, redundancy


def _norm(x: torch.Tensor) -> torch.Tensor:
    """Norm of rows, with gradient 0 at 0."""
    squared = x.square().sum(1)
    return torch.where(squared > 0, squared.clamp(min=1e-30).sqrt(), 0)


def make_step(
    arch: str,
    num_classes: int,
    *,
    art_px: int,
    baseline: bool,
    device: str,
    bfloat16: bool,
    compiled: bool,
):
    """Returns a function that does one update with momentum SGD.

    Its arguments are uint8 images ``[b, h, w, 3]`` and labels ``[b]``; it returns the
    loss.
    """
    network = CRACNN(arch, num_classes, art_px=art_px, baseline=baseline)
    network = network.to(device).train()
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.SGD(
        network.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4
    )
    loss_of = torch.compile(network) if compiled else network
    mean = torch.tensor((0.485, 0.456, 0.406), device=device)
    std = torch.tensor((0.229, 0.224, 0.225), device=device)

    def step(images, labels):
        normalized = (images.to(device).float() / 255 - mean) / std
        normalized = normalized.permute(0, 3, 1, 2)  # keeps channels last
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            loss = loss_of(normalized, labels.to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step

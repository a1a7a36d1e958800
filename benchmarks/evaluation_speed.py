"""Measures the speed of both evaluation protocols, here and in PyTorch.

    python -m benchmarks.evaluation_speed    # a CPU: 224 px
    python -m benchmarks.evaluation_speed --crop_px 448 --images 256 --batch 64

"center" evaluates centre crops in batches. "full" evaluates whole images of different
sizes: here they are padded to buckets and batched; the PyTorch code evaluates them one
at a time. Both sides have the same weights and images, and the largest difference of
their scores is printed. "first pass" includes compilation.
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from benchmarks import timing
from configs.cub import get_config
from cra_jax.inference import run_options
from cra_jax.inference.evaluate import Evaluator
from cra_jax.input import splits
from tests.oracles.torch_resnet import TorchResNet, randomize, to_linen

PROTOCOLS = ("center", "full")
STRIDE_PX = 32  # of ResNet's last feature map


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compares the speed of evaluation with PyTorch."
    )
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--crop_px", type=int, default=224)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--bucket_px", type=int, default=64)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    peer = randomize(TorchResNet(options.backbone, options.classes), 0).eval()
    config = get_config(f"{options.backbone},baseline")
    config.data.crop_px = options.crop_px
    config.eval.batch_size = options.batch
    config.eval.bucket_px = options.bucket_px
    images = draw_images(options.images, short_side_px=options.crop_px * 8 // 7)
    ours = Ours(config, peer, images, options.classes)
    theirs = Theirs(config, peer, images)
    actions, first, scores = {}, {}, {}
    for protocol in PROTOCOLS:
        for side, run in (("here", ours), ("PyTorch", theirs)):
            name = f"{protocol}, {side}"
            actions[name] = lambda run=run, protocol=protocol: run(protocol)
            start = time.perf_counter()
            scores[name] = actions[name]()
            first[name] = time.perf_counter() - start
    times = timing.measure_alternately(actions, repeats=options.repeats)
    print(timing.machine())
    print(
        f"{options.backbone}, {options.images} images, centre crops of "
        f"{options.crop_px} px, whole images up to {images_size(images)}, batches of "
        f"{options.batch}, buckets of {options.bucket_px} px"
    )
    rows = []
    for name, taken in times.items():
        protocol = name.partition(",")[0]
        between = timing.ratio(times[f"{protocol}, PyTorch"], taken)
        rows.append(
            [
                name,
                timing.summary(taken, digits=0),
                f"{1000 * options.images / statistics.median(taken):.1f}",
                f"{between:.2f}",
                f"{first[name]:.1f}",
            ]
        )
    header = ["protocol", "ms per pass", "images/s", "speed relative to PyTorch"]
    print(timing.table([*header, "first pass, s"], rows))
    for protocol in PROTOCOLS:
        mine, other = scores[f"{protocol}, here"], scores[f"{protocol}, PyTorch"]
        error = np.abs(mine - other).max() / np.abs(other).max()
        print(f"{protocol}: relative difference of the scores {error:.1e}")


def draw_images(count: int, *, short_side_px: int) -> list[np.ndarray]:
    """Draws images of noise with aspect ratios up to 3:2."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(count):
        sides = [short_side_px, round(short_side_px * rng.uniform(1, 1.5))]
        height, width = sides if rng.random() < 0.75 else sides[::-1]
        images.append(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return images


def images_size(images: list[np.ndarray]) -> str:
    """Largest height and width: "384 x 384"."""
    return " x ".join(str(max(p.shape[axis] for p in images)) for axis in (0, 1))


class Ours:
    """Computes logits as `--mode eval` does."""

    def __init__(self, config: Any, peer: TorchResNet, images, num_classes: int):
        options = run_options.from_config(config)
        backbone = options.create_backbone(num_classes)
        self._variables = to_linen(peer.state_dict().items())
        self._evaluator = Evaluator(backbone, options)
        labels = np.zeros(len(images), np.int32)
        self._split = splits.Split(images, labels, ())

    def __call__(self, protocol: str) -> np.ndarray:
        """Returns scores ``[n, k]`` of all images."""
        found = self._evaluator.predict(self._variables, self._split, protocol)
        return found.logits


class Theirs:
    """Computes the same in PyTorch, from the same uint8 images."""

    def __init__(self, config: Any, peer: TorchResNet, images: list[np.ndarray]):
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._network: Any = peer.to(self._device).to(  # pyright: ignore[reportCallIssue]
            memory_format=torch.channels_last
        )
        self._images = images
        self._crop_px, self._batch = config.data.crop_px, config.eval.batch_size
        self._mean = torch.tensor(config.data.mean, device=self._device)
        self._std = torch.tensor(config.data.std, device=self._device)

    @torch.inference_mode()
    def __call__(self, protocol: str) -> np.ndarray:
        """Returns scores ``[n, k]`` of all images."""
        run = self._center if protocol == "center" else self._full
        return torch.cat(run()).cpu().numpy()

    def _center(self) -> list[torch.Tensor]:
        crops = [self._crop(image) for image in self._images]
        return [
            self._network(self._normalize(np.stack(crops[i : i + self._batch])))
            for i in range(0, len(crops), self._batch)
        ]

    def _full(self) -> list[torch.Tensor]:
        window = -(-self._crop_px // STRIDE_PX)
        logits = []
        for image in self._images:
            features = self._network.stages(self._normalize(image[None]))["features"]
            pooled = functional.avg_pool2d(features, window, stride=1)
            scores = self._network.fc(pooled.permute(0, 2, 3, 1))
            logits.append(scores.mean((1, 2)))
        return logits

    def _crop(self, image: np.ndarray) -> np.ndarray:
        side = self._crop_px
        top, left = ((n - side) // 2 for n in image.shape[:2])
        return image[top : top + side, left : left + side]

    def _normalize(self, images: np.ndarray) -> torch.Tensor:
        on_device = torch.from_numpy(images).to(self._device)
        return ((on_device.float() / 255 - self._mean) / self._std).permute(0, 3, 1, 2)


if __name__ == "__main__":
    main()

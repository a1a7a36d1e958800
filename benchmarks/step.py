"""One training step, CRA-CNN's and the baseline's, here and in PyTorch, by turns.

    python -m benchmarks.step                                   # a CPU: 224 px, batch 4
    python -m benchmarks.step --crop_px 448 --batch 64          # a GPU

Everything from uint8 pictures on the host to the updated weights; both sides take the
same pictures, ResNet, losses and optimiser. On a GPU both compute in bfloat16.
"""

import argparse
import statistics

import jax
import numpy as np
import torch

from benchmarks import timing, torch_peer
from configs.cub import get_config
from cra_jax import experiment, parallel, steps

KINDS = ("baseline", "cra")


def main() -> None:
    parser = argparse.ArgumentParser(description="Training steps beside PyTorch's.")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--crop_px", type=int, default=224)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="torch.compile, too")
    options = parser.parse_args()
    images, labels = _pictures(options)
    actions, flops = {}, {}
    for kind in KINDS:
        actions[f"{kind}, here"], flops[kind] = _ours(kind, options, images, labels)
        for compiled in (False, True)[: 1 + options.compile]:
            name = f"{kind}, PyTorch" + ", compiled" * compiled
            actions[name] = _peer(kind, options, images, labels, compiled=compiled)
    times = timing.by_turns(actions, repeats=options.repeats)
    print(timing.machine())
    print(f"{options.backbone}, batch {options.batch}, {options.crop_px} px")
    rows = []
    for name, taken in times.items():
        kind = name.partition(",")[0]
        peer = times[f"{kind}, PyTorch"]
        baseline = times[name.replace(kind, "baseline", 1)]
        middle = statistics.median(taken)
        rows.append(
            [
                name,
                timing.summary(taken, digits=0),
                f"{1000 * options.batch / middle:.2f}",
                f"{timing.ratio(peer, taken):.2f}",
                f"{timing.ratio(taken, baseline):.2f}",
                f"{flops[kind] / middle / 1e6:.0f}" if "here" in name else "",
            ]
        )
    header = ["step", "ms", "images/s", "times PyTorch's speed"]
    print(timing.table([*header, "times baseline's time", "GFLOP/s"], rows))


def _pictures(options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (options.batch, options.crop_px, options.crop_px, 3)
    images = rng.integers(0, 256, shape, dtype=np.uint8)
    labels = rng.integers(0, options.classes, options.batch, dtype=np.int32)
    return images, labels


def _ours(kind: str, options: argparse.Namespace, images, labels):
    """The step that the training loop runs, and its FLOPs by XLA's count."""
    config = get_config(f"{options.backbone},{kind}")
    config.model.pretrained = ""
    config.data.crop_px = options.crop_px
    config.art.size_px = options.crop_px // 2
    config.train.batch_size = options.batch
    training = experiment.build_training(config, options.classes, steps_per_epoch=1000)
    state = steps.create_state(
        jax.random.key(0),
        training.network,
        training.optimizer,
        crop_px=options.crop_px,
    )
    batch = {"image": images, "label": labels, "flip": np.zeros(len(labels), bool)}
    shapes = jax.eval_shape(lambda: state)
    analysis = training.step.lower(shapes, parallel.split(batch)).compile()
    flops = (analysis.cost_analysis() or {}).get("flops", 0.0)
    held = [state]

    def action():
        held[0], terms = training.step(held[0], parallel.split(batch))
        jax.block_until_ready(terms)

    return action, flops


def _peer(kind: str, options: argparse.Namespace, images, labels, *, compiled: bool):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    step = torch_peer.make_step(
        options.backbone,
        options.classes,
        art_px=options.crop_px // 2,
        baseline=kind == "baseline",
        device=device,
        bfloat16=device == "cuda",
        compiled=compiled,
    )
    pictures, classes = torch.tensor(images), torch.tensor(labels, dtype=torch.int64)
    return lambda: step(pictures, classes).item()


if __name__ == "__main__":
    main()

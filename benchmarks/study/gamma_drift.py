"""Measures the gradients that Gamma receives and passes on to N_cls in a training.

    python -m benchmarks.study.gamma_drift --settings paper default
    python -m benchmarks.study.gamma_drift --table

Trains the study's network on drawn birds. At some steps, and on fixed test images, it
measures the gradient of each loss with respect to Gamma, whether the gradients of the
images agree, whether they move the attention towards the bird, and which gradient
reaches N_cls. Writes `docs/gamma.md`, its figure and its results. The results of
settings that are not named stay as they are.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from benchmarks import timing
from benchmarks.study.rows import BIRDS
from configs.quickstart import get_config
from cra_jax import geometry, losses, train_step
from cra_jax.art_module import CLASSIFICATION_STREAM, AttentionHead
from cra_jax.input import normalize, splits
from cra_jax.input.batches import TrainBatches, center_batches
from cra_jax.reports import figure_style
from cra_jax.runtime import devices, files
from cra_jax.training import build, check_config

_PAPER = {
    "art.normalize_head": False,
    "art.gradient_clip": 0.0,
    "art.inside": False,
    "art.guard": 0.0,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    "released": {**_PAPER, "art.gradient_clip": 1.0},
    "normalized": {**_PAPER, "art.normalize_head": True},
    "unguarded": {"art.guard": 0.0},
    "unclipped": {"art.gradient_clip": 0.0},
    "default": {},
    "soft": {"art.redundancy": "soft"},
}
_LINES = "study/gamma.jsonl"
_HEAD = """# Gradients into Gamma and into N_cls

N_cls sees whole images only, and Gamma is predicted from its pooled features. L_cls2,
L_cntr and L_res therefore change N_cls only through Gamma. This page gives the
gradients of these losses with respect to Gamma, and the gradient that reaches N_cls
through Gamma, compared with the gradient of L_cls1. Data and network are the drawn
birds and the ResNet of [the study](study.md), trained from scratch with seed {seed}.

`python -m benchmarks.study.gamma_drift` trains the networks and writes this page.

## Summary

The ratio is the norm of the gradient that reaches N_cls through Gamma, divided by the
norm of the gradient of L_cls1. The cosine is that between these two gradients. Both
are ranges over the measured steps after step 0. The other columns are of the last
measured step: the share of images whose Gamma is saturated, L_cls2, and L_cls2 with
the attention moved onto the bird.
"""
TERMS = ("cls2", "res", "cntr")
_PROBE_BATCHES = 3
_CLASSIFIER = CLASSIFICATION_STREAM

COLUMNS = {
    "offset": "mean length of (gamma1, gamma2) of Eq. 6 over the images",
    "centre sd": "standard deviation of gamma1 and gamma2 over the images",
    "saturated": "share of images beyond 95 % of the bound of gamma1 or gamma2",
    **{
        f"{term} {what}": meaning.format(term=term)
        for term in TERMS
        for what, meaning in (
            ("gradient", "mean norm of the gradient of L_{term} to an image's Gamma"),
            (
                "alignment",
                "norm of the mean of these gradients, divided by `{term} gradient`",
            ),
            (
                "towards bird",
                "mean cosine between the descent direction of L_{term} and the "
                "direction from the attention's centre to the bird's",
            ),
        )
    },
    "gain": "change of Gamma by a step of the head, divided by learning rate and "
    "gradient: 1 + |features|^2",
    "shared gain": "share of the gain that is the same for all images",
    "L_cls2": "value of L_cls2",
    "L_cls2 on bird": "value of L_cls2 with the attention moved onto the bird",
    "N_cls ratio": "norm of the gradient that reaches N_cls through Gamma, divided by "
    "the norm of the gradient of L_cls1",
    "N_cls cosine": "cosine between these two gradients",
}


class Probe:
    """Measures gradients of a network on fixed images.

    Gradients to Gamma are measured without the guard and the clipping, which are not
    losses. Gradients to N_cls are measured with both, as in training.

    Args:
      config: config of the run.
      num_classes: number of classes.
      split: split with boxes.

    Raises:
      ValueError: the split does not fill a batch.
    """

    def __init__(self, config: Any, num_classes: int, split: splits.Split):
        size, self._config = config.train.batch_size, config
        bare = config.copy_and_resolve_references()
        bare.update_from_flattened_dict({"art.guard": 0.0, "art.gradient_clip": 0.0})
        self._network = build.build_network(bare, num_classes)
        self._trained = build.build_network(config, num_classes)
        order = np.random.default_rng(0).permutation(len(split.labels))
        whole = min(_PROBE_BATCHES, len(order) // size) * size  # images
        if not whole:
            raise ValueError(
                f"{len(order)} test images do not fill one batch of {size}: lower "
                "train.batch_size or raise data.test_size"
            )
        sample = split.take(order[:whole].tolist())
        crop_px = config.data.crop_px
        batches = center_batches(
            sample.images, sample.labels, batch_size=size, crop_px=crop_px
        )
        boxes = np.array(
            [sample.boxes_px(crop_px)[i] for i in range(len(sample.labels))]
        )
        centres = (boxes[:, :2] + boxes[:, 2:]) / (crop_px - 1) - 1
        self._batches = [
            (
                normalize.normalize(
                    jnp.asarray(batch["image"]),
                    mean=config.data.mean,
                    std=config.data.std,
                ),
                jnp.asarray(batch["label"]),
                jnp.asarray(centres[i * size : (i + 1) * size], jnp.float32),
            )
            for i, batch in enumerate(batches[i] for i in range(len(batches)))
        ]
        self._gamma_scores = jax.jit(self._measure_gamma)
        self._classifier_scores = jax.jit(self._measure_classifier)

    def __call__(self, state: Any) -> dict[str, float]:
        """Returns `COLUMNS` of a state: means over the batches."""
        found = [
            self._gamma_scores(state.params, state.batch_stats, *batch)
            | self._classifier_scores(state.params, state.batch_stats, *batch[:2])
            for batch in self._batches
        ]
        return {name: float(np.mean([f[name] for f in found])) for name in COLUMNS}

    def _measure_gamma(self, params, batch_stats, images, labels, centres):
        seen: dict[str, Any] = {}

        def terms_of(shift):
            def interceptor(call, args, kwargs, context):
                out = call(*args, **kwargs)
                is_head = isinstance(context.module, AttentionHead)
                if not (is_head and context.method_name == "gamma"):
                    return out
                pooled = args[0]
                if self._config.art.normalize_head:
                    pooled = losses.l2_normalize(pooled)
                seen["features"] = pooled
                return out + shift

            recording: Any = _RecordGamma(self._network, seen)
            loss = build.build_loss(self._config, recording, steps_per_epoch=1)
            with nn.intercept_methods(interceptor):
                _, (_, terms) = loss(params, batch_stats, images, labels, 0)
            return (
                {name: terms[f"loss_{name}"] for name in TERMS},
                (seen["gamma"], seen["gamma_res"], seen["features"]),
            )

        no_shift = jnp.zeros((len(labels), 4))
        terms, backward, (gamma, gamma_res, features) = jax.vjp(
            terms_of, no_shift, has_aux=True
        )
        found: dict[str, Any] = {}
        direction = centres - gamma_res[:, :2]
        for name in TERMS:
            one = {other: jnp.asarray(float(other == name)) for other in TERMS}
            gradient = len(labels) * backward(one)[0]
            size = jnp.linalg.norm(gradient, axis=-1).mean()
            alignment = jnp.linalg.norm(gradient.mean(0)) / jnp.maximum(size, 1e-12)
            found[f"{name} gradient"] = size
            found[f"{name} alignment"] = alignment
            found[f"{name} towards bird"] = _cosine(-gradient[:, :2], direction)
        gain = 1 + jnp.square(features).sum(-1).mean()
        found["gain"] = gain
        found["shared gain"] = (1 + jnp.square(features.mean(0)).sum()) / gain
        found["offset"] = jnp.linalg.norm(gamma_res[:, :2], axis=-1).mean()
        found["centre sd"] = gamma_res[:, :2].std(0).mean()
        saturated = jnp.abs(jnp.tanh(gamma[:, :2])) > train_step.SATURATED
        found["saturated"] = saturated.any(-1).mean()
        found["L_cls2"] = terms["cls2"]
        shift = self._gamma_at(centres, gamma) - gamma
        found["L_cls2 on bird"] = terms_of(shift)[0]["cls2"]
        return found

    def _measure_classifier(self, params, batch_stats, images, labels):
        """Gradient that reaches N_cls through Gamma, compared with that of L_cls1."""
        loss = build.build_loss(self._config, self._trained, steps_per_epoch=1)

        def terms_of(classifier):
            changed = {**params, _CLASSIFIER: classifier}
            whole, (_, terms) = loss(changed, batch_stats, images, labels, 0)
            return terms["loss_cls1"], whole - terms["loss_cls1"]

        _, backward = jax.vjp(terms_of, params[_CLASSIFIER])
        own, through_gamma = (
            jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
            for tree in (backward((1.0, 0.0))[0], backward((0.0, 1.0))[0])
        )
        sizes = jnp.linalg.norm(through_gamma), jnp.linalg.norm(own)
        return {
            "N_cls ratio": sizes[0] / sizes[1],
            "N_cls cosine": _cosine(own[None], through_gamma[None]),
        }

    def _gamma_at(self, centres, gamma):
        """Gamma with its centre at the bird, and with the same scale and angle."""
        art = self._config.art
        bound = art.alpha_p
        if art.inside:
            scale = art.alpha_s * jnp.tanh(gamma[:, 2:3])
            bound = geometry.place_bound(scale, gamma[:, 3:], alpha_p=art.alpha_p)
        share = jnp.clip(centres / bound, -0.99, 0.99)
        return jnp.concatenate([jnp.arctanh(share), gamma[:, 2:]], -1)


class _RecordGamma:
    """A network that stores the Gamma that it predicts in `seen`."""

    def __init__(self, network: Any, seen: dict[str, Any]):
        self._network, self._seen = network, seen
        self.art = network.art

    def apply(self, *args, **kwargs):
        out, updated = self._network.apply(*args, **kwargs)
        self._seen |= {
            "gamma": out.attention.gamma,
            "gamma_res": out.attention.gamma_res,
        }
        return out, updated


def _cosine(a, b):
    """Mean cosine between rows; 0 for a row of zeros."""
    return (losses.l2_normalize(a) * losses.l2_normalize(b)).sum(-1).mean()


def train_and_measure(config: Any, at: list[int]) -> list[dict[str, float]]:
    """Trains a network and measures it before the steps `at`.

    Args:
      config: config of drawn birds.
      at: steps, in ascending order.

    Returns:
      ``step`` and `COLUMNS` of each.
    """
    check_config.check(config)
    dataset = build.load_dataset(config)
    split = build.open_split(config, dataset, "train")
    num_classes = len(dataset.class_names)
    probe = Probe(config, num_classes, build.open_split(config, dataset, "test"))
    batches = TrainBatches(
        split.images,
        split.labels,
        batch_size=config.train.batch_size,
        crop_px=config.data.crop_px,
        seed=config.seed,
        flip=config.data.flip,
    )
    training = build.build_training(
        config, num_classes, steps_per_epoch=batches.steps_per_epoch
    )
    state = train_step.create_state(
        jax.random.key(config.seed),
        training.network,
        training.optimizer,
        crop_px=config.data.crop_px,
    )
    found = []
    for step in range(at[-1] + 1):
        if step in at:
            found.append({"step": step, **probe(state)})
        batch = batches.batch(step)
        wanted = {k: batch[k] for k in ("image", "flip", "label")}
        state, _ = training.step(state, devices.split(wanted))
    return found


def draw(found: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Draws four of the columns over the steps, with a curve per setting."""
    shown = {
        "offset": "offset of the attention",
        "centre sd": "sd of its centre\nover images",
        "N_cls ratio": "gradient into N_cls,\ndivided by that of L_cls1",
        "cls2 towards bird": "cosine of L_cls2's descent\nand direction to the bird",
    }
    colours = (
        *(
            figure_style.VERMILLION,
            figure_style.ORANGE,
            figure_style.SKY,
            figure_style.BLUE,
        ),
        *(figure_style.GREEN, figure_style.PURPLE, figure_style.BLACK),
    )
    figure = Figure(figsize=(7.2, 2.1), layout="constrained")
    axes = figure.subplots(1, len(shown))
    for axis, (column, title) in zip(axes, shown.items(), strict=True):
        for i, (name, lines) in enumerate(found.items()):
            axis.plot(
                [x["step"] for x in lines],
                [x[column] for x in lines],
                label=name,
                color=colours[i % len(colours)],
                marker="osv^Dx+"[i % 7],
                markersize=2.5,
            )
        axis.set_title(title)
        axis.set_xlabel("step")
    axes[1].set_yscale("log")
    axes[2].set_yscale("log")
    axes[2].axhline(1, color=figure_style.GREY, linewidth=0.6)
    axes[3].axhline(0, color=figure_style.GREY, linewidth=0.6)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=7
    )
    return figure


def write(found: Mapping[str, Sequence[Mapping[str, Any]]], docs: Path) -> None:
    """Writes `gamma.jsonl`, and from it `gamma.md` and its figure.

    Args:
      found: lines by setting, in the order of `SETTINGS`.
      docs: directory of the documents.
    """
    (docs / "study").mkdir(parents=True, exist_ok=True)
    figure = figure_style.styled(draw)(found)
    figure.savefig(docs / "study" / "gamma.png", dpi=200, metadata={"Software": None})
    lines = [{"setting": k, **x} for k, some in found.items() for x in some]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    files.write_atomically(docs / _LINES, text)
    files.write_atomically(docs / "gamma.md", "\n".join(_page(found)) + "\n")


def _page(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterable[str]:
    seeds = sorted({line["seed"] for lines in found.values() for line in lines})
    yield _HEAD.format(seed=" and ".join(map(str, seeds)))
    rows = []
    for name, lines in found.items():
        changes = ", ".join(f"`{k}={v}`" for k, v in SETTINGS[name].items())
        trained = lines[1:]  # the gradient of an untrained head is near 0
        ratios, cosines = (
            [line[column] for line in trained]
            for column in ("N_cls ratio", "N_cls cosine")
        )
        last = lines[-1]
        rows.append(
            [
                *(name, changes or "none"),
                f"{min(ratios):.2g} to {max(ratios):.2g}",
                f"{min(cosines):.2f} to {max(cosines):.2f}",
                f"{100 * last['saturated']:.0f} %",
                *(f"{last['L_cls2']:.2f}", f"{last['L_cls2 on bird']:.2f}"),
            ]
        )
    head = ["setting", "changed config keys", "ratio", "cosine", "saturated"]
    table = timing.table([*head, "L_cls2", "L_cls2 on the bird"], rows)
    yield table.replace("---:", "---", 1)  # the keys are text, too
    yield "\n![Four columns of the table over the steps](study/gamma.png)\n"
    yield "## All measurements\n"
    yield from (f"- {name}: {meaning}." for name, meaning in COLUMNS.items())
    rows = [
        [name, f"{line['step']}", *(f"{line[c]:.2g}" for c in COLUMNS)]
        for name, lines in found.items()
        for line in lines
    ]
    yield "\n" + timing.table(["setting", "step", *COLUMNS], rows)
    yield "\n## Machines\n"
    yield from sorted({f"- {x['machine']}" for some in found.values() for x in some})


def _read(docs: Path) -> dict[str, list[dict[str, Any]]]:
    """Reads the lines that `write` has written before."""
    path = docs / _LINES
    found: dict[str, list[dict[str, Any]]] = {}
    for one in path.read_text().splitlines() if path.is_file() else ():
        line = json.loads(one)
        found.setdefault(line.pop("setting"), []).append(line)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--at",
        nargs="+",
        type=int,
        default=[0, 8, 32, 96, 192, 320, 480],
        help="steps before which the network is measured",
    )
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--table", action="store_true", help="only write the page")
    options = parser.parse_args(argv)
    page = options.docs / "gamma.md"
    if options.table:
        if not (found := _read(options.docs)):
            parser.error(f"{options.docs / _LINES} has no results: run without --table")
        write(found, options.docs)
        print(f"written: {page}")
        return
    for name in options.settings:
        config = get_config("cra")
        config.seed = options.seed
        config.update_from_flattened_dict({**BIRDS, **SETTINGS[name]})
        lines = train_and_measure(config.lock(), sorted(options.at))
        about = {"seed": options.seed, "machine": timing.machine()}
        found = {**_read(options.docs), name: [{**x, **about} for x in lines]}
        write({k: found[k] for k in SETTINGS if k in found}, options.docs)
        print(f"{name}: written to {page}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")

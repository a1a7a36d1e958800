"""Why Gamma runs away, and where it is pulled: gradients into Gamma over a training.

    python -m benchmarks.gamma --settings paper released default --figure gamma.png

Trains the quickstart's network on few drawings and asks at a handful of steps, on test
pictures that stay the same: how hard does each loss pull at a picture's Gamma, do all
pictures pull alike, is the pull towards the bird, and how far would a step go?
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from benchmarks import timing
from configs.quickstart import get_config
from cra_jax import experiment, geometry, losses, parallel, pipeline, plotting, steps

_PAPER = {
    "art.normalize_head": False,
    "art.gradient_clip": 0.0,
    "art.inside": False,
    "art.guard": 0.0,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "paper": _PAPER,
    "clipped": {**_PAPER, "art.gradient_clip": 1.0},
    "normalized": {**_PAPER, "art.normalize_head": True},
    "unguarded": {"art.guard": 0.0},
    "unclipped": {"art.gradient_clip": 0.0},
    "default": {},
    "soft": {"art.redundancy": "soft"},
}
TERMS = ("cls2", "res", "cntr")
_PROBE_BATCHES = 3
_CLASSIFIER = "classification_stream"

COLUMNS = {
    "place": "mean over pictures of the length of (gamma1, gamma2) of Eq. 6",
    "spread": "how much it differs between pictures: standard deviation",
    "stuck": "share of pictures beyond 95 % of the place's bound",
    **{
        f"{term} {what}": f"{meaning} of L_{term} to a picture's Gamma"
        for term in TERMS
        for what, meaning in (
            ("pull", "mean length of the gradient"),
            ("alike", "length of the mean gradient, by the mean length"),
            ("to bird", "cosine between descent and the way to the bird"),
        )
    },
    "gain": "what a step multiplies a pull by, but for the rate: 1 + |features|^2",
    "common": "share of that gain that moves all pictures alike",
    "loss": "L_cls2 now",
    "on bird": "L_cls2 with the attention moved onto the bird",
    "into N_cls": "gradient to N_cls's weights that comes by way of Gamma, by L_cls1's",
    "agrees": "cosine between the two",
}


class Probe:
    """Questions to a network about pictures that stay the same.

    Args:
      config: of the run.
      network: that is trained; what pulls at Gamma is asked without guard and clip,
        which are no losses, and what reaches N_cls with them, as in training.
      split: with boxes.

    Raises:
      ValueError: the split does not fill a batch.
    """

    def __init__(self, config: Any, num_classes: int, split: experiment.Split):
        size, self._config = config.train.batch_size, config
        bare = config.copy_and_resolve_references()
        bare.update_from_flattened_dict({"art.guard": 0.0, "art.gradient_clip": 0.0})
        self._network = experiment.build_network(bare, num_classes)
        self._trained = experiment.build_network(config, num_classes)
        order = np.random.default_rng(0).permutation(len(split.labels))
        whole = min(_PROBE_BATCHES, len(order) // size) * size  # pictures
        if not whole:
            raise ValueError(
                f"{len(order)} test pictures do not fill one batch of {size}: lower "
                "train.batch_size or raise data.test_size"
            )
        some = split.take(order[:whole].tolist())
        crop_px = config.data.crop_px
        batches = pipeline.center_batches(
            some.pictures, some.labels, batch_size=size, crop_px=crop_px
        )
        boxes = np.array([some.boxes_px(crop_px)[i] for i in range(len(some.labels))])
        centres = (boxes[:, :2] + boxes[:, 2:]) / (crop_px - 1) - 1
        self._batches = [
            (
                steps.normalize(
                    jnp.asarray(batch["image"]),
                    mean=config.data.mean,
                    std=config.data.std,
                ),
                jnp.asarray(batch["label"]),
                jnp.asarray(centres[i * size : (i + 1) * size], jnp.float32),
            )
            for i, batch in enumerate(batches[i] for i in range(len(batches)))
        ]
        self._ask = jax.jit(self._one)
        self._reaching = jax.jit(self._into_classifier)

    def __call__(self, state: Any) -> dict[str, float]:
        """`COLUMNS` of a state: means over the batches."""
        found = [
            self._ask(state.params, state.batch_stats, *batch)
            | self._reaching(state.params, state.batch_stats, *batch[:2])
            for batch in self._batches
        ]
        return {name: float(np.mean([f[name] for f in found])) for name in COLUMNS}

    def _one(self, params, batch_stats, images, labels, centres):
        seen: dict[str, Any] = {}

        def terms_of(shift):
            def interceptor(call, args, kwargs, context):
                out = call(*args, **kwargs)
                if context.module.name != experiment.ATTENTION_HEAD:
                    return out
                seen["features"] = args[0]
                return out + shift

            asked: Any = _Asked(self._network, seen)
            loss = experiment.build_loss(self._config, asked, steps_per_epoch=1)
            with nn.intercept_methods(interceptor):
                _, (_, terms) = loss(params, batch_stats, images, labels, 0)
            return (
                {name: terms[f"loss_{name}"] for name in TERMS},
                (seen["gamma"], seen["gamma_res"], seen["features"]),
            )

        still = jnp.zeros((len(labels), 4))
        terms, backward, (gamma, gamma_res, features) = jax.vjp(
            terms_of, still, has_aux=True
        )
        found: dict[str, Any] = {}
        way = centres - gamma_res[:, :2]
        for name in TERMS:
            one = {other: jnp.asarray(float(other == name)) for other in TERMS}
            pull = len(labels) * backward(one)[0]
            size = jnp.linalg.norm(pull, axis=-1).mean()
            alike = jnp.linalg.norm(pull.mean(0)) / jnp.maximum(size, 1e-12)
            found[f"{name} pull"] = size
            found[f"{name} alike"] = alike
            found[f"{name} to bird"] = _cosine(-pull[:, :2], way)
        gain = 1 + jnp.square(features).sum(-1).mean()
        found["gain"] = gain
        found["common"] = (1 + jnp.square(features.mean(0)).sum()) / gain
        found["place"] = jnp.linalg.norm(gamma_res[:, :2], axis=-1).mean()
        found["spread"] = gamma_res[:, :2].std(0).mean()
        stuck = jnp.abs(jnp.tanh(gamma[:, :2])) > steps.SATURATED
        found["stuck"] = stuck.any(-1).mean()
        found["loss"] = terms["cls2"]
        onto = self._gamma_at(centres, gamma) - gamma
        found["on bird"] = terms_of(onto)[0]["cls2"]
        return found

    def _into_classifier(self, params, batch_stats, images, labels):
        """What the attention's losses do to N_cls, whose pictures they never are."""
        loss = experiment.build_loss(self._config, self._trained, steps_per_epoch=1)

        def terms_of(classifier):
            changed = {**params, _CLASSIFIER: classifier}
            whole, (_, terms) = loss(changed, batch_stats, images, labels, 0)
            return terms["loss_cls1"], whole - terms["loss_cls1"]

        _, backward = jax.vjp(terms_of, params[_CLASSIFIER])
        own, by_gamma = (
            jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
            for tree in (backward((1.0, 0.0))[0], backward((0.0, 1.0))[0])
        )
        sizes = jnp.linalg.norm(by_gamma), jnp.linalg.norm(own)
        return {
            "into N_cls": sizes[0] / sizes[1],
            "agrees": _cosine(own[None], by_gamma[None]),
        }

    def _gamma_at(self, centres, gamma):
        """Gamma whose place is the bird's, its scale and angle as they are."""
        art = self._config.art
        bound = art.alpha_p
        if art.inside:
            scale = art.alpha_s * jnp.tanh(gamma[:, 2:3])
            bound = geometry.place_bound(scale, gamma[:, 3:], alpha_p=art.alpha_p)
        share = jnp.clip(centres / bound, -0.99, 0.99)
        return jnp.concatenate([jnp.arctanh(share), gamma[:, 2:]], -1)


class _Asked:
    """A network that keeps what it said of Gamma."""

    def __init__(self, network: Any, seen: dict[str, Any]):
        self._network, self._seen = network, seen
        self.guard = 0.0

    def apply(self, *args, **kwargs):
        out, updated = self._network.apply(*args, **kwargs)
        self._seen |= {"gamma": out.gamma, "gamma_res": out.gamma_res}
        return out, updated


def _cosine(a, b):
    """The mean cosine between rows; a row of zeros has none, and counts as 0."""
    return (losses.l2_normalize(a) * losses.l2_normalize(b)).sum(-1).mean()


def watch(config: Any, at: list[int]) -> list[dict[str, float]]:
    """Trains, and asks before the steps `at`.

    Args:
      config: of a quickstart.
      at: steps, ascending.

    Returns:
      ``step`` and `COLUMNS` of each.
    """
    experiment.check(config)
    dataset = experiment.load_data(config)
    split = experiment.open_split(config, dataset, "train")
    num_classes = len(dataset.class_names)
    probe = Probe(config, num_classes, experiment.open_split(config, dataset, "test"))
    batches = pipeline.TrainBatches(
        split.pictures,
        split.labels,
        batch_size=config.train.batch_size,
        crop_px=config.data.crop_px,
        seed=config.seed,
        flip=config.data.flip,
    )
    training = experiment.build_training(
        config, num_classes, steps_per_epoch=batches.steps_per_epoch
    )
    state = steps.create_state(
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
        state, _ = training.step(state, parallel.split(wanted))
    return found


def draw(found: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Four of the numbers over the steps, a curve a setting."""
    shown = {
        "place": "length of the attention's place",
        "spread": "its spread over pictures",
        "cls2 pull": "pull of L_cls2 at a picture's Gamma",
        "cls2 to bird": "cosine of descent and the way to the bird",
    }
    colours = (
        *(plotting.VERMILLION, plotting.ORANGE, plotting.SKY, plotting.BLUE),
        *(plotting.GREEN, plotting.PURPLE, plotting.BLACK),
    )
    figure = Figure(figsize=(7.2, 1.9), layout="constrained")
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
    axes[3].axhline(0, color=plotting.GREY, linewidth=0.6)
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncol=7
    )
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.05])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=1024)
    parser.add_argument("--at", nargs="+", type=int, default=[0, 8, 24, 64, 96])
    parser.add_argument(
        "--lines", type=Path, help="keep the numbers here, as JSON lines"
    )
    parser.add_argument("--figure", type=Path, help="draw here: a folder")
    options = parser.parse_args(argv)
    found: dict[str, list[dict[str, float]]] = {}
    for name in options.settings:
        for rate in options.rates:
            config = get_config()
            config.seed = options.seed
            config.data.train_size = options.pictures
            config.optim.base_lr = rate
            config.update_from_flattened_dict(SETTINGS[name])
            label = name if len(options.rates) == 1 else f"{name}, {rate:g}"
            found[label] = watch(config.lock(), sorted(options.at))
            if options.lines:
                with open(options.lines, "a") as file:
                    for line in found[label]:
                        file.write(json.dumps({"setting": label, **line}) + "\n")
    rows = [
        [label, f"{line['step']:.0f}", *(f"{line[c]:.3g}" for c in COLUMNS)]
        for label, lines in found.items()
        for line in lines
    ]
    print(timing.table(["setting", "step", *COLUMNS], rows))
    print("\n".join(f"{name}: {meaning}" for name, meaning in COLUMNS.items()))
    if options.figure:
        options.figure.mkdir(parents=True, exist_ok=True)
        figure = plotting.styled(draw)(found)
        print(f"drawn: {plotting.save(figure, options.figure, 'gamma')}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")

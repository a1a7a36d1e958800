"""Why Gamma runs away, and where it is pulled: gradients into Gamma over a training.

    python -m benchmarks.study.gamma_drift --settings paper default

Trains the study's network on its drawings and asks at a handful of steps, on test
images that stay the same: how hard does each loss pull at an image's Gamma, do all
images pull alike, is the pull towards the bird, how far would a step go, and what
reaches N_cls? Writes `docs/gamma.md`, its figure and its numbers; settings that are not
asked for keep theirs.
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
_HEAD = """# What the attention's losses do to Gamma, and to N_cls

N_cls sees whole images alone. What contrastive reinforcement changes in it comes by
way of Gamma, which is predicted from its pooled features: L_cls2, L_cntr and L_res pull
at Gamma, the head passes the pull on. `python -m benchmarks.study.gamma_drift` trains
the study's network (docs/study.md: drawn birds, from scratch, learning rate 0.05) and
asks at some steps how large that is, and where it points.
"""
TERMS = ("cls2", "res", "cntr")
_PROBE_BATCHES = 3
_CLASSIFIER = CLASSIFICATION_STREAM

COLUMNS = {
    "place": "mean over images of the length of (gamma1, gamma2) of Eq. 6",
    "spread": "how much it differs between images: standard deviation",
    "stuck": "share of images beyond 95 % of the place's bound",
    **{
        f"{term} {what}": f"{meaning} of L_{term} to an image's Gamma"
        for term in TERMS
        for what, meaning in (
            ("pull", "mean length of the gradient"),
            ("alike", "length of the mean gradient, by the mean length"),
            ("to bird", "cosine between descent and the way to the bird"),
        )
    },
    "gain": "what a step multiplies a pull by, but for the rate: 1 + |features|^2",
    "common": "share of that gain that moves all images alike",
    "loss": "L_cls2 now",
    "on bird": "L_cls2 with the attention moved onto the bird",
    "into N_cls": "gradient to N_cls's weights that comes by way of Gamma, by L_cls1's",
    "agrees": "cosine between the two",
}


class Probe:
    """Questions to a network about images that stay the same.

    Args:
      config: of the run.
      network: that is trained; what pulls at Gamma is asked without guard and clip,
        which are no losses, and what reaches N_cls with them, as in training.
      split: with boxes.

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
        some = split.take(order[:whole].tolist())
        crop_px = config.data.crop_px
        batches = center_batches(
            some.images, some.labels, batch_size=size, crop_px=crop_px
        )
        boxes = np.array([some.boxes_px(crop_px)[i] for i in range(len(some.labels))])
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
                if not isinstance(context.module.parent, AttentionHead):
                    return out
                seen["features"] = args[0]
                return out + shift

            asked: Any = _Asked(self._network, seen)
            loss = build.build_loss(self._config, asked, steps_per_epoch=1)
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
        stuck = jnp.abs(jnp.tanh(gamma[:, :2])) > train_step.SATURATED
        found["stuck"] = stuck.any(-1).mean()
        found["loss"] = terms["cls2"]
        onto = self._gamma_at(centres, gamma) - gamma
        found["on bird"] = terms_of(onto)[0]["cls2"]
        return found

    def _into_classifier(self, params, batch_stats, images, labels):
        """What the attention's losses do to N_cls, whose images they never are."""
        loss = build.build_loss(self._config, self._trained, steps_per_epoch=1)

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
        self.art = network.art

    def apply(self, *args, **kwargs):
        out, updated = self._network.apply(*args, **kwargs)
        self._seen |= {
            "gamma": out.attention.gamma,
            "gamma_res": out.attention.gamma_res,
        }
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
    """Four of the numbers over the steps, a curve a setting."""
    shown = {
        "place": "length of the attention's place",
        "spread": "its spread over images",
        "into N_cls": "gradient to N_cls by way of\nGamma, by L_cls1's own",
        "cls2 to bird": "L_cls2's pull and the way to\nthe bird: cosine",
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
    """Writes `gamma.md` and its figure, and `gamma.jsonl`, from which both come.

    Args:
      found: by setting, in the order of `SETTINGS`.
      docs: a folder.
    """
    (docs / "study").mkdir(parents=True, exist_ok=True)
    figure = figure_style.styled(draw)(found)
    figure.savefig(docs / "study" / "gamma.png", dpi=200, metadata={"Software": None})
    lines = [{"setting": k, **x} for k, some in found.items() for x in some]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    files.write_atomically(docs / _LINES, text)
    files.write_atomically(docs / "gamma.md", "\n".join(_page(found)) + "\n")


def _page(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterable[str]:
    yield _HEAD
    for name, lines in found.items():
        changes = ", ".join(f"`{k}={v}`" for k, v in SETTINGS[name].items())
        trained = lines[1:]  # a fresh head sends next to nothing back
        sent = sorted(line["into N_cls"] for line in trained)
        agrees = sorted(line["agrees"] for line in trained)
        yield (
            f"- **{name}** ({changes or 'as the quickstart has it'}): after training "
            f"has begun, what comes to N_cls by way of Gamma is {sent[0]:.2g} to "
            f"{sent[-1]:.2g} times L_cls1's own gradient, at a cosine of "
            f"{agrees[0]:.2f} to {agrees[-1]:.2f}. At step {lines[-1]['step']}, "
            f"{100 * lines[-1]['stuck']:.0f} % of the images are stuck at the bound; "
            f"L_cls2 is {lines[-1]['loss']:.2f}, and would be "
            f"{lines[-1]['on bird']:.2f} with the attention on the bird."
        )
    yield "\n![Four numbers over the steps](study/gamma.png)\n"
    rows = [
        [name, f"{line['step']}", *(f"{line[c]:.2g}" for c in COLUMNS)]
        for name, lines in found.items()
        for line in lines
    ]
    yield timing.table(["setting", "step", *COLUMNS], rows)
    yield "\n" + "\n".join(f"- {name}: {what}" for name, what in COLUMNS.items())
    yield "\nMade on:\n"
    yield from sorted({f"- {x['machine']}" for some in found.values() for x in some})


def _kept(docs: Path) -> dict[str, list[dict[str, Any]]]:
    """What `write` has written before."""
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
        "--at", nargs="+", type=int, default=[0, 8, 32, 96, 192, 320, 480]
    )
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args(argv)
    for name in options.settings:
        config = get_config()
        config.seed = options.seed
        config.update_from_flattened_dict({**BIRDS, **SETTINGS[name]})
        lines = watch(config.lock(), sorted(options.at))
        about = {"seed": options.seed, "machine": timing.machine()}
        known = {**_kept(options.docs), name: [{**x, **about} for x in lines]}
        write({k: known[k] for k in SETTINGS if k in known}, options.docs)
        print(f"{name}: written to {options.docs / 'gamma.md'}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")

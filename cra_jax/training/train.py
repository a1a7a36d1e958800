"""The loop: batches in, updates, numbers, checkpoints, and scores at the end."""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cra_jax import art_module, train_step
from cra_jax.backbones import families
from cra_jax.datasets import sources
from cra_jax.inference.evaluate import Evaluator, results
from cra_jax.inference.restore import check_average, classification_variables
from cra_jax.input import on_device
from cra_jax.input.batches import TrainBatches
from cra_jax.input.records import Dataset
from cra_jax.input.splits import check_count, describe_data, open_split
from cra_jax.reports import report
from cra_jax.runtime import (
    devices,
    hosts,
    progress,
    provenance,
    run_folder,
    signals,
    training_log,
)
from cra_jax.runtime.checkpoint import Checkpoints
from cra_jax.runtime.prefetch import prefetch
from cra_jax.training import build, check_config, monitor, step_wrappers
from cra_jax.training.pretrained import Origin, open_origin, start_from
from cra_jax.training.running_mean import Mean


def dispatches(
    first_step: int, total_steps: int, *, most: int, ends: Sequence[int]
) -> list[range]:
    """Steps, from 0, in runs that a device works through without being asked.

    A run ends at multiples of `most`, counted from step 0, so that a resumed run has
    the same ones, and wherever the loop has something else to do.

    Args:
      first_step: steps already taken.
      total_steps: of the training.
      most: steps in a run.
      ends: a run ends at multiples of each of these, too; 0: no such end.
    """
    multiples = [n for n in (most, *ends) if n]
    runs, step = [], first_step
    while step < total_steps:
        stop = min(total_steps, *((step // n + 1) * n for n in multiples))
        runs.append(range(step, stop))
        step = stop
    return runs


def run(
    config: run_folder.Config, workdir: Path, *, allow_change: bool = False
) -> dict[str, dict[str, Any]]:
    """Trains to the end, from the run folder's newest checkpoint where there is one.

    Args:
      config: of `configs/`.
      workdir: the run folder, made where it is missing.
      allow_change: whether to go on with a run that another config began.

    Returns:
      The scores of each test split after the last epoch.

    Raises:
      ValueError: something about the config, the data or the folder is wrong; raised
        before any work is done.
    """
    hosts.start(**config.hosts)
    check_config.check(config)
    with contextlib.ExitStack() as stack:
        with hosts.all_or_none():
            dataset = sources.load_data(config)
            check_count(config, dataset)
            checkpoints = (
                _open_folder(config, workdir, stack, allow_change=allow_change)
                if hosts.is_first()
                else None
            )
        first_step = checkpoints.latest_step() if checkpoints else None
        first_step = hosts.told_by_first(first_step)
        with hosts.all_or_none():
            one = Run(config, workdir, dataset, checkpoints, first_step)
        scores = one.to_the_end()
    if hosts.is_first():
        if config.train.report:
            report.leave(config, workdir)
        print("\n".join(_summary(scores, workdir)))
    hosts.wait_for_all()
    return scores


def _open_folder(
    config: run_folder.Config,
    workdir: Path,
    stack: contextlib.ExitStack,
    *,
    allow_change: bool,
) -> Checkpoints:
    """Locks the run folder and leaves the config there; the stack lets go of both."""
    stack.enter_context(run_folder.locked(workdir))
    keep = config.checkpoint.keep_latest
    checkpoints = Checkpoints(workdir / "checkpoints", keep_latest=keep)
    stack.enter_context(checkpoints)
    # Without a checkpoint there is nothing yet that a change could spoil.
    fresh = checkpoints.latest_step() is None
    run_folder.keep_config(
        workdir, run_folder.kept(config), allow_change=allow_change or fresh
    )
    checkpoints.set_damaged_aside(progress.say)
    return checkpoints


class Run:
    """One run: what it is made of, and where it is."""

    def __init__(
        self,
        config: run_folder.Config,
        workdir: Path,
        dataset: Dataset,
        checkpoints: Checkpoints | None,
        first_step: int | None,
        *,
        repeats: bool = False,
    ):
        self._config = config
        self._workdir = workdir
        self._checkpoints = checkpoints
        self._class_names = dataset.class_names
        # A run that goes on has its weights; one that begins wants them before the
        # pictures are prepared. Other hosts get them from the first.
        first = hosts.is_first()
        pretrained = config.model.pretrained if first and not first_step else ""
        origin = (
            open_origin(pretrained, arch=config.model.backbone) if pretrained else None
        )
        self._splits = {
            name: open_split(config, dataset, name) for name in dataset.splits
        }
        self._data = describe_data(self._splits)
        train_split = self._splits.pop("train")
        self._batches = TrainBatches(
            train_split.pictures,
            train_split.labels,
            batch_size=config.train.batch_size,
            crop_px=config.data.crop_px,
            seed=config.seed,
            flip=config.data.flip,
            shard=hosts.shard(),
        )
        self._steps_per_epoch = self._batches.steps_per_epoch
        self._total_steps = config.train.epochs * self._steps_per_epoch
        num_classes = len(dataset.class_names)
        self._training = build.build_training(
            config, num_classes, steps_per_epoch=self._steps_per_epoch
        )
        self._evaluator = Evaluator(
            families.backbone(config, num_classes), config, shard=hosts.shard()
        )
        self._state = train_step.create_state(
            jax.random.key(config.seed),
            self._training.network,
            self._training.optimizer,
            crop_px=config.data.crop_px,
            averaged=config.optim.ema_decay > 0,
        )
        # Their attention is kept at each evaluation: old checkpoints are not.
        self._watched = self._splits["test"].firsts(config.eval.snapshots)
        self._window = Mean()
        self._notes = [
            *dataset.notes,
            *_describe(config, dataset, self._batches, self._splits),
        ]
        self._watch = monitor.Watch(
            workdir,
            run_folder.flatten(config.to_dict()),
            first_step=first_step or 0,
            pictures=lambda step: {
                i: train_split.records[i].name
                for i in self._batches.batch(step - 1)["index"].tolist()
            },
            write=checkpoints is not None and not repeats,
        )
        self._resident = None
        if config.data.on_device:
            pictures: Any = train_split.pictures  # a Store: see check_config.check
            self._resident = on_device.Resident(pictures, crop_px=config.data.crop_px)
            self._notes.append(self._resident.about)
        if origin:
            self._start_from(origin)
        self._first_step = first_step or 0
        self._window_before = []
        if first_step:
            self._notes.append(f"goes on from step {first_step}")
            if checkpoints:
                self._resume(checkpoints, first_step)

    def _start_from(self, origin: Origin) -> None:
        """Puts published or exported weights into the streams."""
        params, batch_stats, notes = start_from(
            self._state.params,
            self._state.batch_stats,
            pretrained=origin,
            arch=self._config.model.backbone,
            class_names=self._class_names,
        )
        self._state = self._state.started_from(params, batch_stats)
        self._notes += notes

    def _resume(self, checkpoints: Checkpoints, step: int) -> None:
        """Takes up a checkpoint."""
        check_average(self._config, checkpoints, step)
        self._state = checkpoints.restore(step, jax.eval_shape(lambda: self._state))
        self._window_before = checkpoints.meta(step)["window"]

    def _agree(self) -> None:
        """All hosts see to it that they read the same, and begin as the first does."""
        hosts.check_same(self._data, "their data (data.source, data.path)")
        for numbers in hosts.told_by_first(self._window_before):
            self._window.add(numbers)
        self._state = devices.on_each_device(hosts.arrays_of_first(self._state))

    def to_the_end(self) -> dict[str, dict[str, Any]]:
        """Trains; returns the scores of each test split."""
        self._agree()
        steps_left = {"first_step": self._first_step, "total_steps": self._total_steps}
        device_names = devices.describe_devices()
        with contextlib.ExitStack() as stack:
            if hosts.is_first():
                stack.enter_context(
                    provenance.recorded(
                        self._workdir, devices=device_names, **steps_left
                    )
                )
            log = training_log.Log(
                self._workdir, mute=not hosts.is_first(), **steps_left
            )
            stack.enter_context(log)
            for note in self._notes:
                log.say(note)
            if not self._first_step:
                self._watch_the_start(log)
            with signals.heard("this step is finished and saved") as asked:
                self._loop(log, asked)
            if self._checkpoints:
                self._checkpoints.wait()
            return hosts.told_by_first(self._scores())

    def terms_of(self, step: int) -> dict[str, float]:
        """The numbers of one step, computed again; writes nothing."""
        self._agree()
        terms = {}
        for number in range(self._first_step, step):
            self._state, terms = self._training.step(
                self._state, self._device_batch(number)
            )
        return {name: float(value) for name, value in terms.items()}

    def _loop(self, log: training_log.Log, asked: signals.Asked) -> None:
        config = self._config
        every = config.checkpoint.every_steps
        runs = dispatches(
            self._first_step,
            self._total_steps,
            most=config.train.steps_per_dispatch,
            ends=(self._steps_per_epoch, config.train.log_every_steps, every),
        )
        batches = prefetch(
            lambda i: [self._device_batch(step) for step in runs[i]],
            0,
            len(runs),
            workers=config.data.workers,
            depth=config.data.prefetch_batches,
        )
        clock = progress.Clock()
        for steps_now, batch in zip(runs, batches, strict=True):
            self._state, numbers = self._training.several(self._state, batch)
            for terms in numbers:
                self._window.add(terms)
                log.advance()
            step = steps_now.stop
            epoch, into_epoch = divmod(step, self._steps_per_epoch)
            epoch_ends = into_epoch == 0
            last = step == self._total_steps
            logs = epoch_ends or step % config.train.log_every_steps == 0
            if logs:
                self._log_window(log, step, clock)
            measured = epoch_ends and (last or epoch % config.eval.every_epochs == 0)
            top1 = self._evaluate(log, step, epoch) if measured else None
            # Several hosts must stop at one step: they ask each other now and then.
            stop = hosts.largest(asked.number) if logs or hosts.alone() else 0
            if (
                last
                or (epoch_ends and epoch % config.checkpoint.every_epochs == 0)
                or (every and step % every == 0)
                or stop
            ):
                self._save(step, top1)
            if stop:
                if self._checkpoints:
                    self._checkpoints.wait()
                log.say(f"saved at step {step}: the same command goes on from there")
                raise signals.Stopped(stop)
            if epoch_ends:
                clock.restart()

    def _device_batch(self, step: int) -> dict[str, Any]:
        mixes = ("index",) if self._config.mix.kind else ()
        if self._resident:
            plan = self._batches.plan(step)
            index = devices.split({k: plan[k] for k in mixes})
            return self._resident.batch(plan) | index
        batch = self._batches.batch(step)
        return devices.split({k: batch[k] for k in ("image", "flip", "label", *mixes)})

    def _log_window(
        self, log: training_log.Log, step: int, clock: progress.Clock
    ) -> None:
        count = len(self._window)
        self._watch.look(step, self._window.fetch())
        numbers = self._window.take(step_wrappers.is_good)
        if not numbers:
            return
        seconds = clock.seconds_a_step(count)
        numbers["images_per_second"] = self._config.train.batch_size / seconds
        numbers["eta_seconds"] = seconds * (self._total_steps - step)
        epoch = -(-step // self._steps_per_epoch)
        self._watch.warn(step, numbers, begun=step > self._steps_per_epoch)
        log.train(step=step, epoch=epoch, numbers=numbers)

    def _network(self) -> tuple[dict[str, Any], art_module.AttentionHead | None]:
        """The plain backbone's variables, and the head where there is attention."""
        params, batch_stats = self._state.to_predict()
        return (
            classification_variables(params, batch_stats),
            art_module.attention_head(self._config, params),
        )

    def _evaluate(self, log: training_log.Log, step: int, epoch: int) -> float:
        """Scores and logs the test splits; returns what "best" goes by."""
        variables, head = self._network()
        top1 = {}
        for name, split in self._splits.items():
            found = self._evaluator.center(variables, split, head=head)
            scores = self._evaluator.scores(found, split, "center")
            log.test(step=step, epoch=epoch, split=name, numbers=scores)
            top1[name] = scores["top1"]
            if name == "test" and found.matrices is not None:
                self._keep_attention(log, step, epoch, found.matrices[self._watched])
            if step == self._total_steps and hosts.is_first():
                run_folder.write_results(
                    self._workdir, name, "center", results(found, split, step=step)
                )
        return top1["test"]

    def _watch_the_start(self, log: training_log.Log) -> None:
        """Keeps where the attention begins, before the first step."""
        variables, head = self._network()
        if head and self._watched:
            few = self._splits["test"].take(self._watched)
            found = self._evaluator.center(variables, few, head=head)
            assert found.matrices is not None
            self._keep_attention(log, 0, 0, found.matrices)

    def _keep_attention(
        self, log: training_log.Log, step: int, epoch: int, matrices: np.ndarray
    ) -> None:
        records = self._splits["test"].records
        log.attention(
            step=step,
            epoch=epoch,
            split="test",
            names={i: records[i].name for i in self._watched},
            matrices=dict(zip(self._watched, matrices, strict=True)),
        )

    def _save(self, step: int, top1: float | None) -> None:
        self._watch.look(step, self._window.fetch())
        if not self._checkpoints:
            return
        meta = {
            "step": step,
            "epoch": -(-step // self._steps_per_epoch),
            "window": self._window.fetch(),
            "class_names": list(self._class_names),
            "config": run_folder.kept(self._config),
        }
        self._checkpoints.save(step, self._state, meta, metric=top1)

    def _scores(self) -> dict[str, dict[str, Any]]:
        """The newest scores of each test split."""
        lines = run_folder.read_metrics(self._workdir)
        # Evaluation by hand adds its own, of the other protocol.
        return {x["split"]: x for x in lines if x.get("protocol") == "center"}


def _summary(scores: dict[str, dict[str, Any]], workdir: Path):
    for split, numbers in scores.items():
        yield f"{split:>12}: {training_log.describe_scores(numbers)}"
    yield f"  run folder: {workdir}"


def _describe(config: run_folder.Config, dataset, batches, splits):
    sizes = ", ".join(f"{name} {len(s.labels)}" for name, s in splits.items())
    train = len(dataset.splits["train"])
    yield (
        f"{config.model.kind} with {config.model.backbone} in "
        f"{devices.compute_dtype(config.model.dtype)} on "
        f"{devices.describe_devices()}; {dataset.name}: "
        f"{len(dataset.class_names)} classes, train {train}, {sizes} images"
    )
    if batches.dropped_per_epoch:
        yield (
            f"each epoch leaves out {batches.dropped_per_epoch} of the training "
            "images, others each time, since batches are whole"
        )

"""The training loop: updates, logs, checkpoints, and scores at the end."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from cra_jax import train_step
from cra_jax.art_module import TrainedHead
from cra_jax.inference import accuracy, run_options
from cra_jax.inference.evaluate import Evaluator, results
from cra_jax.inference.restore import check_average, classification_variables
from cra_jax.input import on_device, splits
from cra_jax.input.batches import TrainBatches
from cra_jax.input.records import Dataset
from cra_jax.reports import report
from cra_jax.runtime import (
    devices,
    hosts,
    progress,
    provenance,
    run_directory,
    signals,
    training_log,
)
from cra_jax.runtime.checkpoint import Checkpoints
from cra_jax.runtime.prefetch import prefetch
from cra_jax.training import build, check_config, monitor, resume, step_wrappers
from cra_jax.training.pretrained import PretrainedWeights, open_pretrained, start_from
from cra_jax.training.running_mean import Mean


def run(
    config: build.Config,
    workdir: Path,
    *,
    allow_change: bool = False,
    allow_data_change: bool = False,
) -> dict[str, dict[str, Any]]:
    """Trains to the end; resumes from the newest checkpoint of the run directory.

    Args:
      config: a config of `configs/`.
      workdir: the run directory; created if it is missing.
      allow_change: whether to resume a run that started with another config.
      allow_data_change: whether to resume a run that started with other images of the
        same classes. A test split that was drawn at random stays as it was drawn.

    Returns:
      The scores of each test split after the last epoch.

    Raises:
      ValueError: the config, the data or the directory is wrong; raised before any work
        is done.
    """
    hosts.start(**config.hosts)
    check_config.check(config)
    loop = build.loop_options(config)
    with contextlib.ExitStack() as stack:
        with hosts.all_or_none():
            dataset = build.load_dataset(config)
            splits.check_fills_batch(dataset, loop.batch_size)
            checkpoints, before = None, {}
            if hosts.is_first():
                checkpoints, before = _open_directory(
                    config,
                    workdir,
                    stack,
                    keep_latest=loop.keep_latest,
                    allow_change=allow_change,
                )
        before = hosts.broadcast_from_first(before)
        with hosts.all_or_none():
            data = resume.check_data(
                dataset, before, workdir, allow_change=allow_data_change
            )
            training = Run(
                config,
                workdir,
                data.dataset,
                checkpoints,
                before.get("step"),
                data=data,
                before=before,
            )
        scores = training.train()
        best = training.describe_best()
    if hosts.is_first():
        if loop.report:
            report.write_after_training(run_options.from_config(config), workdir)
        summary = _summary(scores, workdir, best=best, warnings=training.data_warnings)
        print("\n".join(summary))
    hosts.wait_for_all()
    return scores


def dispatches(
    first_step: int, total_steps: int, *, most: int, ends: Sequence[int]
) -> list[range]:
    """Splits the steps, from 0, into ranges that a device computes in one call.

    A range ends at multiples of `most`, counted from step 0, so that a resumed training
    has the same ranges, and at multiples of `ends`, where the loop logs or saves.

    Args:
      first_step: steps already taken.
      total_steps: number of steps of the training.
      most: largest number of steps in a range.
      ends: further numbers at whose multiples a range ends; 0 is ignored.
    """
    multiples = [n for n in (most, *ends) if n]
    runs, step = [], first_step
    while step < total_steps:
        stop = min(total_steps, *((step // n + 1) * n for n in multiples))
        runs.append(range(step, stop))
        step = stop
    return runs


def _open_directory(
    config: build.Config,
    workdir: Path,
    stack: contextlib.ExitStack,
    *,
    keep_latest: int,
    allow_change: bool,
) -> tuple[Checkpoints, resume.Before]:
    """Locks the run directory and compares the config; `stack` releases the lock.

    Returns:
      The checkpoints, and what the newest of them knows about the run.
    """
    stack.enter_context(run_directory.locked(workdir))
    had_checkpoints = (workdir / "checkpoints").is_dir()
    checkpoints = Checkpoints(workdir / "checkpoints", keep_latest=keep_latest)
    stack.enter_context(checkpoints)
    # Without a checkpoint, a changed config does no harm.
    if checkpoints.latest_step() is None:
        run_directory.check_is_unused(workdir, had_checkpoints=had_checkpoints)
    elif not allow_change:
        run_directory.check_config(workdir, build.config_without_hosts(config))
    step = checkpoints.move_damaged(progress.print_line)
    return checkpoints, resume.read(checkpoints, step, workdir)


@dataclasses.dataclass(frozen=True)
class Data:
    """The dataset, opened for training.

    Attributes:
      class_names: in the order of the labels.
      train: the training split.
      tests: the other splits, by name.
      batches: batches of the training split.
      digest: describes the content of all splits, to compare hosts.
      images: the training images in device memory; None without `data.on_device`.
    """

    class_names: tuple[str, ...]
    train: splits.Split
    tests: dict[str, splits.Split]
    batches: TrainBatches
    digest: str
    images: on_device.DeviceImages | None

    @classmethod
    def open(
        cls, dataset: Dataset, data: splits.DataOptions, loop: build.LoopOptions
    ) -> "Data":
        """Opens all splits, with an image cache if the config asks for it.

        Raises:
          ValueError: an image cannot be read, or the images do not fit in memory.
        """
        opened = {
            name: splits.open_split(data, dataset, name) for name in dataset.splits
        }
        digest = splits.describe_data(opened)
        train = opened.pop("train")
        batches = TrainBatches(
            train.images,
            train.labels,
            batch_size=loop.batch_size,
            crop_px=data.crop_px,
            seed=loop.seed,
            flip=loop.flip,
            shard=hosts.shard(),
        )
        images: Any = train.images  # in the image cache: see check_config.check
        kept = None
        if loop.on_device:
            kept = on_device.DeviceImages(images, crop_px=data.crop_px)
        return cls(dataset.class_names, train, opened, batches, digest, kept)

    def device_batch(self, step: int, *, indexed: bool) -> dict[str, Any]:
        """A training batch on the devices; `indexed` adds the images' indices."""
        index = ("index",) if indexed else ()
        if self.images:
            plan = self.batches.plan(step)
            return self.images.batch(plan) | devices.split({k: plan[k] for k in index})
        batch = self.batches.batch(step)
        return devices.split({k: batch[k] for k in ("image", "flip", "label", *index)})

    def image_names(self, step: int) -> dict[int, str]:
        """Index and name of each image in the batch of a step; steps count from 1."""
        indices = self.batches.batch(step - 1)["index"].tolist()
        return {i: self.train.records[i].name for i in indices}


class Run:
    """One run: the training state and everything that updates it."""

    def __init__(
        self,
        config: build.Config,
        workdir: Path,
        dataset: Dataset,
        checkpoints: Checkpoints | None,
        first_step: int | None,
        *,
        data: resume.CheckedData | None = None,
        before: resume.Before | None = None,
        repeats: bool = False,
    ):
        """Builds the training and restores the checkpoint of `first_step`.

        Args:
          config: a config of `configs/`.
          workdir: the run directory.
          dataset: the dataset.
          checkpoints: those of the run; None on other hosts than the first.
          first_step: the step that training resumes from.
          data: what is known of the dataset; None: nothing is written about it.
          before: what the checkpoint knows of the run, to describe what has changed.
          repeats: whether steps are only repeated, and nothing is written.

        Raises:
          ValueError: an image or the checkpoint cannot be read.
        """
        self._config = config
        self._loop = build.loop_options(config)
        self._workdir = workdir
        self._checkpoints = checkpoints
        self._first_step = first_step or 0
        # Only a new run reads pretrained weights, before any image is prepared, so
        # that errors show early. Other hosts get them from the first host.
        options = run_options.from_config(config)
        self._workers = options.data.workers
        wanted = hosts.is_first() and not first_step and self._loop.pretrained
        arch = options.backbone
        weights = open_pretrained(wanted, arch=arch) if wanted else None
        self._data = Data.open(dataset, options.data, self._loop)
        self._steps_per_epoch = self._data.batches.steps_per_epoch
        self._total_steps = self._loop.epochs * self._steps_per_epoch
        num_classes = len(dataset.class_names)
        self._training = build.build_training(
            config, num_classes, steps_per_epoch=self._steps_per_epoch
        )
        self._evaluator = Evaluator(
            options.create_backbone(num_classes), options, shard=hosts.shard()
        )
        self._state = train_step.create_state(
            jax.random.key(self._loop.seed),
            self._training.network,
            self._training.optimizer,
            crop_px=options.data.crop_px,
            averaged=self._loop.ema_decay > 0,
        )
        self._metric_split = splits.metric_split(self._data.tests)
        # Each evaluation records the attention of these images, because old checkpoints
        # are deleted.
        self._snapshot_indices = self._data.tests["test"].first_of_each_class(
            self._loop.snapshots
        )
        self._window = Mean()
        self._window_before = []
        # Whether the step that training resumes from lacks its evaluation.
        self._is_unevaluated = False
        found = splits.warn_of_duplicates(self._data.train, self._data.tests)
        self._data_notes = [*dataset.notes, *found]
        self.data_warnings = [x for x in self._data_notes if x.startswith("warning: ")]
        self._notes = [
            *self._data_notes,
            *_describe(config, dataset, self._data),
        ]
        self._listed = data.listed if data else None
        self._warnings = [*(data.warnings if data else ())]
        if self._first_step < self._total_steps:
            self._warnings += resume.describe_moves(
                before or {},
                config,
                steps_per_epoch=self._steps_per_epoch,
                train_size=len(self._data.train.labels),
            )
            self._warnings += check_config.warnings(
                config, steps_per_epoch=self._steps_per_epoch
            )
        self._monitor = monitor.Monitor(
            workdir,
            run_directory.flatten(config.to_dict()),
            first_step=self._first_step,
            images=self._data.image_names,
            write=checkpoints is not None and not repeats,
        )
        if weights:
            self._start_from(weights, arch)
        if first_step:
            self._notes.append(f"resumes from step {first_step}")
            if checkpoints:
                self._resume(checkpoints, first_step)
        is_finished = self._first_step >= self._total_steps and not self._is_unevaluated
        if self._warnings and is_finished:
            self._warnings.append(
                "the run is finished, and its scores are of the data before the "
                "change: --mode eval with --allow_data_change scores the data as it is"
            )
        self._notes += [f"warning: {warning}" for warning in self._warnings]

    def _start_from(self, weights: PretrainedWeights, arch: str) -> None:
        """Loads pretrained weights into the streams."""
        params, batch_stats, notes = start_from(
            self._state.params,
            self._state.batch_stats,
            pretrained=weights,
            arch=arch,
            class_names=self._data.class_names,
        )
        self._state = self._state.started_from(params, batch_stats)
        self._notes += notes

    def _resume(self, checkpoints: Checkpoints, step: int) -> None:
        """Restores a checkpoint."""
        check_average(checkpoints, step, averaged=self._loop.ema_decay > 0)
        self._state = checkpoints.restore(step, jax.eval_shape(lambda: self._state))
        self._window_before = checkpoints.meta(step)["window"]
        self._is_unevaluated = self._is_evaluated_after(
            step
        ) and not checkpoints.has_metric(step)

    def _synchronize(self) -> None:
        """Checks that all hosts have the same data; copies the first host's state."""
        hosts.check_same(self._data.digest, "their data (data.source, data.path)")
        for numbers in hosts.broadcast_from_first(self._window_before):
            self._window.add(numbers)
        self._is_unevaluated = hosts.broadcast_from_first(self._is_unevaluated)
        self._state = devices.on_each_device(hosts.broadcast_arrays(self._state))

    def train(self) -> dict[str, dict[str, Any]]:
        """Trains to the end; returns the scores of each test split."""
        self._synchronize()
        first_step, total_steps = self._first_step, self._total_steps
        names = devices.describe_devices()
        with contextlib.ExitStack() as stack:
            if hosts.is_first():
                self._keep()
            if hosts.is_first() and (first_step < total_steps or self._is_unevaluated):
                stack.enter_context(
                    provenance.recorded(
                        self._workdir,
                        devices=names,
                        first_step=first_step,
                        notes=self._data_notes,
                        warnings=self._warnings,
                    )
                )
            log = stack.enter_context(
                training_log.Log(
                    self._workdir,
                    first_step=first_step,
                    total_steps=total_steps,
                    is_evaluated=not self._is_unevaluated,
                    mute=not hosts.is_first(),
                )
            )
            for note in self._notes:
                log.print_line(note)
            if not self._first_step:
                self._record_first_attention(log)
            with signals.stop_on_signal(
                "this step is finished and saved"
            ) as stop_request:
                if self._is_unevaluated:
                    self._evaluate(log, first_step, stop_request, saved=True)
                self._train(log, stop_request)
            if self._checkpoints:
                self._checkpoints.wait()
            return hosts.broadcast_from_first(self._scores())

    def _keep(self) -> None:
        """Writes the config and the list of images: the run has been restored."""
        run_directory.keep_config(
            self._workdir, build.config_without_hosts(self._config), allow_change=True
        )
        # The scores of a finished run are of the data that it was trained on.
        if self._listed and self._first_step < self._total_steps:
            run_directory.write_data(self._workdir, self._listed)

    def terms_of(self, step: int) -> dict[str, float]:
        """Computes the numbers of one step again; writes nothing."""
        self._synchronize()
        terms = {}
        for number in range(self._first_step, step):
            self._state, terms = self._training.step(
                self._state, self._device_batch(number)
            )
        return {name: float(value) for name, value in terms.items()}

    def _train(self, log: training_log.Log, stop_request: signals.StopRequest) -> None:
        loop = self._loop
        every = loop.save_every_steps
        runs = dispatches(
            self._first_step,
            self._total_steps,
            most=loop.steps_per_dispatch,
            ends=(self._steps_per_epoch, loop.log_every_steps, every),
        )
        batches = prefetch(
            lambda i: [self._device_batch(step) for step in runs[i]],
            0,
            len(runs),
            workers=self._workers,
            depth=loop.prefetch_batches,
        )
        clock = progress.Clock()
        for steps_now, batch in zip(runs, batches, strict=True):
            self._state, numbers = self._training.run_steps(self._state, batch)
            for terms in numbers:
                self._window.add(terms)
                log.advance()
            step = steps_now.stop
            epoch, into_epoch = divmod(step, self._steps_per_epoch)
            epoch_ends = into_epoch == 0
            last = step == self._total_steps
            logs = epoch_ends or step % loop.log_every_steps == 0
            if logs:
                self._log_window(log, step, clock)
            # All hosts must stop at the same step, so they communicate at log lines.
            stop = (
                hosts.max_over_hosts(stop_request.number)
                if logs or hosts.is_only_host()
                else 0
            )
            saves = (
                last
                or (epoch_ends and epoch % loop.save_every_epochs == 0)
                or (every > 0 and step % every == 0)
            )
            # Before the evaluation, which takes long and can fail.
            if saves or stop:
                self._save(step)
            if self._is_evaluated_after(step) and not stop:
                self._evaluate(log, step, stop_request, saved=saves)
                stop = hosts.max_over_hosts(stop_request.number)
                if stop and not saves:
                    self._save(step)
            if stop:
                self._stop(log, step, stop)
            if epoch_ends:
                clock.restart()

    def _device_batch(self, step: int) -> dict[str, Any]:
        return self._data.device_batch(step, indexed=self._loop.needs_index)

    def _log_window(
        self, log: training_log.Log, step: int, clock: progress.Clock
    ) -> None:
        count = len(self._window)
        self._monitor.check_steps(step, self._window.fetch())
        numbers = self._window.take(step_wrappers.is_finite_step)
        if not numbers:
            return
        seconds = clock.seconds_a_step(count)
        numbers["images_per_second"] = self._loop.batch_size / seconds
        numbers["eta_seconds"] = seconds * (self._total_steps - step)
        epoch = -(-step // self._steps_per_epoch)
        self._monitor.warn(step, numbers, begun=step > self._steps_per_epoch)
        log.train(step=step, epoch=epoch, numbers=numbers)

    def _network(self) -> tuple[dict[str, Any], TrainedHead | None]:
        """The plain backbone's variables, and the attention head if there is one."""
        params, batch_stats = self._state.to_predict()
        return (
            classification_variables(params, batch_stats),
            build.trained_head(self._config, params),
        )

    def _is_evaluated_after(self, step: int) -> bool:
        """Whether the test splits are evaluated after a step."""
        epoch, into_epoch = divmod(step, self._steps_per_epoch)
        is_due = step == self._total_steps
        is_due |= epoch % self._loop.evaluate_every_epochs == 0
        return into_epoch == 0 and is_due

    def _evaluate(
        self,
        log: training_log.Log,
        step: int,
        stop_request: signals.StopRequest,
        *,
        saved: bool,
    ) -> None:
        """Scores and logs the test splits.

        Args:
          log: of the run.
          step: steps taken.
          stop_request: ends the evaluation of a saved step at the next batch; the
            resumed training repeats it.
          saved: whether the step is saved; the metric of "best" is added to it then.
        """
        epoch = step // self._steps_per_epoch
        interrupt = stop_request if saved and hosts.is_only_host() else None
        variables, head = self._network()
        top1 = {}
        for name, split in self._data.tests.items():
            try:
                found = self._evaluator.center(
                    variables, split, head=head, interrupt=interrupt
                )
            except signals.Stopped:
                self._stop(log, step, stop_request.number)
            scores = self._evaluator.scores(found, split, "center")
            log.test(step=step, epoch=epoch, split=name, numbers=scores)
            top1[name] = scores["top1"]
            if name == "test" and found.matrices is not None:
                matrices = found.matrices[self._snapshot_indices]
                self._record_attention(log, step, epoch, matrices)
            if step == self._total_steps and hosts.is_first():
                rows = results(
                    found,
                    split,
                    class_names=self._data.class_names,
                    step=step,
                    settings=scores["settings"],
                )
                run_directory.write_results(self._workdir, name, "center", rows)
        if saved and self._checkpoints:
            self._checkpoints.add_metric(step, top1[self._metric_split])

    def describe_best(self) -> str:
        """The checkpoint "best", and what it was chosen on; empty if there is none."""
        if not self._checkpoints:
            return ""
        step = self._checkpoints.best_step()
        if step is None:
            return ""
        epoch = self._checkpoints.meta(step)["epoch"]
        return f"step {step} (epoch {epoch}), chosen on {self._metric_split!r}"

    def _record_first_attention(self, log: training_log.Log) -> None:
        """Records the attention before the first step."""
        variables, head = self._network()
        if head and self._snapshot_indices:
            snapshots = self._data.tests["test"].take(self._snapshot_indices)
            found = self._evaluator.center(variables, snapshots, head=head)
            assert found.matrices is not None
            self._record_attention(log, 0, 0, found.matrices)

    def _record_attention(
        self, log: training_log.Log, step: int, epoch: int, matrices: np.ndarray
    ) -> None:
        records = self._data.tests["test"].records
        log.attention(
            step=step,
            epoch=epoch,
            split="test",
            names={i: records[i].name for i in self._snapshot_indices},
            matrices=dict(zip(self._snapshot_indices, matrices, strict=True)),
        )

    def _stop(self, log: training_log.Log, step: int, number: int) -> NoReturn:
        """Ends the training after a step that was saved."""
        if self._checkpoints:
            self._checkpoints.wait()
        log.print_line(f"saved at step {step}: run the same command again to resume")
        raise signals.Stopped(number)

    def _save(self, step: int) -> None:
        self._monitor.check_steps(step, self._window.fetch())
        if not self._checkpoints:
            return
        meta = {
            "step": step,
            "epoch": -(-step // self._steps_per_epoch),
            "window": self._window.fetch(),
            "steps_per_epoch": self._steps_per_epoch,
            "class_names": list(self._data.class_names),
            "data": {
                name: splits.digest(images)
                for name, images in (
                    self._listed.splits if self._listed else {}
                ).items()
            },
            "config": build.config_without_hosts(self._config),
            "metric_split": self._metric_split,
        }
        self._checkpoints.save(step, self._state, meta)

    def _scores(self) -> dict[str, dict[str, Any]]:
        """The newest scores of each test split."""
        lines = run_directory.read_metrics(self._workdir)
        # `--mode eval` adds lines of other protocols and checkpoints.
        wanted = ("center", self._total_steps)
        return {
            x["split"]: x for x in lines if (x.get("protocol"), x["step"]) == wanted
        }


def _summary(
    scores: dict[str, dict[str, Any]],
    workdir: Path,
    *,
    best: str,
    warnings: Sequence[str],
):
    for split, numbers in scores.items():
        yield f"{split:>12}: {training_log.describe_scores(numbers)}"
        warning = accuracy.describe_chance(numbers) if split == "test" else ""
        if warning:
            yield f"warning: {warning}"
    yield from warnings
    if best:
        yield f"checkpoint `best`: {best}"
    yield f"run directory: {workdir}"


def _describe(config: build.Config, dataset: Dataset, data: Data):
    sizes = ", ".join(f"{name} {len(s.labels)}" for name, s in data.tests.items())
    train = len(dataset.splits["train"])
    yield (
        f"{config.model.kind} with {config.model.backbone} in "
        f"{devices.compute_dtype(config.model.dtype)} on "
        f"{devices.describe_devices()}; {dataset.name}: "
        f"{len(dataset.class_names)} classes, train {train}, {sizes} images"
    )
    if data.batches.dropped_per_epoch:
        yield (
            f"each epoch skips {data.batches.dropped_per_epoch} random training "
            "images, which do not fill a batch"
        )
    if data.images:
        yield data.images.about

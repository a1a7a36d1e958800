"""Runs the study "Does contrastive reinforcement help?" and writes `docs/study.md`.

    python -m benchmarks.study --jobs 2
    python -m benchmarks.study --groups main ablations --cub DIR --cars DIR
    python -m benchmarks.study --table

Each run is a process of `launch.py` with its own run directory. The same command
resumes an interrupted study. A finished run adds a line to `docs/study/results.jsonl`.
While the settings of the row stay the same, no machine repeats that run. The page and
its figures are computed from this file alone.
"""

import argparse
import concurrent.futures
import hashlib
import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.study import page
from benchmarks.study import rows as rows_module
from benchmarks.study.results import Line, Lines, to_hex
from benchmarks.study.rows import BY_NAME, GROUPS, KEEPING, Row, settings_of
from cra_jax.reports import run_summary
from cra_jax.runtime import provenance, run_directory

ROOT = Path(__file__).resolve().parents[2]
PROTOCOL = "center"
_MEASURE = (
    "import json, sys; from pathlib import Path; "
    "from benchmarks.study import class_leak; "
    "print(json.dumps(class_leak.measure(Path(sys.argv[1]))))"
)


class Job(NamedTuple):
    """One run of a row.

    Attributes:
      row: row of the run.
      seed: seed of the run.
      workdir: run directory; its name contains the start of the fingerprint.
      fingerprint: fingerprint of the settings.
      command: command that trains or resumes the run.
    """

    row: Row
    seed: int
    workdir: Path
    fingerprint: str
    command: list[str]

    @property
    def key(self) -> tuple[str, int, str]:
        """Key of the line of this run in `Lines`."""
        return self.row.name, self.seed, self.fingerprint


def job_of(row: Row, seed: int, root: Path, path: str = "") -> Job:
    """Builds the job of a row and a seed.

    Args:
      row: row of the run.
      seed: seed of the run.
      root: directory of the run directories.
      path: path of the dataset, for photographs.
    """
    fingerprint = rows_module.fingerprint(settings_of(row, seed=seed, path=path))
    workdir = root / f"{row.name}-seed{seed}-{fingerprint[:6]}"
    changes = {**KEEPING, **row.changes, "seed": seed}
    changes |= {"data.path": path} if path else {}
    config = f"{ROOT}/configs/{row.config}.py"
    config += f":{row.variant}" if row.variant else ""
    command = [sys.executable, str(ROOT / "launch.py"), f"--workdir={workdir}"]
    # The directory's name has the fingerprint of all settings that change the scores;
    # the others may change.
    command += [f"--config={config}", "--allow_config_change"]
    command += [f"--config.{key}={value}" for key, value in changes.items()]
    return Job(row, seed, workdir, fingerprint, command)


def jobs_in_order(
    rows: Iterable[Row], *, seeds: Sequence[int] | None, root: Path, paths: dict
) -> list[Job]:
    """Sorts all runs by group, then seed, then row.

    An interrupted study then has about the same number of runs for each row.
    """
    order = list(GROUPS)
    wanted = [
        (order.index(row.group), seed, position, row)
        for position, row in enumerate(rows)
        for seed in (range(row.seeds) if seeds is None else seeds)
    ]
    wanted.sort(key=lambda x: x[:3])
    return [
        job_of(row, seed, root, paths.get(row.config, "")) for _, seed, _, row in wanted
    ]


def is_finished(workdir: Path) -> bool:
    """Whether a run was evaluated at its last epoch and its checkpoint was saved.

    The recorded end of the process is not used: a run that is stopped in its last step
    is complete.
    """
    if not (workdir / "config.json").is_file():
        return False
    epochs = run_directory.read_config(workdir)["train"]["epochs"]
    scored = run_summary.latest_scores(run_directory.read_metrics(workdir))
    return bool(scored) and all(
        line["epoch"] == epochs
        and (workdir / "checkpoints" / str(line["step"])).is_dir()
        for line in scored
    )


def line_of(job: Job) -> Line:
    """Collects the results of a finished run.

    Returns:
      ``row``, ``seed``, ``fingerprint``; ``commit``, ``machine``, ``jax`` and
      ``seconds`` of training; ``train``, the last training metrics; and for each test
      split its scores, with ``names``, a digest of its images, and ``right``, whether
      each image is classified correctly, encoded by `to_hex`.

    Raises:
      ValueError: the run is not finished, or its settings differ from the row's.
    """
    workdir = job.workdir
    settings = run_directory.flatten(run_directory.read_config(workdir))
    found = rows_module.fingerprint(settings)
    if found != job.fingerprint or settings["seed"] != job.seed:
        raise ValueError(
            f"{workdir} was trained with other settings than those of row "
            f"{job.row.name}: move it to another place"
        )
    if not is_finished(workdir):
        raise ValueError(f"{workdir} is not finished: run the same command again")
    lines = run_directory.read_metrics(workdir)
    start = provenance.read(workdir)[-1]
    seconds, _ = run_summary.training_time(lines, settings["train.batch_size"])
    trained = [x for x in lines if x["split"] == "train"][-1]
    line: Line = {
        "row": job.row.name,
        "seed": job.seed,
        "fingerprint": found,
        "commit": provenance.describe_commit(start["code"]),
        "machine": f"{start['system']}; {start['devices']}",
        "jax": start["versions"]["jax"],
        "seconds": round(seconds, 1),
        "train": _numbers(trained),
    }
    for scores in run_summary.latest_scores(lines):
        if scores["protocol"] == PROTOCOL:
            split = scores["split"]
            results = run_directory.read_results(workdir, split, PROTOCOL)
            right = [r.predicted == r.label for r in results]
            names = json.dumps([(r.name, r.label) for r in results])
            line[split] = {
                **_numbers(scores),
                "names": hashlib.sha256(names.encode()).hexdigest()[:12],
                "right": to_hex(right),
            }
    return line


def _numbers(line: Line) -> dict[str, float]:
    """Scores of a line, to six digits, without steps and speeds."""
    excluded = ("step", "epoch", "images_per_second", "eta_seconds")
    return {
        key: float(f"{value:.6g}") if isinstance(value, float) else value
        for key, value in line.items()
        if isinstance(value, int | float) and key not in excluded
    }


class Runner:
    """Runs jobs in parallel, each in its own process.

    Args:
      lines: results, to which finished runs are added.
      threads: CPU threads of a process; 0: one per core.
      leak: whether to measure the class information in Gamma as well.
    """

    def __init__(self, lines: Lines, *, threads: int, leak: bool = True):
        self._lines = lines
        self._leak = leak
        self._environment = dict(os.environ)
        if threads:
            flags = self._environment.get("XLA_FLAGS", "")
            if threads == 1:
                flags += " --xla_cpu_multi_thread_eigen=false"
            flags += f" intra_op_parallelism_threads={threads}"
            self._environment["XLA_FLAGS"] = flags.strip()
        self._running: set[subprocess.Popen] = set()
        self._lock = threading.Lock()
        self._stopping = False

    def run(self, jobs: Sequence[Job], *, parallel: int) -> list[str]:
        """Runs the missing jobs; returns the names of the runs that failed."""
        failed = []
        pool = concurrent.futures.ThreadPoolExecutor(parallel)
        try:
            futures = {pool.submit(self._run_job, job): job for job in jobs}
            for future in concurrent.futures.as_completed(futures):
                line, job = future.result(), futures[future]
                if line is None:
                    failed.append(job.workdir.name)
                elif line != self._lines.get(job.key):
                    self._lines.put(line)
                    print(f"{job.workdir.name}: {page.summarize(line)}", flush=True)
        finally:
            # After Ctrl-C, each process saves a checkpoint at its next step.
            with self._lock:
                self._stopping = True
                for process in self._running:
                    process.terminate()
            pool.shutdown(cancel_futures=True)
        return failed

    def _run_job(self, job: Job) -> Line | None:
        """Returns the line of a run, after training if needed; None if it failed."""
        line = self._lines.get(job.key)
        if line is None:
            if not is_finished(job.workdir):
                print(f"{job.workdir.name}: {shlex.join(job.command)}", flush=True)
                if self._call(job, job.command) is None:
                    return None
            try:
                line = line_of(job)
            except ValueError as error:
                print(f"{job.workdir.name}: {error}", flush=True)
                return None
        return self._with_leak(job, line)

    def _with_leak(self, job: Job, line: Line) -> Line:
        """Adds the scores of `class_leak`, if the run directory is present."""
        known = any(key.startswith("leak_") for key in line)
        has_no_ar = job.row.kind == "baseline"
        if known or has_no_ar or not self._leak or not is_finished(job.workdir):
            return line
        output = self._call(job, [sys.executable, "-c", _MEASURE, str(job.workdir)])
        if output is None:
            return line
        numbers = _numbers(json.loads(output.strip().splitlines()[-1]))
        return line | {f"leak_{key}": value for key, value in numbers.items()}

    def _call(self, job: Job, command: Sequence[str]) -> str | None:
        """Runs a command and returns its output; None if it failed.

        Messages on standard error go to `study.log` in the run directory.
        """
        job.workdir.mkdir(parents=True, exist_ok=True)
        log = job.workdir / "study.log"
        with open(log, "a") as log_file:
            with self._lock:
                if self._stopping:
                    return None
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=self._environment,
                    stdout=subprocess.PIPE,
                    stderr=log_file,
                    text=True,
                )
                self._running.add(process)
            output, _ = process.communicate()
            with self._lock:
                self._running.discard(process)
        if process.returncode:
            print(
                f"{job.workdir.name}: ended with status {process.returncode}, see "
                f"{log}; the same command runs it again",
                flush=True,
            )
            return None
        return output


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--only", nargs="+", choices=BY_NAME, metavar="ROW")
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        help="seeds of every row (default: as many as the row has)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count(),
        help="runs in parallel (default: one per core)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="threads per run; 0: one per core (default 1)",
    )
    parser.add_argument(
        "--cub",
        default="",
        help="directory CUB_200_2011; without it, its rows are skipped",
    )
    parser.add_argument(
        "--cars", default="", help="directory of Stanford Cars; the same"
    )
    parser.add_argument("--root", type=Path, default=Path("runs/study"))
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument(
        "--no_leak",
        action="store_true",
        help="do not measure the class information in Gamma",
    )
    parser.add_argument("--dry_run", action="store_true", help="list the missing runs")
    parser.add_argument("--table", action="store_true", help="only write the page")
    arguments = parser.parse_args(argv)
    for name in ("cub", "cars"):
        path = getattr(arguments, name)
        setattr(arguments, name, str(Path(path).resolve()) if path else "")
    if arguments.jobs < 1 or arguments.threads < 0:
        parser.error("--jobs must be 1 or more, --threads 0 or more")
    arguments.root = arguments.root.resolve()
    return arguments

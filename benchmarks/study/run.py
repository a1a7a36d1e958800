"""Does contrastive reinforcement help? Trials, run and told: `docs/study.md`.

    python -m benchmarks.study --jobs 2
    python -m benchmarks.study --groups main ablations --cub DIR --cars DIR
    python -m benchmarks.study --table

Each run is `launch.py` in a process and a folder of its own; the same command goes on
where it was stopped. A run that ends leaves one line in `docs/study/results.jsonl`;
there, on any machine, it counts as done as long as its settings are the row's. The page
and its figures come from those lines alone.
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
      row: which.
      seed: of the run.
      workdir: its run directory, named by its settings, too.
      fingerprint: of its settings.
      command: that trains it, or goes on.
    """

    row: Row
    seed: int
    workdir: Path
    fingerprint: str
    command: list[str]

    @property
    def key(self) -> tuple[str, int, str]:
        """What tells its line from all others."""
        return self.row.name, self.seed, self.fingerprint


def job_of(row: Row, seed: int, root: Path, path: str = "") -> Job:
    """What runs a row with a seed.

    Args:
      row: which.
      seed: of the run.
      root: the folder of the run directorys.
      path: of the data set, for photographs.
    """
    fingerprint = rows_module.fingerprint(settings_of(row, seed=seed, path=path))
    workdir = root / f"{row.name}-seed{seed}-{fingerprint[:6]}"
    changes = {**KEEPING, **row.changes, "seed": seed}
    changes |= {"data.path": path} if path else {}
    config = f"{ROOT}/configs/{row.config}.py"
    config += f":{row.variant}" if row.variant else ""
    command = [sys.executable, str(ROOT / "launch.py"), f"--workdir={workdir}"]
    # What matters of its config is in the folder's name; the rest may have changed.
    command += [f"--config={config}", "--allow_config_change"]
    command += [f"--config.{key}={value}" for key, value in changes.items()]
    return Job(row, seed, workdir, fingerprint, command)


def jobs_in_order(
    rows: Iterable[Row], *, seeds: Sequence[int] | None, root: Path, paths: dict
) -> list[Job]:
    """All runs: group by group, and in each the first seed of all rows comes first.

    A study that is stopped has then about as many runs of each row.
    """
    order = list(GROUPS)
    wanted = [
        (order.index(row.group), seed, place, row)
        for place, row in enumerate(rows)
        for seed in (range(row.seeds) if seeds is None else seeds)
    ]
    wanted.sort(key=lambda x: x[:3])
    return [
        job_of(row, seed, root, paths.get(row.config, "")) for _, seed, _, row in wanted
    ]


def is_finished(workdir: Path) -> bool:
    """Whether a run directory's run has been scored at its last epoch, and saved.

    How its last start ended says less: one that is stopped in its last step is whole.
    """
    if not (workdir / "config.json").is_file():
        return False
    epochs = run_directory.read_config(workdir)["train"]["epochs"]
    scored = run_summary.newest(run_directory.read_metrics(workdir))
    return bool(scored) and all(
        line["epoch"] == epochs
        and (workdir / "checkpoints" / str(line["step"])).is_dir()
        for line in scored
    )


def line_of(job: Job) -> Line:
    """What a finished run's numbers are.

    Returns:
      ``row``, ``seed``, ``fingerprint``; ``commit``, ``machine``, ``jax`` and
      ``seconds`` of training; ``train``, the last numbers of training; and for each
      test split its scores, with ``names``, a digest of its images, and ``right``,
      a bit an image in hexadecimal digits, the first image's bit the highest.

    Raises:
      ValueError: the run is not finished, or its settings are not the row's.
    """
    workdir = job.workdir
    settings = run_directory.flatten(run_directory.read_config(workdir))
    found = rows_module.fingerprint(settings)
    if found != job.fingerprint or settings["seed"] != job.seed:
        raise ValueError(
            f"{workdir} was trained with other settings than {job.row.name} asks for: "
            "move it away"
        )
    if not is_finished(workdir):
        raise ValueError(f"{workdir} is not finished: the same command goes on")
    lines = run_directory.read_metrics(workdir)
    start = provenance.read(workdir)[-1]
    seconds, _ = run_summary.time_trained(lines, settings["train.batch_size"])
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
    for scores in run_summary.newest(lines):
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
    """The numbers of a line, to six digits; steps and rates of work are no result."""
    left_out = ("step", "epoch", "images_per_second", "eta_seconds")
    return {
        key: float(f"{value:.6g}") if isinstance(value, float) else value
        for key, value in line.items()
        if isinstance(value, int | float) and key not in left_out
    }


class Runner:
    """Runs jobs side by side, each in a process of so many threads.

    Args:
      lines: where finished runs are told.
      threads: of a process, on a CPU; 0: as many as there are cores.
      leak: whether what N_ar knows without the bird is measured as well.
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

    def run(self, jobs: Sequence[Job], *, side_by_side: int) -> list[str]:
        """Runs what is missing; returns the names of runs that failed."""
        failed = []
        pool = concurrent.futures.ThreadPoolExecutor(side_by_side)
        try:
            futures = {pool.submit(self._one, job): job for job in jobs}
            for future in concurrent.futures.as_completed(futures):
                line, job = future.result(), futures[future]
                if line is None:
                    failed.append(job.workdir.name)
                elif line != self._lines.get(job.key):
                    self._lines.put(line)
                    print(f"{job.workdir.name}: {page.in_short(line)}", flush=True)
        finally:
            # After Ctrl-C: each process saves at its next step, and goes on next time.
            with self._lock:
                self._stopping = True
                for process in self._running:
                    process.terminate()
            pool.shutdown(cancel_futures=True)
        return failed

    def _one(self, job: Job) -> Line | None:
        """The line of a run, trained where that is missing; None: it failed."""
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
        """Adds what N_ar makes of noise, where the run's folder is at hand."""
        known = any(key.startswith("leak_") for key in line)
        has_none = job.row.kind == "baseline"
        if known or has_none or not self._leak or not is_finished(job.workdir):
            return line
        said = self._call(job, [sys.executable, "-c", _MEASURE, str(job.workdir)])
        if said is None:
            return line
        numbers = _numbers(json.loads(said.strip().splitlines()[-1]))
        return line | {f"leak_{key}": value for key, value in numbers.items()}

    def _call(self, job: Job, command: Sequence[str]) -> str | None:
        """What a command prints; None where it failed. Its words go to `study.log`."""
        job.workdir.mkdir(parents=True, exist_ok=True)
        log = job.workdir / "study.log"
        with open(log, "a") as words:
            with self._lock:
                if self._stopping:
                    return None
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=self._environment,
                    stdout=subprocess.PIPE,
                    stderr=words,
                    text=True,
                )
                self._running.add(process)
            said, _ = process.communicate()
            with self._lock:
                self._running.discard(process)
        if process.returncode:
            print(
                f"{job.workdir.name}: ended with {process.returncode}, see {log}; the "
                "same command tries again",
                flush=True,
            )
            return None
        return said


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--only", nargs="+", choices=BY_NAME, metavar="ROW")
    parser.add_argument("--seeds", nargs="+", type=int, help="else as the row has it")
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count(),
        help="runs side by side (default: one a core)",
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="of a run; 0: all cores (default 1)"
    )
    parser.add_argument(
        "--cub", default="", help="folder CUB_200_2011; without: left out"
    )
    parser.add_argument("--cars", default="", help="folder of Stanford Cars; the same")
    parser.add_argument("--root", type=Path, default=Path("runs/study"))
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    parser.add_argument(
        "--no_leak",
        action="store_true",
        help="leave what N_ar knows without the bird to the next time",
    )
    parser.add_argument("--dry_run", action="store_true", help="list what is missing")
    parser.add_argument("--table", action="store_true", help="run nothing")
    arguments = parser.parse_args(argv)
    for name in ("cub", "cars"):
        path = getattr(arguments, name)
        setattr(arguments, name, str(Path(path).resolve()) if path else "")
    if arguments.jobs < 1 or arguments.threads < 0:
        parser.error("--jobs must be 1 or more, --threads 0 or more")
    arguments.root = arguments.root.resolve()
    return arguments

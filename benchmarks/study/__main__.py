"""`python -m benchmarks.study`."""

import contextlib
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.study import cars_subset, page, run
from benchmarks.study.results import Lines
from benchmarks.study.rows import BY_NAME, ROWS
from benchmarks.study.run import Runner
from cra_jax.runtime import run_directory


def main(argv: Sequence[str] | None = None) -> int:
    arguments = run.parse(argv)
    lines = Lines(arguments.docs / "study" / "results.jsonl")
    failed = []
    if not arguments.table:
        rows = [
            row
            for row in (
                ROWS if not arguments.only else map(BY_NAME.get, arguments.only)
            )
            if row and (arguments.only or row.group in arguments.groups)
        ]
        paths = {"cub": arguments.cub, "cars": arguments.cars}
        for name in sorted({row.config for row in rows} & paths.keys()):
            if not paths[name]:
                print(f"the rows on {name} are skipped: --{name} DIR runs them")
                rows = [row for row in rows if row.config != name]
        cars_list = cars_subset.file_in(arguments.root)
        paths["cars"] = str(cars_list)
        jobs = run.jobs_in_order(
            rows, seeds=arguments.seeds, root=arguments.root, paths=paths
        )
        if arguments.dry_run:
            missing = [job for job in jobs if not lines.get(job.key)]
            for job in missing:
                print(shlex.join(job.command))
            print(f"{len(missing)} of {len(jobs)} runs are missing")
            return 0
        with run_directory.locked(arguments.root), contextlib.ExitStack() as stack:
            if any(row.config == "cars" for row in rows):
                cars_subset.write(Path(arguments.cars), cars_list)
            stack.callback(page.write, lines, arguments.docs)
            runner = Runner(
                lines, threads=arguments.threads, leak=not arguments.no_leak
            )
            failed = runner.run(jobs, parallel=arguments.jobs)
    else:
        page.write(lines, arguments.docs)
    print(f"written: {arguments.docs / 'study.md'}")
    if failed:
        print(f"not finished: {', '.join(failed)}")
    return 1 if failed else 0


def _terminated(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _terminated)
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command resumes")

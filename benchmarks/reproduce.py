"""Runs the cells of the paper's tables and compares them with the paper.

    python -m benchmarks.reproduce --cars stanford_cars
    python -m benchmarks.reproduce --only cub-resnet50-cra cub-resnet50-baseline
    python -m benchmarks.reproduce --dry_run

Table 1 has eight cells, each a training of 140 epochs. "ours" of Tables 2 and 3 are
four of the same networks under the other protocol. The same command resumes an
interrupted run and skips finished cells.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from cra_jax.model import KINDS
from cra_jax.reports import html_page, paper_results, run_summary, uncertainty
from cra_jax.runtime import files, run_directory

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = 140  # train.epochs of configs/cub.py
TRAIN_IMAGES = {"cub": 5994, "cars": 8144}
# GFLOP of a training step per image of 448 px, forward and backward: one ResNet at 448
# px, and for CRA-CNN two passes of another at 224 px, which adds half as much.
CRA_GFLOP = {"resnet50": 147, "resnet101": 281}
BASELINE_SHARE = 2 / 3


class Cell(NamedTuple):
    """One training of Table 1.

    Attributes:
      data: "cub" or "cars".
      backbone: value of `model.backbone`.
      kind: "baseline" or "cra".
    """

    data: str
    backbone: str
    kind: str

    @property
    def name(self) -> str:
        """Name of the cell and of its run directory."""
        return "-".join(self)

    @property
    def flop(self) -> float:
        """FLOP of the whole training, by arithmetic."""
        share = 1 if self.kind == "cra" else BASELINE_SHARE
        images = TRAIN_IMAGES[self.data] * EPOCHS
        return 1e9 * CRA_GFLOP[self.backbone] * share * images


CELLS = [Cell(*row[1:4]) for row in paper_results.ROWS if row.table == "Table 1"]


def commands(
    cell: Cell, workdir: Path, *, seed: int, path: str, settings: Sequence[str]
) -> list[list[str]]:
    """Commands of a cell: training, evaluation by both protocols, and report.

    Args:
      cell: the cell.
      workdir: its run directory.
      seed: seed of the run.
      path: path of the dataset; if empty, CUB is downloaded.
      settings: additional flags, such as "--config.train.epochs=1".
    """
    launch = [sys.executable, str(ROOT / "launch.py"), f"--workdir={workdir}"]
    variant = cell.backbone + (",baseline" if cell.kind == "baseline" else "")
    train = [f"--config={ROOT}/configs/{cell.data}.py:{variant}"]
    train += [f"--config.seed={seed}"]
    train += [f"--config.data.path={path}"] if path else []
    both = ["--mode=eval", "--config.eval.protocol=both"]
    return [[*launch, *train, *settings], [*launch, *both], [*launch, "--mode=report"]]


def run_cell(workdir: Path, cell_commands: Sequence[Sequence[str]]) -> bool:
    """Runs a cell, unless the same commands have finished before.

    Returns:
      Whether the cell is finished.
    """
    finished = workdir / "reproduced.json"
    wanted = [list(command[1:]) for command in cell_commands]
    if finished.is_file() and json.loads(finished.read_text()) == wanted:
        print(f"{workdir.name}: finished before", flush=True)
        return True
    for command in cell_commands:
        print(f"{workdir.name}: {shlex.join(command)}", flush=True)
        if subprocess.run(command, cwd=ROOT).returncode:
            print(f"{workdir.name}: failed; run the same command again", flush=True)
            return False
    files.write_atomically(finished, json.dumps(wanted, indent=2) + "\n")
    return True


def accuracies(
    workdirs: Iterable[Path], protocol: str
) -> tuple[list[float], list[str]]:
    """Top-1 on `test` of the finished runs, and remarks about other settings."""
    found, remarks = [], []
    for workdir in workdirs:
        if not (workdir / "reproduced.json").is_file():
            continue
        settings = run_directory.read_config(workdir)
        for line in run_summary.latest_scores(run_directory.read_metrics(workdir)):
            if (line["split"], line["protocol"]) != ("test", protocol):
                continue
            found.append(line["top1"])
            images = paper_results.TEST_IMAGES.get(settings["data"]["source"])
            epochs = settings["train"]["epochs"]
            if line["count"] != images or epochs != EPOCHS:
                remarks.append(
                    f"{workdir.name}: {line['count']} test images of "
                    f"{settings['data']['source']}, {epochs} epochs, "
                    f"{settings['model']['backbone']} of width "
                    f"{settings['model']['width']}: not the paper's experiment"
                )
    return found, remarks


def table(root: Path, seeds: Sequence[int], *, tflops: float) -> str:
    """The paper's tables and the results of the runs, as Markdown.

    Args:
      root: directory of the run directories.
      seeds: seeds of the runs.
      tflops: sustained TFLOP/s, from which the hours are computed.
    """
    rows = []
    remarks: list[str] = []
    for row in paper_results.ROWS:
        cell = Cell(*row[1:4])
        folders = _folders(root, cell, seeds)
        found, cell_remarks = accuracies(folders, row.protocol)
        remarks += [x for x in cell_remarks if x not in remarks]
        begun = any((folder / "config.json").is_file() for folder in folders)
        ours = "not finished" if begun else "not run"
        if found:
            spread = uncertainty.spread(found)
            ours = html_page.percent(spread.mean)
            ours += (
                f" ± {html_page.percent(spread.sd)}" if spread.sd is not None else ""
            )
            ours += " *" if cell_remarks else ""
        hours = cell.flop / (tflops * 1e12) / 3600
        cost = f"{hours:.1f}" if row.table == "Table 1" else "as in Table 1"
        rows.append(
            (
                *(row.table, paper_results.NAMES[row.data], row.backbone),
                *(KINDS[row.kind], row.protocol, html_page.percent(row.top1)),
                *(ours, str(len(found)), cost),
            )
        )
    head = ("table", "dataset", "backbone", "kind", "protocol", "paper, %")
    head += ("this code, %", "runs", "hours per run, estimated")
    total = sum(cell.flop for cell in CELLS)
    lines = [
        html_page.markdown_table(head, rows),
        "",
        "The last column is an estimate, not a measurement: GFLOP of a step per "
        f"image ({CRA_GFLOP['resnet50']} and {CRA_GFLOP['resnet101']} for CRA-CNN, "
        f"two thirds for the baseline), times training images, times {EPOCHS} "
        "epochs, at "
        f"{tflops:g} TFLOP/s sustained. All eight cells: {total:.2g} FLOP, "
        f"{total / (tflops * 1e12) / 3600:.0f} hours.",
        *([""] if remarks else []),
        *(f"- * {remark}" for remark in remarks),
    ]
    return "\n".join(lines) + "\n"


def _folders(root: Path, cell: Cell, seeds: Sequence[int]) -> list[Path]:
    return [root / f"{cell.name}-seed{seed}" for seed in seeds]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the flags, which may include config flags of `launch.py`."""
    parser = argparse.ArgumentParser(
        description="Runs the cells of the paper's tables and compares them with the "
        "paper. --config.KEY=VALUE is passed to every training.",
    )
    names = [cell.name for cell in CELLS]
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="CELL", help=", ".join(names)
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--cub", default="", help="directory CUB_200_2011; if empty, it is downloaded"
    )
    parser.add_argument(
        "--cars",
        default="",
        help="directory of Stanford Cars, which cannot be downloaded",
    )
    parser.add_argument("--root", type=Path, default=Path("runs/reproduce"))
    parser.add_argument(
        "--tflops",
        type=float,
        default=20,
        help="sustained TFLOP/s, for the estimated hours (default 20; PyTorch with "
        "mixed precision reaches 60 with ResNet-50 on an A100)",
    )
    parser.add_argument("--dry_run", action="store_true", help="list the commands")
    parser.add_argument("--table", action="store_true", help="only print the table")
    arguments, settings = parser.parse_known_args(argv)
    for setting in settings:
        if not setting.startswith("--config.") or "=" not in setting:
            parser.error(f"{setting!r} is not a flag: give --config.KEY=VALUE")
    for name in ("cub", "cars"):
        path = getattr(arguments, name)
        setattr(arguments, name, str(Path(path).resolve()) if path else "")
    arguments.root = arguments.root.resolve()
    return argparse.Namespace(**vars(arguments), settings=settings)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)
    cells = [c for c in CELLS if not arguments.only or c.name in arguments.only]
    failed = []
    other_source = any(
        x.startswith("--config.data.source=") for x in arguments.settings
    )
    for cell in () if arguments.table else cells:
        path = getattr(arguments, cell.data)
        for seed, workdir in zip(
            arguments.seeds,
            _folders(arguments.root, cell, arguments.seeds),
            strict=True,
        ):
            lines = commands(
                cell, workdir, seed=seed, path=path, settings=arguments.settings
            )
            if arguments.dry_run:
                print("\n".join(map(shlex.join, lines)))
            elif cell.data == "cars" and not path and not other_source:
                print(f"{workdir.name}: skipped: give the directory of Cars by --cars")
                failed.append(workdir.name)
            elif not run_cell(workdir, lines):
                failed.append(workdir.name)
    text = table(arguments.root, arguments.seeds, tflops=arguments.tflops)
    print(f"\n{text}")
    if not arguments.dry_run:
        arguments.root.mkdir(parents=True, exist_ok=True)
        files.write_atomically(arguments.root / "table.md", text)
        print(f"written: {arguments.root / 'table.md'}")
    if failed:
        print(f"not finished: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("stopped; the same command resumes")

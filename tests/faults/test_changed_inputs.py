"""Data, configs and links that are not what the run was made with."""

import json
import random

import pytest

from cra_jax.datasets import sources
from cra_jax.inference import run_options
from cra_jax.input import splits
from cra_jax.runtime import config_rules, files, run_directory
from cra_jax.runtime.run_directory import flatten
from cra_jax.training import build, check_config, resume
from tests.helpers import tiny_config

ROUNDS = 40


def _change(root, rng: random.Random) -> str:
    """Changes one image of class folders at random; returns what was done."""
    images = sorted(root.glob("*/*.png"))
    one = rng.choice(images)
    what = rng.choice(["removed", "added", "replaced", "renamed", "moved"])
    if what == "removed":
        one.unlink()
    elif what == "added":
        (one.parent / f"new{rng.random()}.png").write_bytes(rng.randbytes(40))
    elif what == "replaced":
        one.write_bytes(rng.randbytes(len(one.read_bytes())))
    elif what == "renamed":
        one.rename(one.parent / f"renamed{rng.random()}.png")
    else:
        folders = sorted(x for x in root.iterdir() if x != one.parent)
        one.rename(rng.choice(folders) / f"moved{rng.random()}.png")
    return what


def test_a_changed_image_is_found_and_no_trained_image_is_tested(tmp_path, note):
    """The class folders have no test split of their own: it is drawn again."""
    fault = "an image is added, removed, renamed, moved or replaced before a resume"
    for number in range(ROUNDS):
        rng = random.Random(number)
        root = tmp_path / f"{number}"
        for label in "abc":
            (root / label).mkdir(parents=True)
            for i in range(8):
                (root / label / f"{i}.png").write_bytes(rng.randbytes(40))
        run = tmp_path / f"run{number}"
        run.mkdir()
        dataset = sources.load("folder", root)
        first = resume.check_data(dataset, {}, run, allow_change=False)
        trained = {image.digest for image in first.listed.splits["train"]}
        before = {
            "step": 3,
            "class_names": list(dataset.class_names),
            "data": {x: splits.digest(y) for x, y in first.listed.splits.items()},
            "kept": first.listed.to_json(),
        }
        for _ in range(rng.randint(1, 4)):
            _change(root, rng)
            dataset = sources.load("folder", root)
            with pytest.raises(ValueError, match="has changed since step 3"):
                resume.check_data(dataset, before, run, allow_change=False)
            now = resume.check_data(dataset, before, run, allow_change=True)
            tested = {image.digest for image in now.listed.splits["test"]}
            assert not tested & trained
            trained |= {image.digest for image in now.listed.splits["train"]}
            before["kept"] = json.loads(json.dumps(now.listed.to_json()))
            note(
                fault,
                "an error that names it; with `--allow_data_change` training resumes, "
                "and no image that was trained on is tested",
            )


def test_a_config_of_another_version_is_an_error(tmp_path, note):
    fault = "a key of a run's config has a value of another kind"
    config = tiny_config.config(tmp_path).to_dict()
    for key in config_rules.RULES:
        section, _, name = key.rpartition(".")
        for value in (None, [None], {"new": 1}):
            changed = json.loads(json.dumps(config))
            (changed[section] if section else changed)[name] = value
            (tmp_path / "config.json").write_text(json.dumps(changed))
            message = "the key is not used, or has the value of this version"
            try:
                defaults = tiny_config.config(tmp_path)
                build.config_of_run(tmp_path, defaults, {})
                run_options.options_of_run(tmp_path)
            except ValueError as error:
                message = str(error)
            named = key in message
            assert named or message.startswith("the key is not used")
            note(fault, "an error that names the key" if named else message)


def test_a_value_out_of_range_is_an_error(tmp_path, note):
    fault = "a config key has a value out of its range"
    for key, rule in config_rules.RULES.items():
        for value in (rule.low - 1, rule.high + 1, float("nan")):
            config = tiny_config.config(tmp_path)
            section, _, name = key.rpartition(".")
            default = flatten(config.to_dict())[key]
            if rule.kind in (bool, str):
                continue
            if isinstance(default, int) and abs(value) < float("inf"):
                value = int(value)
            part = config[section] if section else config
            with config.ignore_type():
                part[name] = (value,) * rule.length if rule.length else value
            with pytest.raises(ValueError, match=f"{key}=.* must be"):
                check_config.check(config)
            note(fault, "an error that names key, value and range, before any work")


@pytest.mark.parametrize(
    "at",
    [
        *(
            "lock",
            run_directory.METRICS,
            run_directory.IMAGES,
            "config.json",
            "results",
        ),
        *(".predictions.jsonl.partial", "overlays", "export", "report", "checkpoints"),
        *("provenance.json", "attention.jsonl", "tensorboard", "results/test-full.csv"),
    ],
)
def test_a_link_out_of_a_run_directory_is_refused(tmp_path, note, at):
    home, run = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    (run / at).parent.mkdir(parents=True)
    (run / at).symlink_to(home)
    with pytest.raises(ValueError, match="is a link to"):
        files.check_no_links_out(run)
    assert not list(home.iterdir())
    note("a link in a run directory leads out of it", "an error that names the link")

"""Reads folders of images: image files, classes and splits.

Without splits, a random share of each class is used for testing. No image is opened,
and no order depends on the file system.
"""

import collections
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from cra_jax.datasets import listing
from cra_jax.datasets.listing import Entry, Listing, Skipped, Splits, some

LAYOUT = (
    "expected train/ and test/ (or val/), each with one folder of images per class; or"
    " only the folders of the classes, from which a test share is drawn"
)
"""Expected layout on disk; for messages."""

# Words in names of folders that do not hold the images of a class.
_ANNOTATIONS = frozenset(
    {"annotation", "annotations", "labels", "trimaps", "xmls", "bboxes", "groundtruth"}
    | {"imagesets", "segmentations", "segmentationclass", "segmentationobject"}
)
# These may also be classes, unless a folder such as images/ is beside them.
_MAY_ANNOTATE = frozenset(
    {"label", "mask", "masks", "segmentation", "gt", "xml", "json", "meta"}
)

_Classes = dict[str, list[Path]]


def class_folders(path: Path, *, seed: int = 0, test_share: float = 0.2) -> Listing:
    """Lists class folders in `train/`, `test/` and `val/`, or class folders alone.

    Other usual names of the splits are known, see `listing.split_of`; each class folder
    may have the splits inside instead. Without splits, a random share of each class is
    used for testing: at least one image of a class that has two, the same for the same
    seed and file names.

    Returns:
      The splits that are there: "train", "test" and "val" (which is "test" if there is
      no other).

    Raises:
      ValueError: no such folders, no images, a class of another split without a
        training folder, or folders that do not look like classes.
    """
    root = path
    for _ in range(2):  # archives often have one extra outer folder
        only = listing.sub_folders(root)
        if len(only) == 1 and not _split_folders(root):
            root = only[0]
    skipped, notes = Skipped(), []
    folders = _split_folders(root)
    if set(folders) == {"train"}:
        raise ValueError(
            f"{root}: only {folders['train'].name}/ is here; {LAYOUT} (then set the"
            " path to that folder)"
        )
    if folders:
        inner = {split: _inner(folder) for split, folder in folders.items()}
        groups = {split: _classes(f, skipped) for split, f in inner.items()}
        notes += _merged(inner, groups)
        here = listing.sub_folders(root, skipped)
        unused = [f.name for f in here if f not in folders.values()]
        if unused:
            notes.append(f"folders of {root} that are ignored: {some(unused)}")
    else:
        groups = _splits_in_classes(root, skipped)
    if groups:
        groups, renamed = listing.test_split(groups, str(root))
        notes += renamed
        names, splits = _labelled(groups, root)
    else:
        classes = _classes(root, skipped)
        notes += _merged({"train": root}, {"train": classes})
        names, whole = _labelled({"train": classes}, root)
        entries = whole["train"]
        splits = draw_test(root, entries, seed=seed, test_share=test_share)
        notes.append(
            f"no train/ and test/ in {root}: {len(splits['test'])} of {len(entries)}"
            " images were drawn for testing (with data.test_share=1, --mode eval"
            " scores all of them)"
        )
    notes = (*notes, *skipped.notes())
    return Listing(root, tuple(names), splits, notes, drawn=not groups)


def draw_test(
    root: Path, entries: Sequence[Entry], *, seed: int, test_share: float
) -> Splits:
    """Draws a share of each class for testing; both splits keep the order of `entries`.

    See `listing.draw_share`. If the share is 1, there is no training split.

    Raises:
      ValueError: the share is not above 0 and at most 1.
    """
    names = {entry.file: listing.name_below(entry.file, root) for entry in entries}
    drawn = listing.draw_share(
        ((names[entry.file], entry.label) for entry in entries),
        share=test_share,
        seed=seed,
        key="data.test_share",
    )
    splits: Splits = {"train": [], "test": []}
    for entry in entries:
        splits["test" if names[entry.file] in drawn else "train"].append(entry)
    if test_share == 1:
        del splits["train"]
    return splits


def _labelled(
    groups: Mapping[str, _Classes], root: Path
) -> tuple[list[str], dict[str, list[Entry]]]:
    """Class names, and the entries of each split; training has every class."""
    first = "train" if "train" in groups else "test"
    names = list(groups[first])
    for split, classes in groups.items():
        unknown = [name for name in classes if name not in groups[first]]
        if unknown:
            raise ValueError(
                f"{root}: classes of the split {split!r} without a folder in that of"
                f" {first!r}: {some(unknown)}; rename them or add images"
            )
    number = {name: label for label, name in enumerate(names)}
    return names, {
        split: [
            Entry(file, number[name], None)
            for name, files in classes.items()
            for file in files
        ]
        for split, classes in groups.items()
    }


def _classes(folder: Path, skipped: Skipped) -> _Classes:
    """The images of each class folder."""
    found = {}
    class_folders = listing.sub_folders(folder, skipped)
    _check_names(folder, class_folders)
    for class_folder in class_folders:
        name = unicodedata.normalize("NFC", class_folder.name)
        found[name] = listing.image_files(class_folder, skipped)
    for file in folder.iterdir():
        if file.is_file():
            skipped.files["outside the class folders"] += 1
    if not any(found.values()):
        raise ValueError(f"{folder}: no images in folders; {LAYOUT}")
    return found


def _check_names(folder: Path, class_folders: Sequence[Path]) -> None:
    """Checks that the names of folders are different, and can be those of classes."""
    names = [unicodedata.normalize("NFC", f.name) for f in class_folders]
    for name, count in collections.Counter(names).items():
        if count > 1:
            raise ValueError(
                f"{folder}: two folders have the name {name!r} in different Unicode"
                " forms; merge them"
            )
    listing.check_differ(names, str(folder))
    split = {name: listing.split_of(name)[0] for name in names}
    rest = {name: set(listing.split_of(name)[1].split()) for name in names}
    of_images = [n for n in names if not (rest[n] or split[n]) and _has_letters(n)]
    suspected = _ANNOTATIONS | (_MAY_ANNOTATE if of_images else frozenset())
    odd = [n for n, words in rest.items() if words and words <= suspected]
    if odd:
        hint = ""
        if of_images:
            hint = f" (if {of_images[0]}/ holds them, set the path to it)"
        raise ValueError(
            f"{folder}: {some(odd)} is not the name of a class; the images of each"
            f" class belong into a folder with the name of the class{hint}, or list"
            " images and classes in a CSV file, and read that with data.source=csv"
        )


def _merged(folders: Mapping[str, Path], groups: Mapping[str, _Classes]) -> list[str]:
    """A note on folders in class folders, whose images belong to the class around them.

    Raises:
      ValueError: the class folders have the same folders inside, so that either may be
        the classes.
    """
    split = "train" if "train" in groups else next(iter(groups))
    inside: dict[str, set[str]] = {}
    mixed = set()
    for name, files in groups[split].items():
        depth = len(folders[split].parts) + 1
        parts = [file.parts[depth:] for file in files]
        inside[name] = {part[0] for part in parts if len(part) > 1}
        if any(len(part) == 1 for part in parts):
            mixed.add(name)
    deep = {n: found for n, found in inside.items() if len(found) > 1}
    apart = [found for name, found in deep.items() if name not in mixed]
    times = collections.Counter(part for found in apart for part in found)
    shared = sorted(
        (part for part, count in times.items() if count > 1), key=listing.natural_key
    )
    if (
        2 * len(apart) >= max(len(inside), 4)
        and len(shared) > 1
        and 2 * len(shared) >= len(times)
    ):
        raise ValueError(
            f"{folders[split]}: the folders {some(list(inside))} have the same folders"
            f" inside ({some(shared)}), so that either may be the classes; keep one"
            " level of folders, or list images and classes in a CSV file, and read"
            " that with data.source=csv"
        )
    merged = [
        f"{name}/{part}"
        for name, found in inside.items()
        if len(found) > 1 or name in mixed
        for part in sorted(found, key=listing.natural_key)
    ]
    if not merged:
        return []
    return [
        f"{len(merged)} folders within class folders count as the class around them:"
        f" {some(merged)}"
    ]


def _split_folders(root: Path) -> dict[str, Path]:
    """The folders of the splits: those with such names and with folders inside.

    Folders such as `birds_train` are splits only together with `birds_test`.
    """
    named: dict[str, dict[str, list[Path]]] = {}
    for folder in listing.sub_folders(root):
        split, rest = listing.split_of(folder.name)
        if split and listing.sub_folders(folder):
            named.setdefault(rest, {}).setdefault(split, []).append(folder)
    groups = [
        group
        for rest, group in named.items()
        if not rest or (len(group) > 1 and "train" in group)
    ]
    found: dict[str, list[Path]] = {}
    for group in [named[""]] if "" in named else groups:
        for split, folders in group.items():
            found.setdefault(split, []).extend(folders)
    for split, folders in found.items():
        if len(folders) > 1:
            names = some([folder.name for folder in folders])
            raise ValueError(
                f"{root}: several folders have the name of the split {split!r}:"
                f" {names}; keep one, or merge them"
            )
    return {
        split: found[split][0] for split in ("train", "test", "val") if split in found
    }


def _inner(folder: Path) -> Path:
    """The folder of the class folders, such as `train/images` for `train`."""
    only = listing.sub_folders(folder)
    if len(only) != 1 or not listing.sub_folders(only[0]):
        return folder
    split, rest = listing.split_of(only[0].name)
    same = only[0].name.casefold() == folder.name.casefold()
    filler = not rest and split in (None, listing.split_of(folder.name)[0])
    return only[0] if same or (filler and _has_letters(only[0].name)) else folder


def _splits_in_classes(root: Path, skipped: Skipped) -> dict[str, _Classes]:
    """The images of each split, if each class folder has the splits inside."""
    inside: dict[Path, dict[str, Path]] = {}
    for folder in listing.sub_folders(root):
        inside[folder] = found = {}
        for child in listing.sub_folders(folder):
            split, rest = listing.split_of(child.name)
            if split and not rest:
                found.setdefault(split, child)
    divided = [f for f, found in inside.items() if "train" in found and len(found) > 1]
    if not divided:
        return {}
    others = [f.name for f, found in inside.items() if "train" not in found]
    if others:
        raise ValueError(
            f"{root}: {divided[0].name}/ has the splits inside, but not"
            f" {some(others)}; give each class folder train/ and test/, or none"
        )
    _check_names(root, list(inside))
    groups: dict[str, _Classes] = {}
    for folder, found in inside.items():
        name = unicodedata.normalize("NFC", folder.name)
        for split in ("train", "test", "val"):
            if split in found:
                files = listing.image_files(found[split], skipped)
                groups.setdefault(split, {})[name] = files
        inner = set(found.values())
        outside = [
            file
            for file in listing.image_files(folder, Skipped())
            if inner.isdisjoint(file.parents)
        ]
        if outside:
            skipped.files["outside the splits of the classes"] += len(outside)
    return groups


def _has_letters(name: str) -> bool:
    return any(character.isalpha() for character in name)

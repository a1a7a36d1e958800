"""Small files that would take minutes or gigabytes if they were read naively."""

import pytest

from tests.backbones import test_weights
from tests.datasets import test_download
from tests.input import test_file_structure

pytestmark = pytest.mark.slow


def test_metadata_of_images(note):
    for case in test_file_structure.COSTLY:
        test_file_structure.test_metadata_costs_little(case)
        note("an image with metadata that costs more than its pixels", "is not read")


def test_pickles(tmp_path, note):
    for case in test_weights.HOSTILE_PICKLES:
        test_weights.test_hostile_pickle_is_an_error_at_once(case, tmp_path)
        note("a pickle in a `.pth` that costs more than its size", "an error at once")


def test_headers_of_archives(tmp_path, note):
    for case in test_download.HEADERS:
        test_download.test_large_headers_of_an_archive_are_an_error(case, tmp_path)
        note(
            "a tar with headers of megabytes",
            "an error at once; nothing is unpacked",
        )

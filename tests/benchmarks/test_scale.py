"""Tests of the estimates of scale: arithmetic, inputs and page."""

from pathlib import Path

import jax
import pytest

from benchmarks import input_speed, memory, reproduce, scale
from configs.cub import get_config
from cra_jax.runtime import devices as devices_module
from cra_jax.runtime.devices import all_mean, check_divides

DOCS = Path(__file__).resolve().parents[2] / "docs"
# 56.16 TFLOP/s at the assumed share: 56.16 GFLOP take 1 ms.
A100 = scale.A100


def test_compute_time_is_flop_divided_by_sustained_flops():
    assert scale.compute_s(56.16, 64, A100, 0.18) == pytest.approx(0.064)
    assert scale.compute_s(56.16, 8, A100, 0.09) == pytest.approx(0.016)
    assert scale.gflop("resnet50", "cra") == 147
    assert scale.gflop("resnet50", "baseline") == pytest.approx(98)


def test_incomplete_batches_are_not_steps():
    assert scale.steps("cub") == 140 * 93
    assert scale.steps("cars") == 140 * 127


def test_ring_time():
    assert scale.ring_s(1e9, 1, 1.0) == 0
    assert scale.ring_s(1e9, 2, 1.0) == 1
    assert scale.ring_s(1e9, 4, 1.0) == 1.5
    assert scale.ring_s(1e9, 4, 3.0) == 0.5


def test_least_devices():
    """2 ms on 2 devices and 3 ms on 4, with 32 and 16 ms of arithmetic."""
    slow = A100._replace(link_gbs=1.0)
    assert scale.least_devices(56.16, 2e6, slow) == 4
    assert scale.least_devices(56.16, 4e6, slow) == 2
    assert scale.least_devices(56.16, 2e6, slow, per=8) == 16
    assert scale.least_devices(56.16, 1e3, slow) == 0


def test_bytes_are_those_of_the_published_architecture():
    """torchvision's ResNet-50 with 1,000 classes has 25,557,032 parameters."""
    stream = 25_557_032 - 800 * 2049
    statistics = 2 * 26_560
    assert scale.count_bytes("resnet50", "baseline") == (4 * (stream + statistics), 53)
    both = 4 * (2 * (stream + statistics) + 4 * 2049)
    assert scale.count_bytes("resnet50", "cra") == (both, 106)


def test_bn_sync_adds_four_all_reduces_per_layer():
    """Counted in the traced program."""

    def all_reduces(*, sync: bool) -> int:
        config = get_config("resnet10")
        config.model.pretrained, config.bn.sync = "", sync
        config.data.crop_px, config.art.size_px = 32, 16
        config.train.batch_size = 2
        step = memory.one_device_step(config, 5, all_mean=all_mean)
        batch = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), step.batch
        )
        mapped = jax.pmap(
            step.run,
            axis_name="devices",
            in_axes=(None, 0),  # pyright: ignore[reportArgumentType]
        )
        return str(jax.make_jaxpr(mapped)(step.state, batch)).count("psum")

    layers = scale.count_bytes("resnet10", "cra")[1]
    added = all_reduces(sync=True) - all_reduces(sync=False)
    assert added == 4 * layers
    extra = scale.all_reduce_s("resnet10", "cra", scale.H100_8, sync=True)
    extra -= scale.all_reduce_s("resnet10", "cra", scale.H100_8)
    assert extra == pytest.approx(added * scale.LATENCY_S)
    assert scale.all_reduce_s("resnet10", "cra", scale.H100, sync=True) == 0


def test_hours_of_a_cell_by_hand():
    cell = reproduce.Cell("cub", "resnet50", "cra")
    center, full = scale.eval_flop(cell)
    # A forward pass takes 98 / 3 GFLOP: 28 times in training, once after it.
    assert center == pytest.approx(98e9 / 3 * 5794 * 29)
    # 1.11 MB are 512 x 723 px, padded to 755 px on average.
    assert full == pytest.approx(98e9 / 3 * 5794 * 512 * 754.7 / 448**2, rel=1e-4)
    trained = 13_020 * 64 * 147e9 / 56.16e12
    scored = (center + full) / 28.08e12
    assert scale.hours(cell, A100) == pytest.approx((trained + scored) / 3600)
    eight = A100._replace(devices=8)
    reduce_s = 13_020 * scale.all_reduce_s("resnet50", "cra", eight)
    assert reduce_s > 0
    assert scale.hours(cell, eight) == pytest.approx(
        ((trained + scored) / 8 + reduce_s) / 3600
    )


def test_fits():
    """0.6 GB and 16.8 or 6.0 GB for 64 images, in 80 % of the memory."""

    def found(gigabytes, devices=1, extra_gb=0.0):
        machine = A100._replace(memory_gb=gigabytes, devices=devices)
        return scale.fits("resnet50", machine, extra_gb)

    assert found(22) == "default"
    assert found(21) == found(9) == "`model.remat=True`"
    assert found(8) == "no"
    assert found(12, devices=2) == "default"
    assert found(22, extra_gb=1) == "`model.remat=True`"
    # 16.8 GB are written and read.
    assert scale.traffic_s("resnet50", A100) == pytest.approx(33.6 / 2039)


def test_constants_equal_the_config():
    config = get_config()
    assert config.train.batch_size == input_speed.BATCH_SIZE == scale.BATCH
    assert (config.data.crop_px, config.data.short_side_px) == (
        scale.CROP_PX,
        scale.SHORT_SIDE_PX,
    )
    assert config.eval.every_epochs == scale.EVAL_EVERY
    assert config.eval.bucket_px == scale.BUCKET_PX
    assert config.data.workers == 2  # as stated on the page


@pytest.mark.parametrize("backbone", ["resnet50", "resnet101"])
def test_memory_equals_the_table_in_devices_md(backbone):
    lines = (DOCS / "devices.md").read_text().splitlines()
    for remat, kept in zip(("no", "yes"), scale.KEPT_GB[backbone], strict=True):
        start = f"| {backbone} | 64 | 1 | bfloat16 | {remat} |"
        (line,) = [line for line in lines if line.startswith(start)]
        assert line.startswith(f"{start} {scale.STATE_GB[backbone]} | {kept} |")


def test_rates_and_sizes_are_those_of_the_page_on_datasets():
    page = (DOCS / "datasets.md").read_text()
    rates = "{:,} ({:,} to {:,})".format(*scale.CACHE_RATE)
    assert f"as the training step receives them | {rates} |" in page
    for data in scale.CACHE_GB:
        sizes = f"| {scale.CACHE_GB[data]} | {scale.TRAIN_GB[data]} |"
        (line,) = [line for line in page.splitlines() if line.endswith(sizes)]
        assert f"| {scale.IMAGE_MB[data]} " in line


def test_statements_of_the_page(monkeypatch):
    size, _ = scale.count_bytes("resnet50", "cra")
    alone = scale.compute_s(147, 8, scale.H100_8, scale.SHARE)
    alone += scale.all_reduce_s("resnet50", "cra", scale.H100_8)
    for gbit in scale.NETWORKS_GBIT:  # a step takes longer on two hosts
        two_hosts = scale.compute_s(147, 4, scale.H100_8, scale.SHARE)
        assert two_hosts + scale.ring_s(size, 2, gbit / 8) > alone
    # Two cores are enough for one A100.
    needed = A100.flops(scale.SHARE) / 98e9
    assert needed < scale.CACHE_RATE[0]
    # 64 chips are refused with a list of the possible batch sizes.
    monkeypatch.setattr(devices_module, "device_count", lambda: 64)
    monkeypatch.setattr(jax, "local_device_count", lambda: 64)
    with pytest.raises(ValueError, match="sizes that can: 128"):
        check_divides(64, setting="train.batch_size", least=2)


def test_the_page_is_what_the_command_writes(tmp_path, capsys):
    """If it fails: python -m benchmarks.scale --write docs/scale.md."""
    assert scale.main(["--write", str(tmp_path / "page.md")]) == 0
    written = (tmp_path / "page.md").read_text()
    assert written == (DOCS / "scale.md").read_text()
    assert capsys.readouterr().out == f"written: {tmp_path / 'page.md'}\n"
    assert "no accelerator was used for this" in written.split("\n\n")[1]
    # Lines of prose are at most 95 columns long and do not start a list.
    for line in written.splitlines():
        assert line.startswith("|") or len(line) <= 95
        assert not line.startswith(("+", "* ", "1."))
    assert scale.main([]) == 0
    assert capsys.readouterr().out == f"{written}\n"


def test_a_missing_directory_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        scale.main(["--write", str(tmp_path / "no" / "page.md")])
    assert f"there is no directory {tmp_path / 'no'}" in capsys.readouterr().err

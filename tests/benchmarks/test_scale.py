"""Scale on paper: the arithmetic by hand, its inputs where they come from, the page."""

from pathlib import Path

import jax
import pytest

from benchmarks import input_speed, memory, reproduce, scale
from configs.cub import get_config
from cra_jax.runtime import devices as devices_module
from cra_jax.runtime.devices import all_mean, check_divides

DOCS = Path(__file__).resolve().parents[2] / "docs"
# 56.16 TFLOP/s at the assumed share: 56.16 GFLOP take a millisecond.
A100 = scale.A100


def test_a_step_is_its_flops_over_what_a_device_sustains():
    assert scale.compute_s(56.16, 64, A100, 0.18) == pytest.approx(0.064)
    assert scale.compute_s(56.16, 8, A100, 0.09) == pytest.approx(0.016)
    assert scale.gflop("resnet50", "cra") == 147
    assert scale.gflop("resnet50", "baseline") == pytest.approx(98)


def test_whole_batches_alone_are_steps():
    assert scale.steps("cub") == 140 * 93
    assert scale.steps("cars") == 140 * 127


def test_a_ring_passes_everything_on_but_a_share_twice():
    assert scale.ring_s(1e9, 1, 1.0) == 0
    assert scale.ring_s(1e9, 2, 1.0) == 1
    assert scale.ring_s(1e9, 4, 1.0) == 1.5
    assert scale.ring_s(1e9, 4, 3.0) == 0.5


def test_from_how_many_devices_an_all_reduce_matters():
    """2 ms over 2 devices and 3 over 4, beside 32 ms of arithmetic and 16."""
    slow = A100._replace(link_gbs=1.0)
    assert scale.matters_from(56.16, 2e6, slow) == 4
    assert scale.matters_from(56.16, 4e6, slow) == 2
    assert scale.matters_from(56.16, 2e6, slow, per=8) == 16
    assert scale.matters_from(56.16, 1e3, slow) == 0


def test_bytes_are_those_of_the_published_architecture():
    """torchvision's ResNet-50 of 1,000 classes has 25,557,032 parameters."""
    stream = 25_557_032 - 800 * 2049
    statistics = 2 * 26_560
    assert scale.counted("resnet50", "baseline") == (4 * (stream + statistics), 53)
    both = 4 * (2 * (stream + statistics) + 4 * 2049)
    assert scale.counted("resnet50", "cra") == (both, 106)


def test_shared_batchnorm_tells_four_things_a_layer():
    """Traced: what `bn.sync` adds is what the page counts."""

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

    layers = scale.counted("resnet10", "cra")[1]
    added = all_reduces(sync=True) - all_reduces(sync=False)
    assert added == 4 * layers
    gained = scale.told_s("resnet10", "cra", scale.H100_8, sync=True)
    gained -= scale.told_s("resnet10", "cra", scale.H100_8)
    assert gained == pytest.approx(added * scale.LATENCY_S)
    assert scale.told_s("resnet10", "cra", scale.H100, sync=True) == 0


def test_hours_of_a_cell_by_hand():
    cell = reproduce.Cell("cub", "resnet50", "cra")
    center, full = scale.eval_flop(cell)
    # A forward pass is 98 / 3 GFLOP; 28 times while training, once after it.
    assert center == pytest.approx(98e9 / 3 * 5794 * 29)
    # 1.11 MB are 512 x 723 px, padded to 755 on average.
    assert full == pytest.approx(98e9 / 3 * 5794 * 512 * 754.7 / 448**2, rel=1e-4)
    trained = 13_020 * 64 * 147e9 / 56.16e12
    scored = (center + full) / 28.08e12
    assert scale.hours(cell, A100) == pytest.approx((trained + scored) / 3600)
    eight = A100._replace(devices=8)
    told = 13_020 * scale.told_s("resnet50", "cra", eight)
    assert told > 0
    assert scale.hours(cell, eight) == pytest.approx(
        ((trained + scored) / 8 + told) / 3600
    )


def test_what_fits():
    """0.6 GB and 16.8 / 6.0 GB of 64 images, in four fifths of the memory."""

    def found(gigabytes, devices=1, extra_gb=0.0):
        machine = A100._replace(memory_gb=gigabytes, devices=devices)
        return scale.fits("resnet50", machine, extra_gb)

    assert found(22) == "as it is"
    assert found(21) == found(9) == "`model.remat=True`"
    assert found(8) == "no"
    assert found(12, devices=2) == "as it is"
    assert found(22, extra_gb=1) == "`model.remat=True`"
    # A write and a read of 16.8 GB.
    assert scale.traffic_s("resnet50", A100) == pytest.approx(33.6 / 2039)


def test_inputs_are_those_of_the_recipe():
    config = get_config()
    assert config.train.batch_size == input_speed.BATCH_SIZE == scale.BATCH
    assert (config.data.crop_px, config.data.short_side_px) == (
        scale.CROP_PX,
        scale.SHORT_SIDE_PX,
    )
    assert config.eval.every_epochs == scale.EVAL_EVERY
    assert config.eval.bucket_px == scale.BUCKET_PX
    assert config.data.workers == 2  # as the page says


@pytest.mark.parametrize("backbone", ["resnet50", "resnet101"])
def test_memory_is_that_of_the_table_of_devices(backbone):
    lines = (DOCS / "devices.md").read_text().splitlines()
    for remat, kept in zip(("no", "yes"), scale.KEPT_GB[backbone], strict=True):
        start = f"| {backbone} | 64 | 1 | bfloat16 | {remat} |"
        (line,) = [line for line in lines if line.startswith(start)]
        assert line.startswith(f"{start} {scale.STATE_GB[backbone]} | {kept} |")


def test_rates_and_sizes_are_those_of_the_readme():
    readme = (DOCS.parent / "README.md").read_text()
    rates = "{:,} ({:,} to {:,})".format(*scale.STORE_RATE)
    assert f"as the training step receives them | {rates} |" in readme
    for data in scale.STORE_GB:
        sizes = f"| {scale.STORE_GB[data]} | {scale.TRAIN_GB[data]} |"
        (line,) = [line for line in readme.splitlines() if line.endswith(sizes)]
        assert f"| {scale.IMAGE_MB[data]} " in line


def test_what_the_page_says_in_words(monkeypatch):
    size, _ = scale.counted("resnet50", "cra")
    alone = scale.compute_s(147, 8, scale.H100_8, scale.SHARE)
    alone += scale.told_s("resnet50", "cra", scale.H100_8)
    for gbit in scale.NETWORKS_GBIT:  # a second host makes a step longer
        two_hosts = scale.compute_s(147, 4, scale.H100_8, scale.SHARE)
        assert two_hosts + scale.ring_s(size, 2, gbit / 8) > alone
    # Two cores are enough for one A100.
    needed = A100.flops(scale.SHARE) / 98e9
    assert needed < scale.STORE_RATE[0]
    # A pod slice of 64 chips is refused, and told what it can.
    monkeypatch.setattr(devices_module, "device_count", lambda: 64)
    monkeypatch.setattr(jax, "local_device_count", lambda: 64)
    with pytest.raises(ValueError, match="sizes that can: 128"):
        check_divides(64, setting="train.batch_size", least=2)


def test_the_page_is_what_the_command_writes(tmp_path, capsys):
    """Else: python -m benchmarks.scale --write docs/scale.md."""
    assert scale.main(["--write", str(tmp_path / "page.md")]) == 0
    written = (tmp_path / "page.md").read_text()
    assert written == (DOCS / "scale.md").read_text()
    assert capsys.readouterr().out == f"written: {tmp_path / 'page.md'}\n"
    assert "No GPU and no TPU has run this code" in written.split("\n\n")[1]
    # No line of prose is one that an editor cuts, or a list by accident.
    for line in written.splitlines():
        assert line.startswith("|") or len(line) <= 95
        assert not line.startswith(("+", "* ", "1."))
    assert scale.main([]) == 0
    assert capsys.readouterr().out == f"{written}\n"


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        scale.main(["--write", str(tmp_path / "no" / "page.md")])
    assert f"there is no folder {tmp_path / 'no'}" in capsys.readouterr().err

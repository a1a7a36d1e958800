import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from cra_jax.inference import overlay
from cra_jax.reports import figure_style
from cra_jax.runtime import fonts

# It comes with matplotlib and has a glyph for every character.
FULL = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "LastResortHE-Regular.ttf"


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """Makes DejaVu Sans the only font; returns a function that installs others."""

    def install(*files: Path) -> None:
        monkeypatch.setattr(fonts, "_all_fonts", lambda: (fonts._default(), *files))
        monkeypatch.setattr(fonts, "_reported", [])

    install()
    return install


def drawn(name: str) -> np.ndarray:
    return np.asarray(
        overlay.draw(
            np.full((64, 64, 3), 128, np.uint8),
            activation=np.zeros((64, 64)),
            crop_box_px=(0, 0, 64, 64),
            attention_px=None,
            answer=[(name, 0.5)],
        )
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [("Finch", "Crane"), ("κύκνος", "γλάρος"), ("ворона", "сорока"), ("雀鸟", "燕子")],
)
def test_names_of_any_script_are_drawn_differently(one, other, capsys):
    assert not np.array_equal(drawn(one), drawn(other))
    assert figure_style.wrap_class_name(one) != figure_style.wrap_class_name(other)
    errors = capsys.readouterr().err
    assert errors.count("no installed font has") == (one == "雀鸟")  # once


def test_characters_without_a_font_are_drawn_as_their_codes(capsys):
    assert fonts.drawable("Wren 雀\nx") == r"Wren \u96c0 x"
    assert "(CJK UNIFIED IDEOGRAPH-96C0)" in capsys.readouterr().err
    assert fonts.drawable("e\u0301 Ж \ufe0f") == "e\u0301 Ж \ufe0f"  # DejaVu has them


def test_installed_font_is_used_for_the_characters_that_it_has(installed, capsys):
    installed(FULL)
    assert fonts.font_files("Wren") == [fonts._default()]
    assert fonts.font_files("雀")[0] == FULL
    assert fonts.drawable("雀") == "雀"
    pen = ImageDraw.Draw(Image.new("RGB", (100, 100)))
    shown, font = fonts.fit("雀 Wren", pen, 12, 1000)
    assert shown == "雀 Wren"
    assert font.path == str(FULL)
    assert capsys.readouterr().err == ""


def test_figure_mixes_fonts(installed, tmp_path):
    installed(FULL)
    figure = Figure()
    figure_style.draw_prediction(figure.add_subplot(), "雀", correct=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(tmp_path / "a.pdf")
        figure.savefig(tmp_path / "a.png")


def test_long_name_is_truncated(installed):
    pen = ImageDraw.Draw(Image.new("RGB", (100, 100)))
    shown, font = fonts.fit("a very long name", pen, 12, 60)
    assert shown.endswith("...")
    assert pen.textlength(shown, font=font) <= 60

"""Axes and number formats of the HTML pages; escaping of their values."""

import base64

import jinja2
import pytest

from cra_jax.reports import html_page


def test_an_axis_covers_its_values_and_ends_at_ticks():
    for values in ([0.842, 0.862], [0.8, 0.81, 0.9], [0.16, 0.79], [0.5], [0.0], [1.0]):
        found = html_page.axis(values)
        assert found.low <= min(values) <= max(values) <= found.high
        assert (found.ticks[0], found.ticks[-1]) == (found.low, found.high)
        steps = {
            round(b - a, 6)
            for a, b in zip(found.ticks[:-1], found.ticks[1:], strict=True)
        }
        assert len(steps) == 1
        assert 2 <= len(found.ticks) <= 5


def test_positions_on_an_axis():
    axis = html_page.axis([0.8, 0.9])
    assert axis.position(axis.low) == "0.00%"
    assert axis.position(axis.high) == "100.00%"
    assert axis.position((axis.low + axis.high) / 2) == "50.00%"
    assert axis.position(2) == "100.00%"  # clipped to the axis
    assert html_page.axis([]).ticks[-1] == 1


def test_formats():
    assert html_page.percent(0.842) == "84.2"
    assert html_page.percent(-0.005, sign=True) == f"{html_page.MINUS}0.5"
    assert html_page.percent(0.005, sign=True) == "+0.5"
    assert html_page.percent(None) == "–"
    assert html_page.p_value(0.0321) == "0.032"
    assert html_page.p_value(1e-9) == "< 0.001"
    assert html_page.duration(59.6) == "1 min 00 s"
    assert html_page.duration(7.2) == "7 s"
    assert html_page.duration(3 * 3600 + 5 * 60) == "3 h 05 min"
    assert html_page.duration(50 * 3600) == "2 d 2 h"
    assert html_page.format_value((0.0, 0.4, "a")) == "(0, 0.4, a)"
    assert html_page.format_value("") == '""'
    assert html_page.readable_class_name("001.Black_footed") == "Black footed"
    assert html_page.readable_class_name("707.") == "707."


def test_breakable_names_are_escaped():
    assert html_page.breakable("a_b/c<d") == "a_<wbr>b/<wbr>c&lt;d"


def test_data_uri_contains_the_file(tmp_path):
    path = tmp_path / "dot.png"
    path.write_bytes(b"\x89PNG")
    mime_type, _, data = html_page.data_uri(path).partition(",")
    assert mime_type == "data:image/png;base64"
    assert base64.b64decode(data) == b"\x89PNG"


def test_a_missing_template_value_is_an_error():
    with pytest.raises(jinja2.UndefinedError):
        html_page.render("report")

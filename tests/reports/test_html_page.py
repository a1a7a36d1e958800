"""Scales and words of pages; and that whatever is put into a page is escaped."""

import base64

import jinja2
import pytest

from cra_jax.reports import html_page


def test_a_scale_holds_its_values_and_ends_at_ticks():
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


def test_places_on_a_scale():
    scale = html_page.axis([0.8, 0.9])
    assert scale.place(scale.low) == "0.00%"
    assert scale.place(scale.high) == "100.00%"
    assert scale.place((scale.low + scale.high) / 2) == "50.00%"
    assert scale.place(2) == "100.00%"  # what lies beyond stays on the page
    assert html_page.axis([]).ticks[-1] == 1


def test_words():
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
    assert html_page.plain((0.0, 0.4, "a")) == "(0, 0.4, a)"
    assert html_page.plain("") == '""'
    assert html_page.class_words("001.Black_footed") == "Black footed"
    assert html_page.class_words("707.") == "707."


def test_a_name_may_break_but_not_break_out():
    assert html_page.breakable("a_b/c<d") == "a_<wbr>b/<wbr>c&lt;d"


def test_a_file_as_an_address(tmp_path):
    path = tmp_path / "dot.png"
    path.write_bytes(b"\x89PNG")
    kind, _, data = html_page.data_uri(path).partition(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data) == b"\x89PNG"


def test_a_name_that_a_template_misses_is_an_error():
    with pytest.raises(jinja2.UndefinedError):
        html_page.render("report")

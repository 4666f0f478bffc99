"""Finished runs' tables in Markdown: places that are replaced, and a claim whose run is elsewhere."""

import pytest

from tests import results

TEXT = "# Results\n\n<!-- one -->\nold\n<!-- /one -->\nwritten by people\n<!-- two -->\n<!-- /two -->\nthe end\n"


def test_a_place_is_replaced_and_nothing_else():
    assert results._put(TEXT, "one", "new") == TEXT.replace("old", "new")
    assert results._put(TEXT, "two", "new") == TEXT.replace("<!-- two -->\n", "<!-- two -->\nnew\n")


@pytest.mark.parametrize("text", [TEXT.replace("<!-- /one -->", ""), TEXT.replace("<!-- one -->", "")])
def test_a_place_that_does_not_begin_or_end_is_refused(text):
    with pytest.raises(SystemExit, match="there is no place for one: name the run's folder as its recipe, or write"):
        results._put(text, "one", "new")


def test_a_claim_whose_run_is_elsewhere_stays(tmp_path):
    text = results.RESULTS.read_text("utf-8")
    known = results._place(text, "claims")[1].strip()
    assert results.claims(tmp_path, known) == known
    assert known == results._place(results.README.read_text("utf-8"), "claims")[1].strip()
    assert len(known.splitlines()) == len(results.CLAIMS) + 2


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="is no run directory"):
        results.section(tmp_path)

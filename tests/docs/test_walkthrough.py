"""docs/walkthrough.md shows what the cache really does."""

from examples import walkthrough


def test_the_page_shows_what_the_cache_holds():
    page = walkthrough.PAGE.read_text()
    assert page.count("```text\n") == len(walkthrough.blocks())
    assert page == walkthrough.written(page), "refresh it with: python examples/walkthrough.py --write"


def test_write_mends_a_page_that_has_gone_stale():
    page = walkthrough.PAGE.read_text()
    assert walkthrough.written(page.replace("victims    [3]", "victims    [4]")) == page


def test_every_attention_adds_up_to_one():
    for weights in walkthrough.SLIDE + walkthrough.DISCONTINUOUS:
        assert round(sum(weights.values()), 6) == 1


def test_the_slide_part_needs_six_slots():
    assert all("5" in block.split("\n")[1].split() for block in walkthrough.blocks()[1:8])
    assert not any("6" in block.split("\n")[1].split() for block in walkthrough.blocks()[1:8])

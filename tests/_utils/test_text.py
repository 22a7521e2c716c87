import pytest

from lightning_fedfisher._utils.text import (
    client_names,
    markdown_code,
    page_text,
    shortened,
    terminal_text,
    wandb_title,
)


@pytest.mark.parametrize(
    ("text", "shown"), [("", ""), ("abcdefgh", "abcdefgh"), ("abcdefghi", "abc...hi")]
)
def test_a_long_text_keeps_its_ends(text, shown):
    assert shortened(text, 8) == shown


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["a/b/1.x", "a/b/2.x"], ["1", "2"]),
        (["a/b/1.x", "a/c/1.x"], ["b", "c"]),
        (["a/b/u/1.x", "a/c/u/1.x"], ["b", "c"]),
        (["a/b/1.x", "a/c/2.x"], ["b/1", "c/2"]),
        (["/a/1.x"], ["1"]),
        (["1.x", "a/1.x"], ["1", "a/1"]),
        (["1.x", "1.y"], ["1.x", "1.y"]),
        (["v1.2.x", "v1.3.x"], ["v1.2", "v1.3"]),
        (["this update", "a/b", "this update"], ["client-0", "a/b", "client-2"]),
    ],
)
def test_clients_are_named_by_what_tells_them_apart(sources, names):
    assert client_names(sources) == names


@pytest.mark.parametrize(
    ("sanitise", "shown"),
    [
        (terminal_text, r"a|`<b> é\x1b[2J\n\u202e=/"),
        (page_text, "a|`<b> é?[2J??=/"),
        (markdown_code, "`a??<b> é?[2J??=/`"),
        (wandb_title, "a---b- é--2J----"),
    ],
)
def test_each_place_shows_a_strangers_name_safely(sanitise, shown):
    assert sanitise("a|`<b> é\x1b[2J\n\u202e=/") == shown


def test_titles_are_cut_to_what_wandb_takes():
    assert wandb_title("a" * 200) == "a" * 128


@pytest.mark.parametrize("sanitise", [terminal_text, page_text, markdown_code, wandb_title])
def test_lone_surrogates_are_replaced(sanitise):
    sanitise("\ud800").encode()

import pytest

from lightning_fedfisher._utils.text import client_names


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

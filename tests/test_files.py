"""Reading and writing files: a damaged one is named, with what to do about it."""

import pytest

from linattn.core.files import read_json


@pytest.mark.parametrize(
    "held, message",
    [
        (None, r"card.json: is missing; copy the folder again"),
        (b'{"a": [1, 2', r"card.json: not JSON \(Expecting ',' delimiter.*\); copy the folder again"),
        (b"\xff\xfe\xfa", r"card.json: not JSON \(.*codec can't decode.*\); copy the folder again"),
        (b"[" * 100_000, r"card.json: not JSON \(.*recursion.*\); copy the folder again"),
    ],
)
def test_json_that_cannot_be_read_is_a_value_error_with_its_path(tmp_path, held, message):
    path = tmp_path / "card.json"
    if held is not None:
        path.write_bytes(held)
    with pytest.raises(ValueError, match=message):
        read_json(path)


def test_json_is_read(tmp_path):
    path = tmp_path / "card.json"
    path.write_bytes('{"name": "größer", "sizes": [1, 2.5, null]}'.encode())
    assert read_json(path) == {"name": "größer", "sizes": [1, 2.5, None]}

"""Small shards of bytes."""

import pytest
from small_text import make_shards, some_documents


@pytest.fixture
def shards(tmp_path):
    return make_shards(tmp_path, some_documents())

"""Results are those of the golden files, bit for bit: documents, merges, cells, designs and keys.

A difference is a changed result. Where it was not meant, correct the code. Where it was, raise the
versions of the stages whose results change and, in the same commit, regenerate the files with
``python tests/golden/make.py NAME``. Never regenerate them in a commit that raises no version.
"""

import json

import pytest
from make import GOLDENS, HERE, computed


@pytest.mark.parametrize("name", GOLDENS)
def test_results_are_the_golden_ones_bit_for_bit(name, tmp_path):
    wanted = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    assert computed(name, tmp_path) == wanted

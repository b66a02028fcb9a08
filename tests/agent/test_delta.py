import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from agent.delta import merged

NUMBERS = st.lists(st.integers(-(1 << 62), 1 << 62), max_size=40).map(sorted)


@given(st.lists(NUMBERS, min_size=1, max_size=5))
def test_merging_keeps_every_number_once_and_in_order(parts):
    found = merged(*(np.array(part, np.int64) for part in parts))
    assert found.tolist() == sorted({number for part in parts for number in part})

"""The story of files (tests/acceptance/test_trees.py) on thin volumes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import cluster as clusters
from tests.acceptance import test_trees
from tests.acceptance.test_trees import Field
from tests.vm.inside.node import make_bare_group
from tests.vm.inside.unlike import SLOW_S, loopback_up

pytestmark = pytest.mark.timeout(3000)


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Field]:
    loopback_up()
    make_bare_group()
    # One slow processor for all: what takes a moment elsewhere takes several seconds here.
    slow = "examine_timeout_s = 120\nnode_timeout_s = 60\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clusters.wait_for, "__defaults__", (SLOW_S, 0.5))
        with test_trees.begun("lvm-thin", Path(tmp_path_factory.mktemp("files")), slow) as made:
            yield made


test_a_first_copy = test_trees.test_a_first_copy
test_missed = test_trees.test_a_node_that_missed_three_points_gets_what_changed_and_no_more
test_a_database = test_trees.test_a_database_that_was_running_works_on_from_any_point
test_a_receiver_that_is_killed = test_trees.test_a_receiver_that_is_killed_goes_on_where_it_was
test_a_primary_that_is_away = test_trees.test_a_primary_that_is_away_is_given_up_by_name_and_kept_when_it_comes_back

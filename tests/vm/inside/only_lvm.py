"""A pytest plugin for the machine: the conformance suite runs against `lvm-thin` alone.

`python -m tests.vm.run -p tests.vm.inside.only_lvm tests/agent/backends/conformance`
"""

from tests.agent.backends import registry
from tests.agent.backends.kinds import lvm

registry.KINDS = lvm.KINDS

"""Whether an order may be obeyed by one replica, as a matter of what the replica is and has been told.

Terms and stores are the node's affair (`identity.py`); here it is about one volume: its volume_id, its epoch, its
grant and its tip. Pure: values in, nothing or a typed refusal out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from resilver.errors import Refused, Superseded
from resilver.volume import Presence

if TYPE_CHECKING:
    from resilver.lineage import Lineage
    from resilver.volume import Grant, Order, ReplicaReport, VolumeRecord


def check_volume(
    order: Order, report: ReplicaReport, *, replaces: bool = False, replaces_lost: bool | None = None
) -> None:
    """LOST and FOREIGN data is not touched, unless the order names it to be replaced: `replaces_lost` for LOST, where
    that is known by itself.
    """
    if report.presence is Presence.LOST and not (replaces if replaces_lost is None else replaces_lost):
        why = f" ({report.problems[0]})" if report.problems else ""
        raise Refused(
            "REPLICA_LOST",
            f"the data of {order.volume} was here and is not{why}; mount its disk, or have the replica replaced",
        )
    if replaces:
        return
    if report.volume_id and order.volume_id and report.volume_id != order.volume_id:
        raise Refused(
            "REPLICA_FOREIGN",
            f"the data here is of another volume named {order.volume}: its volume_id is {report.volume_id}, "
            f"the order's is {order.volume_id}",
        )


def check_epoch(order: Order, record: VolumeRecord | None) -> None:
    """An order of an epoch that is over, or that was opened twice, is refused."""
    if record is None or not record.epoch or not order.epoch:
        return
    if record.volume_id and order.volume_id and record.volume_id != order.volume_id:
        return  # epochs of two volumes say nothing to each other; check_volume has looked at the data
    compare_epochs(order.epoch, order.epoch_id, record.epoch, record.epoch_id)


def check_secondary(order: Order, record: VolumeRecord | None, node: str) -> None:
    """The primary of the order's own epoch never receives, also while its grant is still on its way."""
    if record is None or (record.volume_id, record.epoch) != (order.volume_id, order.epoch) or record.primary != node:
        return
    said = f"{node} is the primary of {order.volume} in epoch {record.epoch}: a primary never receives"
    raise Refused("PRIMARY_UNCLEAR", said)


def check_grant(order: Order, grant: Grant | None, node: str) -> None:
    """CPs are taken under the grant of the order's own epoch and no other."""
    if grant is None or grant.epoch < order.epoch:
        held = "none" if grant is None else f"one of epoch {grant.epoch}"
        raise Refused(
            "PRIMARY_UNCLEAR",
            f"{node} may not take consistency points of {order.volume} in epoch {order.epoch}: of grants it has {held}",
        )
    if grant.volume_id != order.volume_id:
        raise Refused("REPLICA_FOREIGN", f"the grant on {node} is for volume_id {grant.volume_id}")
    compare_epochs(order.epoch, order.epoch_id, grant.epoch, grant.epoch_id)


def check_tip(order: Order, lineage: Lineage) -> None:
    """Compare-and-set: the tip must still be the one that the order was decided on."""
    if order.expected_tip is not None and order.expected_tip != lineage.tip_id:
        raise Refused(
            "TARGET_CHANGED",
            f"the tip of {order.volume} here is {lineage.tip_id or 'nothing'}, "
            f"and the order expects {order.expected_tip or 'nothing'}",
            tip=lineage.tip_id,
        )


def merge_record(known: VolumeRecord | None, told: VolumeRecord, report: ReplicaReport) -> VolumeRecord:
    """What stands beside the data after `told`: the higher epoch, then the newer CP. Refused if it is the lower one."""
    if report.volume_id and told.volume_id and report.volume_id != told.volume_id:
        raise Refused(
            "REPLICA_FOREIGN",
            f"the data here has volume_id {report.volume_id}, and the record of {told.volume} has {told.volume_id}",
        )
    if known is None or (known.volume_id and known.volume_id != told.volume_id):
        return told
    compare_epochs(told.epoch, told.epoch_id, known.epoch, known.epoch_id)
    if told.epoch == known.epoch and told.newest_cp < known.newest_cp:
        return replace(told, newest_cp=known.newest_cp, newest_id=known.newest_id)
    return told


def compare_epochs(epoch: int, epoch_id: str, known: int, known_id: str) -> None:
    if epoch < known:
        raise Superseded("STALE_EPOCH", f"epoch {epoch} is over: epoch {known} is known here", epoch=str(known))
    if epoch == known and epoch_id != known_id:
        raise Superseded(
            "EPOCH_CONFLICT", f"epoch {epoch} is known here as {known_id}, not as {epoch_id}", epoch_id=known_id
        )

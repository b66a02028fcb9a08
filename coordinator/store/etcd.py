"""etcd as the store: readable JSON under `/resilver/<cluster>/`, one leader by a key under a lease.

The rules:

* The leader key is created under a lease in the transaction that also raises the term; its create revision is the
  reign's. Nothing else elects: no lock, no watch.
* Every commit compares the leader key's value and create revision, and the mod revision of each record that has an
  expected one. A commit that may have been carried out is not tried again: the reign ends.
* A reign ends, at the latest, its TTL after the last renewal was *sent*, on CLOCK_BOOTTIME.
* Everything is read at one revision, page by page.

`etcdctl get --prefix /resilver/<cluster>/` shows all there is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import grpc
import pyetcd.transactions as op

from coordinator.store.base import ANY_REVISION, Health, Leader, Reign, Stored, Write
from coordinator.store.encoding import (
    LEADER,
    RESERVED,
    STORE_ID,
    TERM,
    boottime_s,
    changed,
    decode,
    decode_leader,
    decode_store_id,
    decode_term,
    encode,
    encode_all,
    encode_leader,
    lost,
    new_leader,
    new_store_id,
)
from coordinator.store.members import Answered, Client, Members, UnknownOutcome, check_files
from resilver.address import Address
from resilver.config import EtcdConfig
from resilver.errors import Conflict, Unavailable

PAGE_RECORDS: Final = 80
"""In one answer, which is below what a client receives also where each record is as large as one can be."""
READ_TRIES_MAX: Final = 3
CAMPAIGN_TRIES_MAX: Final = 3


class EtcdStore:
    """A `Store` on etcd. Its calls take at most `TRIES_MAX` times the timeout for each request that they consist of."""

    def __init__(self, endpoints: Sequence[Address], cluster: str, config: EtcdConfig, lease_ttl_s: int) -> None:
        self._members: Final = Members(endpoints, config)
        self._config: Final = config
        self._prefix: Final = f"/resilver/{cluster}/"
        self._lease_ttl_s: Final = lease_ttl_s
        self._store_id = b""
        self._own: Reign | None = None

    async def open(self) -> str:
        """As the protocol says; Invalid for a certificate or password file that cannot be read."""
        check_files(self._config)
        key = self._key(STORE_ID)
        minted = encode(new_store_id())
        _, answers = await self._transact(
            [op.Create(key) == 0], [op.Put(key, minted), op.Get(key)], [op.Get(key)], twice=True
        )
        self._store_id = answers[-1][0][0]
        return decode_store_id(self._store_id)

    async def campaign(self, name: str, address: str, *, above_term: int = 0) -> Reign | Leader:
        for _ in range(CAMPAIGN_TRIES_MAX):
            found, term, term_revision = await self._standing()
            if found is not None and self._own is not None and found.leader_id == self._own.leader.leader_id:
                # Our own last reign, which the caller has given up: nobody need wait for its lease to run out.
                await self.resign(self._own)
                found = None
            if found is not None:
                return found
            leader = new_leader(name, address, max(term, above_term) + 1)
            won = await self._take(leader, term_revision)
            if won is not None:
                self._own = won
                return won
        raise Unavailable("STORE_UNAVAILABLE", f"no campaign came to an end in {CAMPAIGN_TRIES_MAX} tries; try again")

    async def renew(self, reign: Reign) -> Reign:
        sent_s = boottime_s()
        try:
            answers = await self._members.call(lambda client: list(client.refresh_lease(reign.lease)))
        except Answered as answered:
            raise self._unavailable(answered) from answered
        if not answers or answers[0].TTL <= 0:
            raise lost(await self.leader())
        # The lease may live on without the key, if somebody has deleted it: then another one may lead.
        still, found = await self._transact(self._is_ours(reign), [], [op.Get(self._key(LEADER))], twice=True)
        if not still:
            raise lost(_leader_in(found[0]))
        return replace(reign, ends_at=sent_s + answers[0].TTL)

    async def resign(self, reign: Reign) -> None:
        """Ends the reign by revoking its lease; done already is done."""
        try:
            await self._members.call(lambda client: client.revoke_lease(reign.lease))
        except Answered as answered:
            if answered.code is not grpc.StatusCode.NOT_FOUND:
                raise self._unavailable(answered) from answered

    async def leader(self) -> Leader | None:
        return (await self._standing())[0]

    async def read_all(self) -> Mapping[str, Stored]:
        for _ in range(READ_TRIES_MAX):
            try:
                return await self._read_pages()
            except Answered as answered:
                # OUT_OF_RANGE: the revision that we read at was compacted away between two pages.
                if answered.code is not grpc.StatusCode.OUT_OF_RANGE:
                    raise self._unavailable(answered) from answered
        raise Unavailable("STORE_UNAVAILABLE", f"the store was compacted {READ_TRIES_MAX} times while it was read")

    async def commit(self, reign: Reign, writes: Sequence[Write]) -> int:
        encoded = encode_all(writes)
        guarded = [write for write in encoded if write.expected != ANY_REVISION]
        leader = self._key(LEADER)
        compare = self._is_ours(reign) + [op.Mod(self._key(write.key)) == write.expected for write in guarded]
        success: list[Any] = [
            op.Delete(self._key(write.key)) if write.value is None else op.Put(self._key(write.key), write.value)
            for write in encoded
        ]
        failure = [op.Get(leader), *(op.Get(self._key(write.key)) for write in guarded)]
        try:
            done, answers = await self._transact(compare, [*success, op.Get(leader)], failure, twice=False)
        except UnknownOutcome as unknown:
            raise Conflict(
                "LEADERSHIP_LOST", f"it is not known whether a commit was carried out ({unknown}): the reign ends"
            ) from unknown
        if done:
            return int(answers[-1][0][1].response_header.revision)
        found = answers[0]
        if not found or found[0][0] != encode_leader(reign.leader) or found[0][1].create_revision != reign.revision:
            raise lost(_leader_in(found))
        for write, kvs in zip(guarded, answers[1:], strict=True):
            revision = kvs[0][1].mod_revision if kvs else 0
            if revision != write.expected:
                raise changed(write.key, write.expected, revision)
        raise lost(_leader_in(found))

    async def health(self) -> Health:
        return Health("etcd", await self._members.healthy_count(), self._members.count)

    async def close(self) -> None:
        await self._members.close()

    # ------------------------------------------------------------ inside

    def _key(self, name: str) -> str:
        return self._prefix + name

    def _is_ours(self, reign: Reign) -> list[Any]:
        key = self._key(LEADER)
        return [op.Value(key) == encode_leader(reign.leader), op.Create(key) == reign.revision]

    def _unavailable(self, answered: Answered) -> Unavailable:
        return Unavailable("STORE_UNAVAILABLE", f"etcd at {self._members.names} refuses: {answered}")

    async def _transact(
        self, compare: list[Any], success: list[Any], failure: list[Any], *, twice: bool
    ) -> tuple[bool, list[Any]]:
        """One transaction: whether it succeeded, and for each Get a list of (value, metadata)."""
        ask = self._members.call if twice else self._members.call_once
        try:
            return await ask(lambda client: client.transaction(compare, success, failure))
        except Answered as answered:
            raise self._unavailable(answered) from answered

    async def _standing(self) -> tuple[Leader | None, int, int]:
        """Who leads, the last term, and the revision of its record, of one moment."""
        gets = [op.Get(self._key(name)) for name in (LEADER, TERM, STORE_ID)]
        _, (leader, term, store_id) = await self._transact([], gets, [], twice=True)
        if not store_id or store_id[0][0] != self._store_id:
            raise Unavailable(
                "STORE_UNAVAILABLE",
                f"etcd at {self._members.names} is not the store that was opened: it was emptied or replaced; "
                "restart the coordinator if that is what you want",
            )
        if not term:
            return _leader_in(leader), 0, 0
        return _leader_in(leader), decode_term(term[0][0]), term[0][1].mod_revision

    async def _take(self, leader: Leader, term_revision: int) -> Reign | None:
        """The campaign's one transaction, under a lease of its own; None if somebody was faster."""
        sent_s = boottime_s()
        try:
            lease = await self._members.call(lambda client: client.lease(self._lease_ttl_s))
        except Answered as answered:
            raise self._unavailable(answered) from answered
        key, value = self._key(LEADER), encode_leader(leader)
        compare = [
            op.Create(key) == 0,
            op.Mod(self._key(TERM)) == term_revision,
            op.Value(self._key(STORE_ID)) == self._store_id,
        ]
        success = [op.Put(key, value, lease.id), op.Put(self._key(TERM), encode({"term": leader.term})), op.Get(key)]
        reign = Reign(leader, 0, lease.id, sent_s + lease.ttl)
        try:
            # Twice does no harm: the second time the key is there, and it is seen that it is ours.
            _, answers = await self._transact(compare, success, [op.Get(key)], twice=True)
        except Unavailable:
            await self._give_back(reign)
            raise
        found = answers[-1]
        if found and found[0][0] == value:
            return replace(reign, revision=found[0][1].create_revision)
        await self._give_back(reign)
        return None

    async def _give_back(self, reign: Reign) -> None:
        """Revokes a lease that came to nothing; if that fails too, it runs out by itself."""
        with contextlib.suppress(Unavailable):
            await self.resign(reign)

    async def _read_pages(self) -> dict[str, Stored]:
        records: dict[str, Stored] = {}
        start = self._prefix.encode()
        # The prefix ends in "/", and "0" is the next character after it.
        end = start[:-1] + b"0"
        revision: int | None = None
        while True:
            page = await self._members.call(_page(start, end, revision))
            revision = page.header.revision if revision is None else revision
            for kv in page.kvs:
                key = kv.key.decode()[len(self._prefix) :]
                if key not in RESERVED:
                    records[key] = Stored(decode(key, kv.value), kv.mod_revision)
            if not page.more:
                return records
            start = page.kvs[-1].key + b"\0"


def _page(start: bytes, end: bytes, revision: int | None) -> Callable[[Client], Any]:
    return lambda client: client.get_range_response(start, end, limit=PAGE_RECORDS, revision=revision)


def _leader_in(found: list[Any]) -> Leader | None:
    return decode_leader(found[0][0]) if found else None

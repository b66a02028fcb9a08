/*
 * Whose copy counts, and what becomes of the others: epochs, elections, consistency points and resyncs of one volume
 * on three nodes, led by coordinators of which each may die at any moment (who leads is leadership.pml).
 *
 * One process, whose every branch is one thing that can happen; all of them can happen in any order. The rules:
 *
 * - An order once given is never gone: it may come late, in any order, twice, or never. Reports of one node keep their
 *   order (an older one is dropped by its number), and what is believed of a node is as old as its last report.
 * - Anybody may fall silent for ever, and speak again; which nodes answer an examine is left to chance. A leader that
 *   dies takes along what it believed and what it was at; the next one knows what is stored, and hears everybody anew.
 * - The operator accepts whatever losses a refusal names, and may choose any node: all that he could do is done.
 * - The primary takes consistency points whenever it likes, as long as it holds a grant; also unasked.
 *
 * Snapshots are numbered as they are taken: the number is the id. A set of them is a mask, `ancestry[id]` all that one
 * descends from and itself. Snapshot 1 is CP 1-1, on all nodes; node 0 begins as the primary of epoch 1. Each guarantee
 * is an assertion, named as in tests/simulation/guarantees.py; a rule can be taken away by defining the name that it
 * stands under (test_model.py).
 */
#ifndef IDS
#define IDS 4
#endif
#ifndef EPOCHS
#define EPOCHS 3
#endif
#ifndef RESYNCS
#define RESYNCS 1
#endif
#define NODES 3
#define NOBODY 3

#define in(id, lineage_of) ((ancestry[lineage_of] >> (id)) & 1)
#define has(set, node) (((set) >> (node)) & 1)

/* A guarantee's name is a variable that is never set, so that what breaks says which one it is. */
hidden byte ONE_GRANT, NO_LOWER_EPOCH, COMPARE_AND_SET, NOTHING_ACKNOWLEDGED_LOST, CERTAIN_OR_REFUSED, KEPT,
    PRIMARY_NEVER_RECEIVES, ONLY_UP, ACKNOWLEDGED_UNDER_GRANT, NOT_BEFORE_OPENING, NEVER_REACHED;
hidden byte n, i, best, losers, known, away, behind, missing;

/* Snapshots, by id. */
byte ids = 1;
byte ancestry[IDS + 1];
byte epoch_of[IDS + 1];
byte sequence[IDS + 1];

/* The store: the epoch (its number is its epoch_id), who reigns in it, the newest known CP. */
byte epoch = 1;
byte primary = 0;
byte newest = 1;
bit opening = 0;
byte winner[4];
byte tips[4];            /* of each epoch: the tips that its grant was offered for */

/* What the leader believes: the tips of those of whom it has heard, and who has answered the examine that runs: all
 * that have reported since it began. */
byte told_tip[NODES];
byte fresh;

/* What is on the nodes' disks. */
byte tip[NODES];
byte grant[NODES];
byte record[NODES];      /* the highest epoch that stands beside the data */
byte running[NODES];     /* the order of the run, 0: none */
byte kept[NODES];        /* snapshots among the preserved copies */

/* Orders to receive. */
byte orders;
byte order_epoch[3], order_node[3], order_target[3], order_tip[3];

/* What was seen: read by assertions only. */
byte acknowledged = 2;
byte holder[4];

/* ------------------------------------------------------------ consistency points */

inline take(node) {
    ids++;
    ancestry[ids] = ancestry[tip[node]] | (1 << ids);
    epoch_of[ids] = grant[node];
    sequence[ids] = sequence[tip[node]] + 1;
    tip[node] = ids
}

/* A report is the only thing that changes what is believed; of the primary, under its grant, it acknowledges. */
#ifdef ANYBODY_ACKNOWLEDGES
#define COUNTS(node) (epoch_of[tip[node]] >= epoch_of[newest] && sequence[tip[node]] > sequence[newest])
#else
#define COUNTS(node) (node == primary && grant[node] == epoch && epoch_of[tip[node]] == epoch && in(newest, tip[node]))
#endif

inline report(node) {
    told_tip[node] = tip[node]; fresh = fresh | (1 << node);
    if
    :: tip[node] != newest && COUNTS(node) ->
        assert(ACKNOWLEDGED_UNDER_GRANT || (node == winner[epoch] && epoch_of[tip[node]] == epoch));
        assert(ONLY_UP || sequence[tip[node]] > sequence[newest]);
        assert(NOTHING_ACKNOWLEDGED_LOST || (acknowledged & ~ancestry[tip[node]]) == 0);
        newest = tip[node]; opening = 0;
        acknowledged = acknowledged | (1 << newest)
    :: else
    fi
}

/* ------------------------------------------------------------ elections: coordinator/core/election.py, ballot.py */

#define HEARD(node) (told_tip[node] != 0)
#define SHOWS(id, node) in(id, told_tip[node])
#define EXCEEDS(a, b) (HEARD(b) && told_tip[a] != told_tip[b] && in(told_tip[b], told_tip[a]))

#ifdef SEQUENCES_DECIDE
#define BEATS(a, b) (sequence[told_tip[a]] >= sequence[told_tip[b]])
#define HAS_NEWEST(node) (told_tip[node] != 0 && sequence[told_tip[node]] >= sequence[newest])
#else
#define BEATS(a, b) (in(told_tip[b], told_tip[a]) || \
    (!in(told_tip[a], told_tip[b]) && epoch_of[told_tip[a]] > epoch_of[told_tip[b]]))
#ifdef NEWEST_PLAYS_NO_PART
#define HAS_NEWEST(node) true
#else
#define HAS_NEWEST(node) in(newest, told_tip[node])
#endif
#endif
#ifdef PRIMARY_AWAY_IS_NO_LOSS
#define AWAY 0
#else
#define AWAY (!has(fresh, primary))
#endif

#define STANDS(node) (has(fresh, node) && (missing || HAS_NEWEST(node)))
#define BEATEN_BY(node, other) (!STANDS(other) || BEATS(node, other))
#define TOP(node) (STANDS(node) && BEATEN_BY(node, 0) && BEATEN_BY(node, 1) && BEATEN_BY(node, 2))

inline look_at_primary() {
    away = !has(fresh, primary);
    behind = !away && (!HAS_NEWEST(primary) || (!opening && ((EXCEEDS(0, primary) && has(fresh, 0)) ||
        (EXCEEDS(1, primary) && has(fresh, 1)) || (EXCEEDS(2, primary) && has(fresh, 2)))))
}

inline ballot(first, second) {
    missing = !(has(fresh, 0) && HAS_NEWEST(0)) && !(has(fresh, 1) && HAS_NEWEST(1)) &&
        !(has(fresh, 2) && HAS_NEWEST(2));
    if
    :: TOP(primary) -> best = primary
    :: !TOP(primary) && TOP(0) -> best = 0
    :: !TOP(primary) && !TOP(0) && TOP(first) -> best = first
    :: !TOP(primary) && !TOP(0) && !TOP(first) && TOP(second) -> best = second
    :: !TOP(0) && !TOP(1) && !TOP(2) -> best = NOBODY /* AMBIGUOUS: the operator has to choose */
    fi
}

#define MAY_HOLD_LOST(node) (!HEARD(node) || (known != 0 -> \
    (ancestry[told_tip[node]] & ~ancestry[told_tip[best]] & ancestry[newest]) != 0 : \
    (ancestry[told_tip[node]] & ~ancestry[told_tip[best]]) != 0))

/* Whose loss must be accepted, if `best` is to reign; `chosen` by the operator. */
inline lose(chosen) {
    losers = 0;
    if :: (away && AWAY) || behind -> losers = losers | (1 << primary) :: else fi;
    if
    :: HAS_NEWEST(best) -> skip
    :: else ->
        known = SHOWS(newest, 0) || SHOWS(newest, 1) || SHOWS(newest, 2);
        losers = losers | MAY_HOLD_LOST(0) | (MAY_HOLD_LOST(1) << 1) | (MAY_HOLD_LOST(2) << 2);
        if :: losers == 0 -> losers = 1 << primary :: else fi
    fi;
    if
    :: chosen ->
        losers = losers | EXCEEDS(0, best) | (EXCEEDS(1, best) << 1) | (EXCEEDS(2, best) << 2);
        if
        :: best != primary && (!has(fresh, primary) || !in(told_tip[primary], told_tip[best])) ->
            losers = losers | (1 << primary)
        :: else
        fi
    :: else
    fi
#ifdef LOSSES_NOT_COUNTED
    ; losers = 0
#endif
}

/* Who has a CP, or may have: on the disk, or nobody could ask. */
#define HOLDS(id, node) (in(id, tip[node]) || has(kept[node], id) || !has(fresh, node))
#define SHOWED(id, node) (has(fresh, node) && in(id, told_tip[node]) && !has(losers, node))

inline open_epoch() {
    n = told_tip[best];
    i = 1;
    do
    :: i > ids -> break
    :: else ->
        if
        :: has(acknowledged, i) && !in(i, n) ->
            assert(NOTHING_ACKNOWLEDGED_LOST || ((has(losers, 0) && HOLDS(i, 0)) || (has(losers, 1) && HOLDS(i, 1)) ||
                (has(losers, 2) && HOLDS(i, 2))));
            assert(NOTHING_ACKNOWLEDGED_LOST || !(SHOWED(i, 0) || SHOWED(i, 1) || SHOWED(i, 2)));
            acknowledged = acknowledged & ~(1 << i)
        :: else
        fi;
        i++
    od;
    assert(CERTAIN_OR_REFUSED ||
        best == primary || has(losers, primary) || (has(fresh, primary) && in(told_tip[primary], n)));
    acknowledged = acknowledged | (1 << n);
    epoch++;
    winner[epoch] = best; primary = best; newest = n;
#ifndef OPENING_NOT_AWAITED
    opening = 1;
#endif
    n = 0
}

/* Nodes 1 and 2 are alike, and which of them goes first is left to chance: so the second epoch need not be 2's. */
#define MAY_REIGN(node) (epoch > 1 || node != 2)

inline elect(first, second) {
    look_at_primary();
    if
    :: away || behind ->
        ballot(first, second);
        if :: best != NOBODY && MAY_REIGN(best) -> lose(0); open_epoch() :: else fi
    :: else
    fi;
    fresh = 0
}

inline elect_chosen(node) {
    look_at_primary();
    best = node;
    if :: away || behind || node != primary -> lose(1); open_epoch() :: else fi;
    fresh = 0
}

/* ------------------------------------------------------------ epochs, as an agent is told of them: agent/rights.py */

#ifdef LOWER_EPOCH_OBEYED
#define NOT_OVER(node, k) true
#else
#define NOT_OVER(node, k) (record[node] <= k)
#endif
#define GRANTABLE(node, k) (winner[k] == node && grant[node] != k && has(tips[k], tip[node]))

inline told(node, k) {
    assert(NO_LOWER_EPOCH || record[node] <= k);
    if :: running[node] != 0 && order_epoch[running[node]] < k -> running[node] = 0 :: else fi;
#ifndef GRANT_OUTLIVES_ITS_EPOCH
    if :: grant[node] != k -> grant[node] = 0 :: else fi;
#endif
    record[node] = k;
    assert(ONE_GRANT || grant[node] == 0 || grant[node] >= record[node])
}

inline granted(node, k) {
    told(node, k);
    assert(ONE_GRANT || holder[k] == NOBODY || holder[k] == node);
    holder[k] = node; grant[node] = k
}

/* ------------------------------------------------------------ resyncs: planner.py, resyncs.py, agent/run.py */

inline plan(node) {
    assert(NOT_BEFORE_OPENING || epoch_of[newest] == epoch);
    orders++;
    order_epoch[orders] = epoch; order_node[orders] = node; order_target[orders] = told_tip[primary];
    order_tip[orders] = told_tip[node]
}

#ifdef EXPECTED_TIP_NOT_COMPARED
#define EXPECTED(o, node) true
#else
#define EXPECTED(o, node) (order_tip[o] == tip[node])
#endif
#define SECONDARY(o, node) (grant[node] < order_epoch[o] && \
    !(record[node] == order_epoch[o] && winner[order_epoch[o]] == node))
#define MAY_RECEIVE(o, node) (NOT_OVER(node, order_epoch[o]) && SECONDARY(o, node) && \
    (in(order_target[o], tip[node]) || EXPECTED(o, node)))
/* Own data is replaced if the order says so: whoever gave it saw that there is some. */
#define MAY_REPLACE(o, node) (in(tip[node], order_target[o]) || !in(order_tip[o], order_target[o]))

inline commit(node, o) {
    if
    :: in(order_target[o], tip[node]) || !MAY_REPLACE(o, node) -> skip
    :: else ->
        assert(NO_LOWER_EPOCH || record[node] <= order_epoch[o]);
        assert(COMPARE_AND_SET || order_tip[o] == tip[node]);
        assert(PRIMARY_NEVER_RECEIVES || grant[node] != epoch);
#ifndef NOTHING_PRESERVED
        kept[node] = kept[node] | (ancestry[tip[node]] & ~ancestry[order_target[o]]);
#endif
        assert(KEPT || (ancestry[tip[node]] & ~ancestry[order_target[o]] & ~kept[node]) == 0);
        tip[node] = order_target[o];
        assert(NOTHING_ACKNOWLEDGED_LOST || ((ancestry[tip[0]] | ancestry[tip[1]] | ancestry[tip[2]] |
            kept[0] | kept[1] | kept[2]) & (1 << newest)) != 0)
    fi;
    running[node] = 0
}

/* ------------------------------------------------------------ what can happen */

#define NODE(node) \
    :: d_step { grant[node] != 0 && ids < IDS -> take(node) } \
    :: d_step { report(node) } \
    :: d_step { epoch < EPOCHS && has(fresh, node) && MAY_REIGN(node) -> elect_chosen(node) } \
    :: d_step { node != primary && !opening && HEARD(node) && \
        in(newest, told_tip[primary]) && told_tip[node] != told_tip[primary] && orders < RESYNCS -> plan(node) } \
    :: d_step { running[node] != 0 && MAY_RECEIVE(running[node], node) -> commit(node, running[node]) } \
    :: d_step { running[node] != 0 && !MAY_RECEIVE(running[node], node) -> running[node] = 0 } \
    TOLD(node, 2) TOLD(node, 3) \
    RECEIVES(node, 1) RECEIVES(node, 2)

/* Any member is told at any time after the epoch is stored; the grant only goes to the tip that it was offered for. */
#define TOLD(node, k) \
    :: d_step { k <= epoch && NOT_OVER(node, k) && record[node] != k -> told(node, k) } \
    :: d_step { k <= epoch && NOT_OVER(node, k) && GRANTABLE(node, k) -> granted(node, k) }

#define RECEIVES(node, o) \
    :: d_step { o <= orders && order_node[o] == node && running[node] != o && MAY_RECEIVE(o, node) && \
        !in(order_target[o], tip[node]) -> running[node] = o; \
        if :: grant[node] != 0 && grant[node] < order_epoch[o] -> grant[node] = 0 :: else fi }

active proctype anything() {
    d_step {
        ancestry[1] = 2; epoch_of[1] = 1; sequence[1] = 1;
        tip[0] = 1; tip[1] = 1; tip[2] = 1; record[0] = 1; record[1] = 1; record[2] = 1; grant[0] = 1;
        holder[1] = 0; holder[2] = NOBODY; holder[3] = NOBODY; winner[1] = 0
    }
end:
    do
    NODE(0)
    NODE(1)
    NODE(2)
    :: d_step { fresh != 0 && epoch < EPOCHS -> elect(1, 2) }
    :: d_step { fresh != 0 && epoch < EPOCHS -> elect(2, 1) }
    :: d_step { fresh != 0 -> fresh = 0 } /* another examine begins */
    :: d_step { epoch_of[newest] != epoch && HEARD(primary) ->
        /* the grant is offered: for the fork, or what came on top of it */
        if
        :: in(newest, told_tip[primary]) -> tips[epoch] = tips[epoch] | (1 << told_tip[primary])
        :: else -> tips[epoch] = tips[epoch] | (1 << newest)
        fi }
    :: d_step { told_tip[0] + told_tip[1] + told_tip[2] != 0 -> /* the leader dies */
        fresh = 0; told_tip[0] = 0; told_tip[1] = 0; told_tip[2] = 0 }
#ifdef NEVER
    :: d_step { (NEVER) -> assert(NEVER_REACHED) }
#endif
    od
}

/*
 * Who leads, and who is obeyed: terms, epochs and grants with two coordinators, one store and two agents.
 *
 * One process, whose every branch is one thing that can happen; all of them can happen in any order. The rules:
 *
 * - A message once sent is never gone: it may come late, in any order, twice, or never. So `sent` only grows.
 * - Time is nothing but the lease: it may run out whenever its holder has stepped down. Between `leading()` and the act
 *   that it allowed (a commit, an order) anything may happen, for ever: that is a process that was stopped past its TTL
 *   and continued, its clock right and its act too late.
 * - A coordinator that dies forgets all that it knows; a commit may be carried out and its answer lost. An agent that
 *   dies keeps what is on its disk.
 * - The store may once be put back to what it was, its coordinators stopped first, and whoever does so says it.
 *
 * Reigns are numbered as they begin: the number of a reign is its leader_id. Epochs are numbered as they are written
 * down: that is their epoch_id, and `number` is the epoch. Each guarantee is an assertion, named as in
 * tests/simulation/guarantees.py; a rule can be taken away by defining the name that it stands under (test_model.py).
 */
#define REIGNS 3
#ifndef EPOCHS
#define EPOCHS 2
#endif
#define AGENTS 2
#define ALL 3

#define NOTHING 0
#define COMMIT 1
#define ORDER 2

/* A guarantee's name is a variable that is never set, so that what breaks says which one it is. */
hidden byte ONE_LEADER, NO_DEPOSED_COORDINATOR, NO_LOWER_EPOCH, ONE_GRANT, ONLY_UP,
    NEVER_REACHED;

/* The store. */
byte holder;             /* the reign whose leader key is there */
byte last_term;
byte stored;             /* the epoch_id of the volume's record */
bit recovering;
bit forgot;              /* it was put back once */

/* Reigns and epochs, as they were begun. */
byte reigns, epochs;
byte term[REIGNS + 1];
byte number[EPOCHS + 1];
byte winner[EPOCHS + 1];
byte sent[REIGNS + 1];   /* of each reign: the epoch_ids that were ordered */

/* Two coordinators. */
byte reign[2];           /* 0: stands by */
bit leading[2];          /* what leading() says */
byte doing[2];           /* what leading() has allowed, and is not done yet */
byte view[2];            /* the volume's record as it believes it stored */
byte wanted[2];          /* the term to exceed */
byte heard[2];           /* agents that have reported to this reign */

/* Two agents: what is on their disks. */
byte met_term[AGENTS], met_reign[AGENTS];
byte record[AGENTS];
byte grant[AGENTS];

/* What was seen: read by assertions only. */
byte seen_term[AGENTS], seen_reign[AGENTS], seen_epoch[AGENTS];
byte granted[EPOCHS + 2];
byte proved;             /* the highest epoch on a disk when the store was put back */

inline over(c) {
    leading[c] = 0; reign[c] = 0; doing[c] = NOTHING; view[c] = 0; heard[c] = 0
}

inline begin(c) {
    reigns++;
    last_term = (last_term > wanted[c] -> last_term : wanted[c]) + 1;
    term[reigns] = last_term;
    holder = reigns; reign[c] = reigns; leading[c] = 1; wanted[c] = 0; view[c] = stored;
#ifndef CLOCK_STANDS_STILL
    assert(ONE_LEADER || !(leading[0] && leading[1]))
#endif
}

/* The record of one volume: what is written compares the leader key, and the record that it replaces. */
#ifdef COMMITS_UNGUARDED
#define MAY_WRITE(c) true
#else
#define MAY_WRITE(c) (holder == reign[c] && stored == view[c])
#endif
#ifdef RECOVERING_FORGOTTEN
#define MAY_OPEN(c) true
#else
#define MAY_OPEN(c) (!recovering || heard[c] == ALL)
#endif

inline write(c, what) {
    assert(NO_DEPOSED_COORDINATOR || (holder == reign[c]));
    assert(ONLY_UP || (number[what] > number[stored] || (forgot && number[what] >= number[stored])));
    stored = what
}

inline open_epoch(c, node) {
    epochs++;
#ifdef SAME_EPOCH_AGAIN
    number[epochs] = (view[c] == 0 -> 1 : number[view[c]]);
#else
    number[epochs] = number[view[c]] + 1;
#endif
    assert(ONLY_UP || number[epochs] > proved);
    winner[epochs] = node
}

/* An agent meets a leader, by an order or on its stream: first the term, on the disk, before anything else. */
#ifdef TERM_NOT_CHECKED
#define REFUSED(a, r) false
#else
#ifdef SAME_TERM_OF_ANOTHER
#define REFUSED(a, r) (term[r] < met_term[a])
#else
#define REFUSED(a, r) (term[r] < met_term[a] || (term[r] == met_term[a] && met_reign[a] != r))
#endif
#endif

inline meet(a, r) {
    assert(NO_DEPOSED_COORDINATOR || (
        term[r] > seen_term[a] || (term[r] == seen_term[a] && (seen_reign[a] == r || seen_reign[a] == 0))));
    met_term[a] = term[r]; met_reign[a] = r;
    seen_term[a] = term[r]; seen_reign[a] = r
}

#ifdef LOWER_EPOCH_OBEYED
#define OVER(a, k) false
#else
#define OVER(a, k) (number[k] < number[record[a]] || (number[k] == number[record[a]] && record[a] != k))
#endif

inline obey(a, k) {
    assert(NO_LOWER_EPOCH || (number[k] > number[seen_epoch[a]] || seen_epoch[a] == k || seen_epoch[a] == 0));
    seen_epoch[a] = k;
    record[a] = k;
#ifndef GRANT_OUTLIVES_ITS_EPOCH
    if :: grant[a] != k -> grant[a] = 0 :: else fi;
#endif
    if
    :: winner[k] == a ->
        assert(ONE_GRANT || (forgot || granted[number[k]] == 0 || granted[number[k]] == k));
        granted[number[k]] = k; grant[a] = k
    :: else
    fi;
    assert(ONE_GRANT || (grant[a] == 0 || number[grant[a]] >= number[record[a]]))
}

/* One that leads no more and has nothing under way has nothing left of its reign. */
inline step_down(c) {
    if :: doing[c] == NOTHING -> over(c) :: else -> leading[c] = 0 fi
}
inline done(c) {
    doing[c] = NOTHING;
    if :: !leading[c] -> over(c) :: else fi
}

#define COORDINATOR(c) \
    :: d_step { reign[c] == 0 && holder == 0 && reigns < REIGNS && (c == 0 || reigns > 0) -> begin(c) } \
    :: d_step { leading[c] -> step_down(c) } /* by its own clock, or because it was not renewed */ \
    :: d_step { reign[c] != 0 -> over(c) } /* dies */ \
    :: d_step { leading[c] && doing[c] == NOTHING && epochs < EPOCHS && MAY_OPEN(c) -> doing[c] = COMMIT } \
    :: d_step { leading[c] && doing[c] == NOTHING && view[c] != 0 -> doing[c] = ORDER } \
    :: d_step { doing[c] == ORDER -> sent[reign[c]] = sent[reign[c]] | (1 << view[c]); done(c) } \
    :: d_step { doing[c] == COMMIT && !MAY_WRITE(c) -> over(c) } \
    COMMITTED(c, 0) COMMITTED(c, 1) \
    MEETS(c, 0) MEETS(c, 1)

/* The agents are alike: the first epoch is the first one's. */
#define MAY_COMMIT(c, node) (doing[c] == COMMIT && epochs < EPOCHS && (node == 0 || epochs > 0))
#ifdef ACTS_BEFORE_IT_STORES
#define COMMITTED(c, node) \
    :: d_step { MAY_COMMIT(c, node) && leading[c] -> \
        open_epoch(c, node); sent[reign[c]] = sent[reign[c]] | (1 << epochs); over(c) /* dies before it stores it */ }
#else
#define COMMITTED(c, node) \
    :: d_step { MAY_COMMIT(c, node) && MAY_WRITE(c) -> \
        open_epoch(c, node); write(c, epochs); view[c] = epochs; recovering = 0; done(c) } \
    :: d_step { MAY_COMMIT(c, node) && MAY_WRITE(c) -> /* carried out, and the answer is lost */ \
        open_epoch(c, node); write(c, epochs); recovering = 0; over(c) }
#endif

/* The agent's stream: it tells the highest term that it has met, and its record; the leader learns from both. */
#define MEETS(c, a) \
    :: d_step { leading[c] && REFUSED(a, reign[c]) -> wanted[c] = met_term[a]; step_down(c) } \
    :: d_step { leading[c] && !REFUSED(a, reign[c]) && doing[c] == NOTHING -> \
        meet(a, reign[c]); \
        if \
        :: number[record[a]] > number[view[c]] && MAY_WRITE(c) -> \
            write(c, record[a]); view[c] = record[a]; recovering = 1 \
        :: number[record[a]] > number[view[c]] && !MAY_WRITE(c) -> over(c) \
        :: else \
        fi; \
        if :: recovering && reign[c] != 0 -> heard[c] = heard[c] | (1 << a) :: else fi }

#define DELIVERED(a, r, k) \
    :: d_step { r <= reigns && k <= epochs && (sent[r] & (1 << k)) && !REFUSED(a, r) -> \
        meet(a, r); if :: !OVER(a, k) -> obey(a, k) :: else fi }
#define DELIVERED_OF(a, k) DELIVERED(a, 1, k) DELIVERED(a, 2, k) DELIVERED(a, 3, k)
#define ANY_DELIVERED(a) DELIVERED_OF(a, 1) DELIVERED_OF(a, 2) DELIVERED_OF(a, 3)

#define PUT_BACK(to_term, to) \
    :: d_step { !forgot && !leading[0] && !leading[1] && to_term <= last_term && to <= stored -> \
        proved = (number[record[0]] > number[record[1]] -> number[record[0]] : number[record[1]]); \
        forgot = 1; recovering = 1; holder = 0; last_term = to_term; stored = to; heard[0] = 0; heard[1] = 0 }

#if defined(NO_STEP_DOWN) || defined(CLOCK_STANDS_STILL)
#define STEPPED_DOWN true
#else
#define STEPPED_DOWN (!(leading[0] && reign[0] == holder) && !(leading[1] && reign[1] == holder))
#endif

active proctype anything() {
end:
    do
    COORDINATOR(0)
    COORDINATOR(1)
    ANY_DELIVERED(0)
    ANY_DELIVERED(1)
    :: d_step { holder != 0 && STEPPED_DOWN -> holder = 0 } /* runs out, or is resigned */
    PUT_BACK(1, 0) PUT_BACK(1, 1) PUT_BACK(2, 1)
#ifdef TERM_NOT_KEPT
    :: d_step { met_term[0] != 0 -> met_term[0] = 0; met_reign[0] = 0 } /* dies, and had it in memory only */
#endif
#ifdef NEVER
    :: d_step { (NEVER) -> assert(NEVER_REACHED) }
#endif
    od
}

/*
 * lanes.h
 *		Which lane and which segment a new event goes to: see lanes.c.
 */
#ifndef SM_LANES_H
#define SM_LANES_H

#include "access/tupdesc.h"
#include "nodes/pg_list.h"
#include "utils/relcache.h"

typedef enum SmPriority
{
	SM_HIGH,
	SM_NORMAL,
	SM_LOW
} SmPriority;

#define SM_PRIORITIES	3

typedef struct SmLaneRef
{
	int			lane_id;
	Oid			seqrelid;
} SmLaneRef;

extern void sm_lanes_init(void);

/* OID of a relation of ours; ERROR when the extension is not there. */
extern Oid	sm_lanes_relation(const char *name);

/* "HIGH", "NORMAL", "LOW" -> SmPriority; ERROR for anything else. */
extern SmPriority sm_lanes_priority(const char *word);

/*
 * The lane of the current epoch for a branch.  *registered tells whether the
 * branch has lanes of its own; if not, the event must carry the branch.
 * ERROR when softmobile.unknown_branch is refuse and the branch is unknown.
 */
extern SmLaneRef sm_lanes_find(const char *branch, SmPriority priority, bool *registered);

/*
 * The segment that takes new events, RowExclusiveLock on it to the end of the
 * transaction; and opened, with the lock kept by the current resource owner.
 */
extern void sm_lanes_lock_segment(void);
extern Relation sm_lanes_open_segment(void);

/* What a row of the log looks like; valid until lanes or the segment are looked up again. */
extern TupleDesc sm_lanes_event_desc(void);

/* True when the log or its current segment is among relations. */
extern bool sm_lanes_log_among(List *relids);

#endif							/* SM_LANES_H */

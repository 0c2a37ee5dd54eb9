/*
 * gaps.c
 *		Numbers that are missing below visible ones, and what becomes of them.
 *
 * The transaction that drew number n may commit after the one that drew n + 1,
 * or never.  A gap is void when nobody can fill it any more; until then it stays
 * open, and delays nothing but itself.  Who can fill it: whoever held the lock of
 * the lane's sequence when the gap was seen, for the lock is taken before the
 * number (seqno.c) and kept to the transaction's end, prepared transactions
 * included.
 *
 * Everything happens in passes of the worker.  A pass takes a snapshot, *then*
 * reads the locks.  Of a transaction T that drew a number, it follows:
 *
 *	- T neither visible in the snapshot nor among the holders: it ended between
 *	  the two readings.  So whenever a holder has ended, its gaps are looked at
 *	  in this pass (it may be visible already) and in the next (it may have become
 *	  visible since): SmGapGroup.look.
 *	- In this way every row that the snapshot sees is found in the pass that
 *	  reads on under the same snapshot, before any later event of the same
 *	  entity is: order is kept.
 *	- When all holders had ended before the snapshot was taken, what is not
 *	  visible will never be: SmGapGroup.over.
 *
 * A transaction that is just ending or being prepared shows for a moment without
 * its virtual transaction id.  While one does, the reading is not complete: gaps
 * are looked at, but nobody is struck off, and no new gap is noted.
 *
 * Used by the worker only; needs a transaction (for its snapshot), takes the
 * lock manager's partition locks for a moment, shared.
 */
#include "postgres.h"

#include "gaps.h"
#include "miscadmin.h"
#include "storage/lock.h"
#include "storage/proc.h"
#include "utils/memutils.h"

#include "compat.h"

/* Readings of the lock table before an incomplete one is given back. */
#define COMPLETE_TRIES	20

static LockData *locks = NULL;

void
sm_gaps_new_snapshot(void)
{
	locks = NULL;				/* its memory went with the pass */
}

static int
compare_vxids(const void *a, const void *b)
{
	uint64		x = *(const uint64 *) a;
	uint64		y = *(const uint64 *) b;

	return (x > y) - (x < y);
}

static SmHolders
holders_among(const LockData *data, Oid seqrelid)
{
	SmHolders	holders = {.vxid = NULL, .n = 0, .complete = true};

	for (int i = 0; i < data->nelements; i++)
	{
		const LockInstanceData *lock = &data->locks[i];

		if (lock->locktag.locktag_type != LOCKTAG_RELATION ||
			lock->locktag.locktag_field1 != MyDatabaseId ||
			lock->locktag.locktag_field2 != seqrelid ||
			(lock->holdMask & LOCKBIT_ON(RowExclusiveLock)) == 0)
			continue;
		if (SM_LOCK_LXID(lock) == InvalidLocalTransactionId)
		{
			holders.complete = false;
			continue;
		}
		if (holders.vxid == NULL)
			holders.vxid = palloc(data->nelements * sizeof(uint64));
		holders.vxid[holders.n++] = (uint64) (uint32) SM_LOCK_BACKEND(lock) << 32 | SM_LOCK_LXID(lock);
	}
	if (holders.n > 1)
		qsort(holders.vxid, holders.n, sizeof(uint64), compare_vxids);
	return holders;
}

SmHolders
sm_gaps_holders(Oid seqrelid)
{
	SmHolders	holders = {.complete = true};

	/* A lane that came with a dump has no sequence, so nobody writes to it. */
	if (!OidIsValid(seqrelid))
		return holders;
	for (int try = 0; try < COMPLETE_TRIES; try++)
	{
		if (locks == NULL || try > 0)
			locks = GetLockStatusData();
		holders = holders_among(locks, seqrelid);
		if (holders.complete)
			break;
	}
	return holders;
}

int
sm_gaps_count(const SmGaps *gaps)
{
	ListCell   *lc;
	int			count = 0;

	foreach(lc, gaps->groups)
		count += ((SmGapGroup *) lfirst(lc))->gaps.n;
	return count;
}

bool
sm_gaps_pressing(const SmGaps *gaps)
{
	ListCell   *lc;

	foreach(lc, gaps->groups)
	{
		SmGapGroup *group = lfirst(lc);

		if (group->look || group->over)
			return true;
	}
	return false;
}

static bool
same_holders(const SmHolders *a, const SmHolders *b)
{
	return a->n == b->n && (a->n == 0 || memcmp(a->vxid, b->vxid, a->n * sizeof(uint64)) == 0);
}

static void
add_all(SmRanges *set, const SmRanges *more)
{
	for (int i = 0; i < more->n; i++)
		sm_ranges_add(set, more->range[i].lo, more->range[i].hi);
}

void
sm_gaps_note(SmGaps *gaps, const SmRanges *found, const SmHolders *holders)
{
	MemoryContext caller = MemoryContextSwitchTo(gaps->cxt);
	SmGapGroup *group = palloc0(sizeof(SmGapGroup));

	Assert(holders->complete);
	add_all(&group->gaps, found);
	group->holders.n = holders->n;
	group->holders.vxid = palloc(Max(holders->n, 1) * sizeof(uint64));
	if (holders->n > 0)
		memcpy(group->holders.vxid, holders->vxid, holders->n * sizeof(uint64));
	group->look = true;
	group->over = holders->n == 0;
	gaps->groups = lappend(gaps->groups, group);
	MemoryContextSwitchTo(caller);
}

bool
sm_gaps_strike_off(SmHolders *was, const SmHolders *now)
{
	int			kept = 0;
	bool		any;

	for (int i = 0; i < was->n; i++)
		if (now->n > 0 && bsearch(&was->vxid[i], now->vxid, now->n, sizeof(uint64), compare_vxids))
			was->vxid[kept++] = was->vxid[i];
	any = kept < was->n;
	was->n = kept;
	return any;
}

/* Takes numbers out of a set. */
static void
subtract(SmRanges *set, const SmRanges *less)
{
	SmRanges	rest;

	if (less->n == 0)
		return;
	rest = sm_ranges_minus(set, less);
	sm_ranges_clear(set);
	*set = rest;
}

static void
free_group(SmGapGroup *group)
{
	sm_ranges_clear(&group->gaps);
	pfree(group->holders.vxid);
	pfree(group);
}

/* Puts groups together that wait for the same transactions. */
static void
merge_groups(SmGaps *gaps)
{
	List	   *merged = NIL;
	ListCell   *lc;

	foreach(lc, gaps->groups)
	{
		SmGapGroup *group = lfirst(lc);
		SmGapGroup *like = NULL;
		ListCell   *other;

		foreach(other, merged)
		{
			SmGapGroup *candidate = lfirst(other);

			if (candidate->look == group->look && candidate->over == group->over &&
				same_holders(&candidate->holders, &group->holders))
			{
				like = candidate;
				break;
			}
		}
		if (group->gaps.n == 0)
			free_group(group);
		else if (like != NULL)
		{
			add_all(&like->gaps, &group->gaps);
			free_group(group);
		}
		else
			merged = lappend(merged, group);
	}
	list_free(gaps->groups);
	gaps->groups = merged;
}

void
sm_gaps_look(SmGaps *gaps, const SmHolders *holders, SmGapsFill fill, void *arg,
			 SmRanges *filled, SmRanges *voids)
{
	MemoryContext caller = CurrentMemoryContext;
	ListCell   *lc;

	foreach(lc, gaps->groups)
	{
		SmGapGroup *group = lfirst(lc);
		bool		was_over = group->over;
		bool		ended = holders->complete ? sm_gaps_strike_off(&group->holders, holders) : true;

		if (ended || group->look || was_over)
		{
			SmRanges	visible = {0};

			fill(&group->gaps, &visible, arg);
			add_all(filled, &visible);
			MemoryContextSwitchTo(gaps->cxt);
			subtract(&group->gaps, &visible);
			MemoryContextSwitchTo(caller);
			sm_ranges_clear(&visible);
			if (was_over)
			{
				add_all(voids, &group->gaps);
				sm_ranges_clear(&group->gaps);
			}
		}
		group->look = ended;
		group->over = holders->complete && group->holders.n == 0;
	}
	MemoryContextSwitchTo(gaps->cxt);
	merge_groups(gaps);
	MemoryContextSwitchTo(caller);
}

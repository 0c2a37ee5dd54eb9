/*
 * reading.c
 *		Reading a lane's log: what comes next, what came late, what is missing.
 *
 * Called by delivery.c between sm_outbox_begin() and its commit; everything that
 * one pass reads, it reads under one snapshot.  See gaps.c for why that keeps the
 * order of an entity's events although they commit out of order.
 */
#include "postgres.h"

#include "delivery.h"
#include "guc.h"
#include "outbox.h"
#include "seqno.h"
#include "utils/memutils.h"

/* State of one reading of a lane's log. */
typedef struct Reading
{
	SmLane	   *lane;
	SmBatch    *batch;			/* begun with the first event for it */
	List	  **branches;		/* of char *: what is looked for instead of a batch; or NULL */
	MemoryContext cxt;			/* of what is found; events are read in a shorter one */
	int64		expected;		/* next number, were there no gap */
	SmRanges	found;			/* new gaps */
	bool		holders_known;
	SmHolders	holders;
	bool		more;
	bool		stalled;		/* somebody was just ending: who holds the sequence could not be read */
} Reading;

/* The numbers between two visible ones that nobody has accounted for yet. */
static bool
note_gap_in_context(Reading *r, int64 upto)
{
	SmLane	   *lane = r->lane;
	int64		at = r->expected;

	while (at < upto)
	{
		const SmRange *known = sm_ranges_after(&lane->skip, at);
		int64		end = known ? Min(upto, known->lo) : upto;

		if (at < end)
		{
			if (!r->holders_known)
			{
				r->holders = sm_gaps_holders(lane->seqrelid);
				r->holders_known = true;
			}
			if (!r->holders.complete)
			{
				r->stalled = true;
				return false;
			}
			if (sm_gaps_count(&lane->gaps) + r->found.n >= SM_GAPS_MAX)
			{
				ereport(LOG,
						(errmsg("softmobile: lane %d has %d open gaps and waits for them", lane->lane_id, SM_GAPS_MAX),
						 errhint("End the oldest transaction that has written to captured tables; see pg_stat_activity.xact_start and pg_prepared_xacts.")));
				return false;
			}
			sm_ranges_append(&r->found, at, end);
		}
		at = known && known->lo < upto ? Min(known->hi, upto) : upto;
	}
	return true;
}

static bool
note_gap(Reading *r, int64 upto)
{
	MemoryContext caller = MemoryContextSwitchTo(r->cxt);
	bool		noted = note_gap_in_context(r, upto);

	MemoryContextSwitchTo(caller);
	return noted;
}

static bool
read_event(const SmEvent *event, int entity_no, void *arg)
{
	Reading    *r = arg;
	SmLane	   *lane = r->lane;
	MemoryContext caller;

	if (event->seq > r->expected && !note_gap(r, event->seq))
		return false;
	if (r->branches != NULL)
	{
		ListCell   *lc;
		bool		listed = false;

		foreach(lc, *r->branches)
			listed = listed || strcmp(lfirst(lc), event->branch_id) == 0;
		if (!listed)
		{
			caller = MemoryContextSwitchTo(r->cxt);
			*r->branches = lappend(*r->branches, pstrdup(event->branch_id));
			MemoryContextSwitchTo(caller);
		}
	}
	else if (!sm_ranges_contain(&lane->skip, event->seq) &&
			 (lane->log_id == lane->lane_id || strcmp(event->branch_id, lane->branch->id) == 0))
	{
		if (r->batch == NULL)
		{
			r->batch = sm_batch_create(lane, lane->branch);
			sm_batch_enqueue(lane, r->batch);
			sm_batch_begin(r->batch);
		}
		switch (sm_batch_add(r->batch, event, entity_no))
		{
			case SM_BATCH_ADDED:
				caller = MemoryContextSwitchTo(r->batch->cxt);
				sm_ranges_append(&r->batch->members, event->seq, event->seq + 1);
				MemoryContextSwitchTo(caller);
				break;
			case SM_BATCH_ELSEWHERE:
				break;
			case SM_BATCH_FULL:
				r->more = true;
				return false;
		}
	}
	r->expected = event->seq + 1;
	return true;
}

/* Everything that the snapshot shows above the cursor has been taken up to r->expected. */
static void
finish_reading(Reading *r)
{
	SmLane	   *lane = r->lane;

	/* A gap that was found just before the reading stopped is found again. */
	while (r->found.n > 0 && r->found.range[r->found.n - 1].lo >= r->expected)
		r->found.n--;
	if (r->found.n > 0)
		sm_gaps_note(&lane->gaps, &r->found, &r->holders);
	lane->cursor = r->expected - 1;
	lane->more = r->more;
	lane->stalled = r->stalled;
	if (lane->skip.n > 0 && lane->skip.range[lane->skip.n - 1].hi <= r->expected)
		sm_ranges_clear(&lane->skip);
}

static void
fill_gaps(const SmRanges *gaps, SmRanges *visible, void *arg)
{
	SmLane	   *lane = arg;

	sm_outbox_visible(lane->log_id, lane->log_id == lane->lane_id ? NULL : lane->branch->id, gaps, visible);
}

/* Queues numbers that came to light late, in batches of bounded size. */
static void
queue_late(SmLane *lane, const SmRanges *late)
{
	SmBatch    *batch = NULL;
	int64		room = 0;

	for (int i = 0; i < late->n; i++)
	{
		int64		lo = late->range[i].lo;

		while (lo < late->range[i].hi)
		{
			MemoryContext caller;
			int64		hi;

			if (room == 0)
			{
				batch = sm_batch_create(lane, lane->branch);
				sm_batch_enqueue(lane, batch);
				room = sm_batch_max_events;
			}
			hi = Min(late->range[i].hi, lo + room);
			caller = MemoryContextSwitchTo(batch->cxt);
			sm_ranges_append(&batch->members, lo, hi);
			MemoryContextSwitchTo(caller);
			room -= hi - lo;
			lo = hi;
		}
	}
}

/* What became of the lane's open gaps, before anything later is read. */
static void
look_at_gaps(SmLane *lane, SmGapsFill fill, SmRanges *filled)
{
	SmRanges	voids = {0};
	SmHolders	holders;

	if (lane->gaps.groups == NIL)
		return;
	holders = sm_gaps_holders(lane->seqrelid);
	sm_gaps_look(&lane->gaps, &holders, fill, lane, filled, &voids);

	/* An unregistered lane's void numbers belong to no branch. */
	if (voids.n == 0 || lane->log_id != lane->lane_id || lane->branch == NULL)
		return;
	lane->folded = sm_gaps_count(&lane->gaps) <= 64;
	sm_outbox_void(lane->lane_id, &voids, lane->folded);
	sm_probe_verify_soon(lane->branch);
}

/*
 * Is there nothing above the cursor?  The lane's sequence tells, for a fiftieth of
 * what a look into the log takes; that counts where each sale makes the worker look
 * at the lanes of many branches.
 */
static bool
nothing_new(SmLane *lane)
{
	/* a lane that came with a dump has no sequence */
	if (!OidIsValid(lane->seqrelid) || sm_seqno_highest(lane->seqrelid) > lane->cursor)
		return false;
	lane->more = false;
	lane->stalled = false;
	return true;
}

/*
 * The batch of a lane that is next to be sent, or NULL when the lane has nothing
 * to send.  Late numbers come first, then what an earlier pass has queued, then
 * what stands above the cursor.  A batch of nothing but asides is settled here.
 */
SmBatch *
sm_reading_next(SmLane *lane)
{
	SmRanges	late = {0};
	ListCell   *lc;

	look_at_gaps(lane, fill_gaps, &late);
	queue_late(lane, &late);

	foreach(lc, lane->queue)
	{
		SmBatch    *batch = lfirst(lc);

		if (!batch->parked && batch != lane->branch->in_flight)
			return batch;
	}

	for (;;)
	{
		Reading		r = {.lane = lane, .expected = lane->cursor + 1, .cxt = CurrentMemoryContext};

		if (nothing_new(lane))
			return NULL;
		sm_outbox_read_after(lane->log_id, lane->cursor, read_event, &r);
		finish_reading(&r);
		if (r.batch == NULL)
			return NULL;
		sm_batch_end(r.batch);
		if (r.batch->n > 0)
			return r.batch;
		if (r.batch->asides != NIL)
			sm_batch_settle_asides(r.batch);
		sm_batch_free(r.batch);
		if (!r.more)
			return NULL;
	}
}

/* Looks through the lane of unregistered branches for branches (added to the list). */
static List **discovered;

static bool
read_branch(const SmEvent *event, int entity_no, void *arg)
{
	return read_event(event, entity_no, arg);
}

static void
fill_branches(const SmRanges *gaps, SmRanges *visible, void *arg)
{
	SmLane	   *lane = arg;
	Reading		r = {.lane = lane, .branches = discovered, .expected = PG_INT64_MAX, .cxt = CurrentMemoryContext};

	sm_outbox_visible(lane->log_id, NULL, gaps, visible);
	if (visible->n > 0)
		sm_outbox_read_members(lane->log_id, visible, read_branch, &r);
}

void
sm_reading_discover(SmLane *lane, List **branches)
{
	Reading		r = {.lane = lane, .branches = branches, .expected = lane->cursor + 1, .cxt = CurrentMemoryContext};
	SmRanges	late = {0};

	discovered = branches;
	look_at_gaps(lane, fill_branches, &late);
	if (nothing_new(lane))
		return;
	sm_outbox_read_after(lane->log_id, lane->cursor, read_branch, &r);
	finish_reading(&r);
}
